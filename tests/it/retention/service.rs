//! Beside a service and without one: the command line, HTTP, and what it costs.

use std::io::Write;
use std::process::Command;

use rustix::process::Signal;

use super::*;
use crate::support::cli::{Databuild, Scripted, answer, until};
use crate::support::http::Server;

fn with_runs(count: u32) -> Databuild {
    let databuild = Databuild::new();
    let store = open(&databuild.home.path().join("logs"));
    ended_by_the_hour(&store, count);
    store.close().unwrap();
    databuild
}

#[test]
fn gc_says_each_run_and_why_and_works_alone() {
    let databuild = with_runs(4);
    let logs = databuild.home.path().join("logs");
    let args = ["gc", "--older-than", "150m", "--log-dir", logs.to_str().unwrap()];
    let dry = databuild.run(&[&args[..], &["--dry-run"]].concat()).code(0);
    let lines: Vec<_> = dry.text().lines().collect();
    assert!(
        lines[0].starts_with("1 ") && lines[0].ends_with("ended 4 h 0 min ago  older than 150 minutes"),
        "{lines:?}"
    );
    assert!(lines[2].starts_with("2 runs would be evicted, ") && lines.len() == 3, "{lines:?}");
    let done = databuild.run(&[&args[..], &["-o", "json"]].concat()).code(0);
    let report: GcReport = serde_json::from_str(done.text()).unwrap();
    assert_eq!((evicted(&report), report.evicted[0].reason), (vec!["1", "2"], EvictionReason::Expired));
    assert!(databuild.run(&args).code(0).text().starts_with("0 runs evicted, 0 B; "));
    // The policy of the environment, where no flag says otherwise.
    let strict = databuild.with("DATABUILD_LOG_TTL_DAYS", "0.05");
    let text = strict.run(&["gc", "--log-dir", logs.to_str().unwrap()]).code(0).text().to_owned();
    assert!(text.starts_with("3 ") && text.contains("1 run evicted"), "{text}");
    for bad in [["--older-than", "7"], ["--max-size", "much"], ["--keep-last", "-1"]] {
        strict.run(&["gc", bad[0], bad[1]]).code(2).says(bad[0]);
    }
    strict.run(&["gc", "--log-dir", "/nonexistent"]).code(1).says("does not exist");
}

#[test]
fn gc_asks_the_service_that_has_the_folder() {
    let databuild = with_runs(4);
    let (_service, url) = databuild.serve();
    let asking = Databuild::asking(&url);
    let done = asking.run(&["gc", "--max-size", "1", "--keep-last", "2", "-o", "json"]).code(0);
    let report: GcReport = serde_json::from_str(done.text()).unwrap();
    assert_eq!(evicted(&report), ["1", "2"]);
    let logs = databuild.home.path().join("logs");
    assert!(!logs.join("job_runs/1").exists() && logs.join("job_runs/3").exists());
    let done = asking.run(&["logs", "1"]).code(3);
    done.says("run 1 was evicted at 20").says("the log folder took up more than 1 bytes");
    asking.run(&["logs", "1", "--follow"]).code(3).says("was evicted");
    databuild.run(&["gc", "--log-dir", logs.to_str().unwrap()]).code(1).says("in use").says("--server");
}

