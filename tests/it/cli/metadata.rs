//! `metadata.json` as real runs leave it, against the whole document.

use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::cli::{Databuild, until};

/// The document of a run, with what differs from run to run replaced once it has been checked.
fn document(databuild: &Databuild, id: &str) -> Value {
    let path = databuild.home.path().join("logs/job_runs").join(id).join("metadata.json");
    until(|| path.exists(), || format!("{} is not written", path.display()));
    let mut document: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    for name in ["created_at", "started_at", "finished_at"] {
        let time = document[name].as_str().unwrap();
        // 2026-01-31T10:42:00.123456Z
        assert_eq!((time.len(), &time[10..11], &time[19..20], &time[26..]), (27, "T", ".", "Z"), "{name}");
        document[name] = "TIME".into();
    }
    assert!(document["duration_ms"].is_u64(), "{document}");
    document["duration_ms"] = 0.into();
    assert!(!document["host"].as_str().unwrap().is_empty());
    document["host"] = "HOST".into();
    document
}

#[test]
fn a_run_that_succeeded_leaves_this_document() {
    let databuild = Databuild::new();
    let options = ["-p", "data/alpha", "-p", "data/beta", "-l", "team=search"];
    let script = "echo one; printf two; echo three >&2";
    let run = [&["run", "-q", "--id", "r"], &options[..], &["--", "sh", "-c", script]].concat();
    databuild.run(&run).code(0);
    let expected = json!({
        "format_version": 1,
        "job_run_id": "r",
        "state": "succeeded",
        "exit_code": 0,
        "signal": null,
        "command": ["sh", "-c", script],
        "building_partitions": ["data/alpha", "data/beta"],
        "labels": {"team": "search"},
        "host": "HOST",
        "created_at": "TIME",
        "started_at": "TIME",
        "finished_at": "TIME",
        "duration_ms": 0,
        "stdout": {"bytes": 7, "lines": 2, "dropped_bytes": 0, "dropped_lines": 0},
        "stderr": {"bytes": 6, "lines": 1, "dropped_bytes": 0, "dropped_lines": 0},
    });
    assert_eq!(document(&databuild, "r"), expected);
}

