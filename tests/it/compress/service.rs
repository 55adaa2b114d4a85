//! Compressing on demand: by the service, by the command beside it, and by the command alone.

use super::*;
use crate::support::http::Server;

#[tokio::test]
async fn the_service_compresses_on_demand_and_serves_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let going = store.start(RunSpec::new(id("live"))).unwrap();
    let text = fs::read(of_run(folder.path(), "x", "stdout.log")).unwrap();
    let server = Server::start(store.clone()).await;
    let raw = "/api/job_runs/x/logs/stdout/raw";
    let events = "/api/job_runs/x/logs/all?since=4000&format=json";
    let before = (server.get(raw).await, server.get(events).await);
    let tag = before.0.header("etag").unwrap().to_owned();

    let post = |run: &str| format!("/api/job_runs/{run}/compress");
    assert_eq!(server.request("POST", &post("nobody"), &[]).await.problem(404).kind, "not-found");
    assert_eq!(server.request("POST", &post("live"), &[]).await.problem(409).kind, "unfinished");
    let page = [("Origin", "http://evil.example")];
    assert_eq!(server.request("POST", &post("x"), &page).await.problem(403).kind, "foreign-origin");
    assert_eq!(server.get(&post("x")).await.problem(405).kind, "method-not-allowed");
    let own = format!("http://{}", server.address);
    let done: Compression = server.request("POST", &post("x"), &[("Origin", own.as_str())]).await.json();
    assert!(done.bytes_after < done.bytes_before);

    let after = (server.get(raw).await, server.get(events).await);
    assert!(after.0.body == text && after.0.body == before.0.body && after.1.body == before.1.body);
    assert_eq!(after.0.header("etag"), Some(tag.as_str()), "a download that was begun goes on");
    for (from, to) in [(0, 0), (5, 300_000), (text.len() / 2, text.len() - 1)] {
        let range = format!("bytes={from}-{to}");
        let part = server.get_with(raw, &[("Range", range.as_str()), ("If-Range", tag.as_str())]).await;
        assert_eq!(part.status, 206);
        assert!(part.body == text[from..=to]);
    }
    going.finish(success()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_asks_the_service_or_takes_the_folder() {
    let databuild = Databuild::new();
    let folder = databuild.home.path().join("logs");
    for run in ["one", "two"] {
        databuild
            .run(&["run", "-q", "--id", run, "--", "sh", "-c", "seq 100000; sleep 0.3; echo warning >&2"])
            .code(0);
    }
    databuild.run(&["runs", "compress", "nobody"]).code(3);
    let done = databuild.run(&["runs", "compress", "one", "--log-dir", folder.to_str().unwrap()]).code(0);
    assert!(done.text().starts_with("one: ") && done.text().contains("before"), "{}", done.text());
    assert!(names(&folder, "one").contains(&"stdout.log.zst".to_owned()));
    let seq: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(databuild.run(&["logs", "one"]).code(0).text() == seq);
    assert!(databuild.run(&["logs", "one", "-o", "raw"]).code(0).text() == seq);
    assert_eq!(databuild.run(&["logs", "one", "-n", "1"]).code(0).text(), "100000\n");
    assert_eq!(databuild.run(&["logs", "one", "--all", "-n", "1"]).code(0).text(), "warning\n");

    let store = open(&folder);
    let server = Server::start(store).await;
    let asking = Databuild::asking(format!("http://{}", server.address));
    let done = asking.run(&["runs", "compress", "two", "-o", "json"]).code(0);
    let json: serde_json::Value = serde_json::from_str(done.text()).unwrap();
    assert_eq!(json["job_run_id"], "two");
    assert!(json["bytes_after"].as_u64().unwrap() < json["bytes_before"].as_u64().unwrap());
    assert!(asking.run(&["logs", "two"]).code(0).text() == seq);
    let running = asking.run(&["runs", "compress", "thr"]).code(3);
    assert!(running.stderr.contains("thr"), "{}", running.stderr);
    databuild.run(&["runs", "compress", "two", "--limit", "3"]).code(2);
}

#[test]
fn nonsense_is_refused_at_the_start_by_name() {
    let databuild = Databuild::new().with("DATABUILD_LOG_COMPRESS_AFTER_HOURS", "soon");
    databuild
        .run(&["serve", "--listen", "127.0.0.1:0"])
        .code(2)
        .says("DATABUILD_LOG_COMPRESS_AFTER_HOURS is \"soon\"");
}

#[test]
fn the_command_compresses_a_run_of_which_no_index_knows_yet() {
    let databuild = Databuild::new();
    databuild.run(&["run", "--quiet", "--id", "x", "--", "seq", "10000"]).code(0);
    databuild.run(&["runs", "compress", "x"]).code(0);
    databuild.run(&["index", "check", "--deep"]).code(0);
}