#[test]
fn runs_are_pinned_by_the_service_and_without_it() {
    let databuild = with_runs(3);
    let logs = databuild.home.path().join("logs");
    let dir = logs.to_str().unwrap();
    databuild.run(&["runs", "pin", "2", "--log-dir", dir]).code(0).says("run 2 is pinned");
    assert!(databuild.run(&["runs", "--log-dir", dir]).code(0).text().contains("succeeded, pinned"));
    let (_service, url) = databuild.serve();
    let asking = Databuild::asking(&url);
    asking.run(&["runs", "pin", "latest"]).code(0).says("run 3 is pinned");
    let listed = asking.run(&["runs", "-o", "json"]).code(0);
    let pinned: Vec<_> = listed.text().lines().filter(|line| line.contains(r#""pinned":true"#)).collect();
    assert_eq!(pinned.len(), 2, "{}", listed.text());
    asking.run(&["gc", "--max-size", "1"]).code(0);
    asking.run(&["runs", "unpin", "2"]).code(0).says("not pinned any more");
    let text = asking.run(&["gc", "--max-size", "1"]).code(0).text().to_owned();
    assert!(text.starts_with("2 ") && text.contains("1 run evicted"), "{text}");
    asking.run(&["runs", "pin", "nobody"]).code(3);
    asking.run(&["runs", "pin", "1"]).code(3).says("was evicted");
}

#[test]
fn nonsense_is_refused_at_the_start() {
    for (name, value) in [
        ("DATABUILD_LOG_TTL_DAYS", "week"),
        ("DATABUILD_LOG_MAX_SIZE_GB", "-1"),
        ("DATABUILD_LOG_KEEP_LAST", "x"),
    ] {
        let databuild = Databuild::new().with(name, value);
        for verb in [&["serve", "--listen", "127.0.0.1:0"][..], &["gc", "--log-dir", "/tmp"]] {
            databuild.run(verb).code(2).says(&format!("{name} is {value:?}: expected a "));
        }
    }
}

#[test]
fn a_service_evicts_by_itself_what_is_too_old() {
    let databuild = with_runs(3).with("DATABUILD_LOG_TTL_DAYS", "0.07");
    let (service, url) = databuild.serve();
    service.wait_for("a run is evicted");
    until(
        || Databuild::asking(&url).run(&["runs", "-o", "json"]).text().lines().count() == 1,
        || service.stderr(),
    );
    service.signal(Signal::TERM);
    service.done().code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http_what_is_gone_is_410_and_a_follower_hears_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("big"))).unwrap();
    let line = [&[b'x'; 9_999][..], b"\n"].concat();
    for _ in 0..3_000 {
        writer.append(Stream::Stdout, &line).unwrap();
    }
    writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    left(&store);
    let server = Server::start(store).await;
    // More than the connection takes in by itself.
    let mut follower = server.open("/api/job_runs/big/logs/stdout?follow=true", &[]).await;
    let report: GcReport = server.request("POST", "/api/gc?max_bytes=1", &[]).await.json();
    assert_eq!(evicted(&report), ["big"]);
    let events = follower.events_until(|event| event.name == "evicted").await;
    assert_eq!(events.len(), 3_001, "all that could be read, and then that");
    let told: Tombstone = serde_json::from_str(&events[3_000].data).unwrap();
    for target in ["logs/stdout", "logs/all?follow=true", "logs/stdout/raw", ""] {
        let answer = server.get(format!("/api/job_runs/big/{target}").trim_end_matches('/')).await;
        let problem = answer.problem(410);
        assert_eq!((problem.kind.as_str(), problem.tombstone), ("evicted", Some(told.clone())), "{target}");
    }
}