#[test]
fn a_document_by_another_tool_need_not_name_its_run() {
    let databuild = Databuild::new();
    for (run, text, code) in [
        ("exit", r#"{"exit_code": 3, "foo": [1]}"#, 3),
        ("state", r#"{"state": "succeeded"}"#, 0),
        ("both", r#"{"state": "failed", "exit_code": 4}"#, 4),
    ] {
        let folder = databuild.home.path().join("logs/job_runs").join(run);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("stdout.log"), "hello\n").unwrap();
        fs::write(folder.join("metadata.json"), text).unwrap();
        let read = databuild.run(&["logs", run, "--exit-status"]).code(code);
        assert_eq!(read.text(), "hello\n");
    }
}

/// The files tell what a document by another tool leaves out; the service keeps such a run as long as others.
#[test]
fn times_that_a_document_lacks_are_those_of_the_files() {
    let databuild = Databuild::new();
    let (_service, url) = databuild.serve();
    let asking = Databuild::asking(&url);
    let (now, second) = (jiff::Timestamp::now(), jiff::SignedDuration::from_secs(1));
    let ended = now - 60 * second;
    for (run, text, took) in [
        ("took", r#"{"exit_code": 0, "duration_ms": 5000}"#.to_owned(), Some(5000)),
        (
            "ended",
            format!(r#"{{"exit_code": 0, "finished_at": "{ended}", "duration_ms": 5000}}"#),
            Some(5000),
        ),
        ("only-ended", format!(r#"{{"exit_code": 0, "finished_at": "{}"}}"#, now + 60 * second), None),
    ] {
        let folder = databuild.home.path().join("logs/job_runs").join(run);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("stdout.log"), "hello\n").unwrap();
        fs::write(folder.join("metadata.json"), text).unwrap();
        let listed = || -> Option<Value> {
            let done = asking.run(&["runs", "-o", "json"]).code(0);
            let runs = done.text().lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            runs.into_iter().find(|listed| listed["job_run_id"] == run && listed["state"] == "succeeded")
        };
        until(|| listed().is_some(), || format!("{run} does not end"));
        let listed = listed().unwrap();
        let time = |name: &str| listed[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
        let (started, finished) = (time("started_at"), time("finished_at"));
        assert!(now - 70 * second < started && started <= finished, "{listed}");
        match took {
            Some(ms) => assert_eq!(listed["duration_ms"], ms, "{listed}"),
            None => assert!(started < finished, "{listed}"),
        }
    }
}

#[test]
fn what_can_not_be_understood_of_a_document_is_said_once_and_the_rest_counts() {
    let databuild = Databuild::new();
    let (service, url) = databuild.serve();
    let folder = databuild.home.path().join("logs/job_runs/r");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("stdout.log"), "hello\n").unwrap();
    let mut follower = Databuild::asking(&url).start(&["logs", "-f", "r", "--exit-status"]);
    assert_eq!(follower.line(), "hello");
    let write = |text: &str| {
        fs::write(folder.join("new"), text).unwrap();
        fs::rename(folder.join("new"), folder.join("metadata.json")).unwrap();
    };
    write(r#"{"exit_code":3,"#);
    service.wait_for("until it can be read the run counts as one that goes on");
    let document = r#"{"exit_code": 3, "labels": {"build": 17}, "started_at": "yesterday"}"#;
    write(document);
    follower.done().code(3);
    service.wait_for("labels, started_at");
    let said = service.stderr();
    assert_eq!(said.matches("until it can be read").count(), 1, "{said}");
}

#[test]
fn a_log_that_can_not_be_opened_is_said_once() {
    let databuild = Databuild::new();
    let (service, url) = databuild.serve();
    let folder = databuild.home.path().join("logs/job_runs/link");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("stdout.log"), "hello\n").unwrap();
    let mut follower = Databuild::asking(&url).start(&["logs", "-f", "link"]);
    assert_eq!(follower.line(), "hello");
    fs::remove_file(folder.join("stdout.log")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", folder.join("stdout.log")).unwrap();
    service.wait_for("a run of another process can't be followed");
    // It is looked at once a second.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    let said = service.stderr();
    assert_eq!(said.matches("can't be followed").count(), 1, "{said}");
    Databuild::asking(&url).run(&["runs"]).code(0);
}

#[test]
fn a_run_that_failed_by_anybodys_word_is_no_success() {
    let databuild = Databuild::new();
    let folder = databuild.home.path().join("logs/job_runs/r");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("metadata.json"), r#"{"exit_code": 256}"#).unwrap();
    databuild.run(&["logs", "r", "--exit-status"]).code(1);
}

#[test]
fn a_document_that_can_not_be_read_is_named() {
    let databuild = Databuild::new();
    let folder = databuild.home.path().join("logs/job_runs/r");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("metadata.json");
    fs::write(&path, r#"{"state": "failed"}"#).unwrap();
    let read = databuild.run(&["logs", "r"]).code(0);
    let what = format!("{}: state failed without exit_code and signal", path.display());
    assert!(read.stderr.contains(&what), "{}", read.stderr);
}

#[test]
fn a_run_that_a_signal_killed_leaves_this_document() {
    let databuild = Databuild::new();
    databuild.run(&["run", "-q", "--id", "r", "--", "sh", "-c", "echo one; kill -9 $$"]).code(137);
    let expected = json!({
        "format_version": 1,
        "job_run_id": "r",
        "state": "failed",
        "exit_code": null,
        "signal": 9,
        "command": ["sh", "-c", "echo one; kill -9 $$"],
        "building_partitions": [],
        "labels": {},
        "host": "HOST",
        "created_at": "TIME",
        "started_at": "TIME",
        "finished_at": "TIME",
        "duration_ms": 0,
        "stdout": {"bytes": 4, "lines": 1, "dropped_bytes": 0, "dropped_lines": 0},
        "stderr": {"bytes": 0, "lines": 0, "dropped_bytes": 0, "dropped_lines": 0},
    });
    assert_eq!(document(&databuild, "r"), expected);
}

#[test]
fn a_run_that_is_lost_leaves_this_document() {
    let databuild = Databuild::new();
    let (_service, url) = databuild.serve();
    let script = "echo one; exec cat";
    let (run, _input) = databuild.start_with_input(&["run", "-q", "--id", "r", "--", "sh", "-c", script]);
    let mut follower = Databuild::asking(&url).start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), "one");
    run.signal(Signal::KILL);
    follower.done().code(0).says("run r was lost: its writer died");
    let expected = json!({
        "format_version": 1,
        "job_run_id": "r",
        "state": "lost",
        "exit_code": null,
        "signal": null,
        "command": ["sh", "-c", script],
        "building_partitions": [],
        "labels": {},
        "host": "HOST",
        "created_at": "TIME",
        "started_at": "TIME",
        "finished_at": "TIME",
        "duration_ms": 0,
        "stdout": {"bytes": 4, "lines": 1, "dropped_bytes": 0, "dropped_lines": 0},
        "stderr": {"bytes": 0, "lines": 0, "dropped_bytes": 0, "dropped_lines": 0},
    });
    assert_eq!(document(&databuild, "r"), expected);
}
