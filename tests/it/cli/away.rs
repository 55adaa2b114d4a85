//! `databuild logs --follow` when its service goes away for good.

use std::fs;

use databuild_logs::LogLine;
use rustix::process::Signal;

use crate::support::cli::{Databuild, NOBODY, Scripted, answer, events, path};

#[test]
fn whoever_named_a_service_that_does_not_answer_is_told_what_is_shown_instead() {
    let databuild = Databuild::new();
    databuild.run(&["run", "--quiet", "--id", "r", "--", "echo", "x"]).code(0);
    let asking = beside(&databuild, NOBODY);
    let what = format!("the service at {NOBODY} can't answer: ");
    for args in [&["logs", "latest"][..], &["logs", "r"], &["runs"]] {
        asking.run(args).code(0).says(&what);
    }
    // Nobody named one.
    assert_eq!(databuild.run(&["runs"]).code(0).stderr, "");
}

#[test]
fn whoever_waits_for_a_run_says_so_to_whom_no_terminal_shows_it_too() {
    let databuild = Databuild::new();
    let waiting = databuild.start(&["logs", "-f", "never"]);
    waiting.wait_for("waiting for run never to start in ");
}

/// The executable asking this service, on the folder of another.
fn beside(databuild: &Databuild, url: &str) -> Databuild {
    let folder = databuild.home.path().join("logs");
    Databuild::asking(url).with("DATABUILD_LOG_DIR", folder.to_str().unwrap())
}

#[test]
fn a_follower_whose_service_is_killed_goes_on_in_the_folder_to_the_end_of_the_run() {
    let databuild = Databuild::new();
    let (service, url) = databuild.serve();
    let gate = |n: u32| databuild.home.path().join(format!("gate-{n}"));
    let wait = |n: u32| format!("until [ -e {} ]; do sleep 0.01; done", gate(n).display());
    let script = format!("echo 1; {}; echo 2 >&2; {}; echo 3; {}; echo 4; exit 7", wait(1), wait(2), wait(3));
    let run = databuild.start(&["run", "--quiet", "--id", "r", "--", "sh", "-c", &script]);
    let asking = beside(&databuild, &url);
    let mut follower = asking.start(&["logs", "-f", "--exit-status", "r"]);
    let mut of_both = asking.start(&["logs", "-f", "--exit-status", "--all", "-o", "json", "r"]);
    let number = |line: String| {
        let line: LogLine = serde_json::from_str(&line).unwrap();
        line.m.unwrap()
    };
    assert_eq!((follower.line().as_str(), number(of_both.line()).as_str()), ("1", "1"));
    fs::write(gate(1), "").unwrap();
    assert_eq!(number(of_both.line()), "2");

    service.signal(Signal::KILL);
    assert_eq!(service.done().code, None);
    fs::write(gate(2), "").unwrap();
    assert_eq!((follower.line().as_str(), number(of_both.line()).as_str()), ("3", "3"));
    fs::write(gate(3), "").unwrap();
    let said = format!("the service at {url} does not answer: reading the folder ");
    let done = follower.done().code(7).says(&said).says("run r failed with exit code 7");
    assert_eq!(done.text(), "1\n3\n4\n");
    assert_eq!(done.stderr.lines().count(), 2, "{}", done.stderr);
    let done = of_both.done().code(7).says(&said);
    let lines: Vec<String> = done.text().lines().map(|line| number(line.to_owned())).collect();
    assert_eq!(lines, ["1", "2", "3", "4"]);
    run.done().code(7);
}

/// A service that has this run, begins to send its log, and then can't answer any more.
fn dying(document: String) -> Scripted {
    let away = || answer("503 Service Unavailable", "text/html", "gone");
    Scripted::new(move |head, before| match (path(head), before) {
        ("/api/job_runs/r", 0) => answer("200 OK", "application/json", &document),
        ("/api/job_runs/r/logs/stdout", 0) => events("retry: 1\nid: 2\n\n"),
        _ => away(),
    })
}

fn recorded(databuild: &Databuild) -> String {
    databuild.run(&["run", "--quiet", "--id", "r", "--", "seq", "4"]).code(0);
    fs::read_to_string(databuild.home.path().join("logs/job_runs/r/metadata.json")).unwrap()
}

/// The service has said where the new lines begin, and sent none.
#[test]
fn a_follower_of_new_lines_only_misses_none_when_it_goes_on_in_the_folder() {
    let databuild = Databuild::new();
    let service = dying(recorded(&databuild));
    let done = beside(&databuild, &service.url).run(&["logs", "-f", "-n", "0", "r"]).code(0);
    assert_eq!(done.says("does not answer: reading the folder ").text(), "3\n4\n");
}

#[test]
fn a_follower_waits_for_its_service_where_the_folder_does_not_have_the_run() {
    let databuild = Databuild::new();
    let mut document: serde_json::Value = serde_json::from_str(&recorded(&databuild)).unwrap();
    document["started_at"] = "2026-01-01T00:00:00Z".into();
    let another = dying(document.to_string());
    let nowhere = dying(document.to_string());
    for (asking, service) in [
        (beside(&databuild, &another.url), "a run of the same id that began at another time"),
        (Databuild::asking(&nowhere.url), "no run of this id"),
    ] {
        let follower = asking.start(&["logs", "-f", "r"]);
        follower.wait_for("reconnecting to the service at http://127.0.0.1:");
        follower.signal(Signal::INT);
        let done = follower.done().code(130);
        assert_eq!((done.text(), done.stderr.lines().count()), ("", 1), "{service}: {}", done.stderr);
    }
}
