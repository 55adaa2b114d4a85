//! `metadata.json` as real runs leave it, against the whole document.

use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::serve::serving;
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
    let (_service, url) = serving(&databuild);
    let script = "echo one; exec sleep 30";
    let run = databuild.start(&["run", "-q", "--id", "r", "--", "sh", "-c", script]);
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
