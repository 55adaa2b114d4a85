//! Logs whose files are not what they were: what is there is shown, and what is missing is said.

use std::fs::{self, File};
use std::path::PathBuf;

use crate::support::cli::{Databuild, NOBODY, Scripted, answer, path};

/// A run whose standard output is nine lines of two bytes each, and that file.
fn recorded(databuild: &Databuild, id: &str) -> PathBuf {
    databuild.run(&["run", "-q", "--id", id, "--", "seq", "9"]).code(0);
    databuild.home.path().join("logs/job_runs").join(id).join("stdout.log")
}

fn cut(log: &PathBuf, length: u64) {
    File::options().write(true).open(log).unwrap().set_len(length).unwrap();
}

/// Ways of `-o raw` to meet a hole from byte 7 on, and what is there of the window.
const WINDOWS: [(&[&str], &str); 5] = [
    (&[], "1\n2\n3\n4"),
    (&["--since-line", "1", "-n", "5"], "2\n3\n4"),
    (&["--since-line", "5", "-n", "2"], ""),
    (&["-n", "8"], "2\n3\n4"),
    (&["-n", "2"], ""),
];

#[test]
fn the_bytes_of_a_log_that_became_shorter_end_with_a_word_from_the_folder() {
    let databuild = Databuild::asking(NOBODY);
    cut(&recorded(&databuild, "cut"), 7);
    for (window, there) in WINDOWS {
        let done = databuild.run(&[&["logs", "cut", "-o", "raw"], window].concat()).code(1);
        let done = done.says("stdout.log: the log ends at byte 7, and 11 bytes behind it are missing");
        assert_eq!(done.text(), there, "{window:?}");
    }
    let whole = databuild.run(&["logs", "cut", "-o", "raw", "--since-line", "1", "-n", "2"]).code(0);
    assert_eq!((whole.text(), whole.stderr.lines().count()), ("2\n3\n", 1), "no byte of it is missing");
    fs::remove_file(recorded(&databuild, "gone")).unwrap();
    let done = databuild.run(&["logs", "gone", "-o", "raw"]).code(1);
    assert_eq!(done.says("the log ends at byte 0, and 18 bytes behind it are missing").text(), "");
}

#[test]
fn the_bytes_of_a_log_that_became_shorter_end_with_a_word_from_the_service() {
    let databuild = Databuild::new();
    let (_service, url) = databuild.serve();
    let asking = Databuild::asking(&url);
    cut(&recorded(&databuild, "cut"), 7);
    for (window, there) in WINDOWS {
        let done = asking.run(&[&["logs", "cut", "-o", "raw"], window].concat()).code(1);
        let done = done.says("stdout.log: the log ends at byte 7, and 11 bytes behind it are missing");
        assert_eq!(done.text(), there, "{window:?}");
    }
    let whole = asking.run(&["logs", "cut", "-o", "raw", "--since-line", "1", "-n", "2"]).code(0);
    assert_eq!((whole.text(), whole.stderr.as_str()), ("2\n3\n", ""), "no byte of it is missing");
    fs::remove_file(recorded(&databuild, "gone")).unwrap();
    asking.run(&["logs", "gone", "-o", "raw"]).code(1).says("the log ends at byte 0, and 18 bytes behind it");
}

/// The journal tells of it in many pieces.
#[test]
fn a_hole_is_told_once_however_the_log_is_shown() {
    let databuild = Databuild::new();
    databuild.run(&["run", "-q", "--id", "r", "--", "seq", "100000"]).code(0);
    cut(&databuild.home.path().join("logs/job_runs/r/stdout.log"), 7);
    let (_service, url) = databuild.serve();
    let in_folder = Databuild::asking(NOBODY).with("DATABUILD_LOG_DIR", folder(&databuild));
    for asking in [in_folder, Databuild::asking(&url)] {
        for shown in [&[][..], &["-t"], &["--all"], &["-o", "json"], &["--all", "-f"]] {
            let done = asking.run(&[&["logs", "r"], shown].concat()).code(0);
            let told: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("--")).collect();
            assert_eq!(told, ["-- 99997 lines of stdout (588 kB) were not kept: the file is damaged --"]);
            assert_eq!(done.text().lines().count(), 3, "{shown:?}");
        }
    }
}

#[test]
fn a_log_that_can_not_be_read_is_said_at_once_by_a_service_too() {
    let databuild = Databuild::new();
    let log = recorded(&databuild, "r");
    fs::remove_file(&log).unwrap();
    fs::create_dir(&log).unwrap();
    let (_service, url) = databuild.serve();
    for asking in
        [Databuild::asking(&url), Databuild::asking(NOBODY).with("DATABUILD_LOG_DIR", folder(&databuild))]
    {
        for args in [&["logs", "r"][..], &["logs", "-f", "r"], &["logs", "r", "-o", "raw"]] {
            let done = asking.run(args).code(1).says("stdout.log: it is not a regular file");
            assert_eq!(done.text(), "", "{args:?}");
        }
    }
}

fn folder(databuild: &Databuild) -> String {
    databuild.home.path().join("logs").to_str().unwrap().to_owned()
}

#[test]
fn an_answer_that_says_what_is_wrong_is_not_asked_for_again() {
    let problem =
        r#"{"type":"io","title":"Internal Server Error","status":500,"detail":"reading /x: no luck"}"#;
    let service = Scripted::new(move |head, _| match path(head) {
        "/api/job_runs/r" => answer("200 OK", "application/json", r#"{"job_run_id":"r","exit_code":0}"#),
        _ => answer("500 Internal Server Error", "application/problem+json", problem),
    });
    for args in [&["logs", "r"][..], &["logs", "-f", "r"], &["logs", "r", "-o", "raw"]] {
        let done = Databuild::asking(&service.url).run(args).code(1);
        done.says(&format!("databuild: the service at {} failed: reading /x: no luck\n", service.url));
    }
    assert_eq!(service.requests("/stdout").len(), 2);
    assert_eq!(service.requests("/raw").len(), 1);
}

/// The head of the first answer promises more than there is, and the part that is missing is refused.
#[test]
fn what_is_behind_a_hole_is_asked_for_once() {
    let problem =
        r#"{"type":"corrupt","title":"Internal Server Error","status":500,"detail":"3 bytes are missing"}"#;
    let service = Scripted::new(move |head, before| match (path(head), before) {
        ("/api/job_runs/r", _) => answer("200 OK", "application/json", r#"{"job_run_id":"r","exit_code":0}"#),
        (_, 0) => {
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\n0123456".to_vec()
        }
        _ => answer("500 Internal Server Error", "application/problem+json", problem),
    });
    let done = Databuild::asking(&service.url).run(&["logs", "r", "-o", "raw"]).code(1);
    assert_eq!(done.says("failed: 3 bytes are missing").text(), "0123456");
    let requests = service.requests("/raw");
    assert_eq!(requests.len(), 2);
    assert!(requests[1].to_lowercase().contains("range: bytes=7-\r\n"), "{requests:?}");
}