#[tokio::test]
async fn what_changes_something_takes_the_token_and_no_page_of_another_site() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended(&store, "r", HOUR, 1);
    left(&store);
    let server = Server::start(store).await;
    let gc = "/api/gc?dry_run=true&max_bytes=1";
    for headers in [
        &[("Origin", "http://evil.example")][..],
        &[("Origin", "null")],
        &[("Sec-Fetch-Site", "cross-site")],
        &[("Sec-Fetch-Site", "same-site")],
    ] {
        for (method, target) in
            [("POST", gc), ("PUT", "/api/job_runs/r/pin"), ("DELETE", "/api/job_runs/r/pin")]
        {
            assert_eq!(server.request(method, target, headers).await.problem(403).kind, "foreign-origin");
        }
        assert_eq!(server.get_with("/api/job_runs", headers).await.status, 200);
    }
    let own = format!("http://{}", server.address);
    for headers in [&[][..], &[("Origin", own.as_str())], &[("Sec-Fetch-Site", "same-origin")]] {
        assert_eq!(server.request("POST", gc, headers).await.status, 200);
    }
    for bad in ["older_than=x", "older_than=-1", "max_bytes=1.5", "keep_last=+1", "dry_run=maybe"] {
        let problem = server.request("POST", &format!("/api/gc?{bad}"), &[]).await.problem(400);
        assert_eq!(problem.parameter.as_deref(), bad.split('=').next());
    }
    assert_eq!(server.get("/api/gc").await.status, 405);
    assert_eq!(server.request("PUT", "/api/job_runs/r/pin", &[]).await.status, 204);
    assert!(server.get("/api/job_runs").await.text().contains(r#""pinned":["r"]"#));
    assert_eq!(server.request("DELETE", "/api/job_runs/r/pin", &[]).await.status, 204);
    server.request("PUT", "/api/job_runs/never/pin", &[]).await.problem(404);

    let options = databuild_logs::ServerOptions { token: Some("secret".to_owned()), ..Default::default() };
    let guarded = Server::start_with(databuild_logs::MemoryLogStore::new(), options).await;
    for (method, target) in [("POST", "/api/gc"), ("PUT", "/api/job_runs/r/pin"), ("GET", "/metrics")] {
        guarded.request(method, target, &[]).await.problem(401);
    }
    let bearer = [("Authorization", "Bearer secret")];
    assert_eq!(guarded.request("POST", "/api/gc", &bearer).await.problem(501).kind, "unsupported");
}

#[test]
fn metrics_tell_what_was_done() {
    let databuild = with_runs(3);
    let (_service, url) = databuild.serve();
    let asking = Databuild::asking(&url);
    let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "new", "--", "cat"]);
    let is_seen = || asking.run(&["runs", "--state", "running"]).text().contains("new");
    until(is_seen, || "the run is not seen".to_owned());
    let text: String = (1..=1_000).map(|number| format!("{number}\n")).collect();
    input.write_all(text.as_bytes()).unwrap();
    asking.run(&["gc", "--older-than", "150m"]).code(0);
    let metrics = || {
        let done =
            Command::new("curl").args(["-s", &format!("{url}/metrics")]).output().expect("curl is installed");
        String::from_utf8(done.stdout).unwrap()
    };
    let value = |name: &str| {
        let text = metrics();
        let line = text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.and_then(|line| line.rsplit(' ').next().unwrap().parse::<f64>().ok()).unwrap_or(-1.0)
    };
    assert!(
        (value(r#"databuild_log_evicted_runs_total{reason="expired"}"#) - 1.0).abs() < 0.1,
        "{}",
        metrics()
    );
    assert!(value(r#"databuild_log_evicted_bytes_total{reason="expired"}"#) > 100_000.0);
    until(|| value("databuild_log_appended_lines_total") >= 1_000.0, metrics);
    assert!(value("databuild_log_appended_bytes_total") >= 3_893.0);
    drop(input);
    job.done().code(0);
    until(|| value(r#"databuild_log_runs{state="finished"}"#) >= 3.0, metrics);
    assert!(value("databuild_log_bytes") > 200_000.0 && value("databuild_log_index_commits_total") >= 1.0);
    assert!(value("databuild_log_gc_duration_seconds_count") >= 1.0);
}

/// The calls that a service makes while it evicts the oldest 5 of so many runs.
fn calls_of_gc(runs: u32) -> String {
    let databuild = Databuild::new().with("DATABUILD_LOG_TTL_DAYS", "0");
    let store = open(&databuild.home.path().join("logs"));
    for run in 1..=runs {
        ended(&store, &run.to_string(), HOUR * (runs + 1 - run), 1);
    }
    store.close().unwrap();
    let trace = databuild.home.path().join("trace");
    let options = ["-y", "-e", "trace=%file,getdents64"];
    let service = databuild.start_traced(&trace, &options, &["serve", "--listen", "127.0.0.1:0"]);
    let url = service.address().unwrap();
    let asking = Databuild::asking(&url);
    // What it looks at when it opens the folder, and the first time it adds up, is over then.
    asking.run(&["runs"]).code(0);
    asking.run(&["gc", "--dry-run"]).code(0);
    let before = fs::metadata(&trace).unwrap().len();
    let keep = (runs - 5).to_string();
    let done = asking.run(&["gc", "--max-size", "1", "--keep-last", &keep, "-o", "json"]).code(0);
    let report: GcReport = serde_json::from_str(done.text()).unwrap();
    assert_eq!(evicted(&report), ["1", "2", "3", "4", "5"]);
    fs::read_to_string(trace).unwrap()[usize::try_from(before).unwrap()..].to_owned()
}

#[test]
fn planning_lists_no_folder_and_what_it_costs_does_not_grow_with_the_runs() {
    let [few, many] = [20, 400].map(calls_of_gc);
    for calls in [&few, &many] {
        let listed: Vec<_> = calls.lines().filter(|line| line.contains("getdents64(")).collect();
        assert!(listed.iter().all(|call| call.contains("/trash/")), "{listed:#?}");
        assert!(
            !calls.lines().any(|call| call.contains("open") && call.contains("job_runs\"")),
            "the folder of all runs is not opened"
        );
    }
    let count = |calls: &str| calls.lines().filter(|call| !call.contains("getdents64(")).count();
    let (few, many) = (count(&few), count(&many));
    assert!(many <= few + 20, "{few} calls with 20 runs, {many} with 400");
}

#[test]
fn what_the_first_calls_evicted_is_told_when_a_later_one_fails() {
    let report = GcReport {
        evicted: vec![databuild_logs::EvictedRun {
            id: id("r"),
            ended_at: UnixMicros(1),
            bytes: 5,
            reason: EvictionReason::Expired,
            why: "older than 7 days".to_owned(),
        }],
        more: true,
        ..GcReport::default()
    };
    let report = serde_json::to_string(&report).unwrap();
    let service = Scripted::new(move |_, before| match before {
        0 | 2 | 4 => answer("200 OK", "application/json", &report),
        _ => answer("500 Internal Server Error", "text/plain", "no"),
    });
    let asking = Databuild::asking(&service.url);
    let done = asking.run(&["gc", "-o", "json"]).code(1);
    let told: GcReport = serde_json::from_str(done.text()).unwrap();
    assert_eq!((evicted(&told), told.more), (vec!["r"], false));
    assert!(told.unfinished.is_some_and(|why| done.stderr.contains(&why)), "{}", done.stderr);
    for format in ["json", "text"] {
        asking.run_unread(&["gc", "-o", format]).code(1).says("there may be more to evict");
    }
}
