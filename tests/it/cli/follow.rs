//! `databuild logs --follow`: of runs that go on, that have not begun, and over services that come and go.

use std::fs;
use std::sync::Arc;

use databuild_logs::{Exit, JobRunId, LogStore, Outcome, ServerOptions, StateKind};
use rustix::process::Signal;

use super::{Setup, exited, numbers, run_id};
use crate::support::address::HeldAddress;
use crate::support::cli::{Databuild, NOBODY, Scripted, answer, events, head, path, until};
use crate::support::http::Server;
use crate::support::stores::Reopened;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_followed_to_its_end_which_is_told_on_stderr() {
    let setup = Setup::new().await;
    for (id, outcome, words) in [
        ("good", exited(0), "run good succeeded in "),
        ("bad", exited(2), "run bad failed with exit code 2 after "),
        ("killed", Outcome::Exited(Exit::Signal(9)), "run killed was killed by signal 9 after "),
        ("cancelled", Outcome::Cancelled(Exit::Signal(15)), "run cancelled was cancelled after "),
        ("lost", Outcome::Lost, "run lost was lost: its writer died"),
    ] {
        setup.out(id, "before\n");
        let mut follower = setup.databuild.start(&["logs", "--follow", id]);
        assert_eq!(follower.line(), "before");
        setup.out(id, "while\n");
        assert_eq!(follower.line(), "while");
        setup.out(id, "unterminated");
        setup.finish(id, outcome);
        let done = follower.done().code(0).says(words);
        assert_eq!(done.text(), "before\nwhile\nunterminated\n");
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_limits_the_backlog_and_nothing_after_it() {
    let setup = Setup::new().await;
    setup.out("r", numbers(10));
    let mut follower = setup.databuild.start(&["logs", "-f", "-n", "2", "r"]);
    assert_eq!([follower.line(), follower.line()], ["9", "10"]);
    setup.out("r", "11\n12\n13\n");
    setup.finish("r", exited(0));
    assert_eq!(follower.done().code(0).text(), "9\n10\n11\n12\n13\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_has_not_begun_is_waited_for() {
    let setup = Setup::new().await;
    setup.finished("other", "other\n");
    let mut follower = setup.databuild.start(&["logs", "-f", "later", "-o", "json"]);
    setup.out("later", "first\n");
    assert!(follower.line().contains("\"m\":\"first\""));
    setup.finish("later", exited(0));
    follower.done().code(0).says("run later succeeded");
}

/// `build-1` is no other name for `build-10`, which was there before.
#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_waited_for_is_not_the_beginning_of_another() {
    let databuild = Databuild::new();
    let record = |id: &str, text: &str| databuild.run(&["run", "-q", "--id", id, "--", "echo", text]).code(0);
    record("build-10", "ten");
    let follower = databuild.start(&["logs", "-f", "build-1"]);
    follower.wait_for("waiting for run build-1 to start");
    record("build-1", "one");
    assert_eq!(follower.done().code(0).text(), "one\n");
    assert_eq!(databuild.run(&["logs", "-f", "build-1"]).code(0).text(), "one\n");
    record("build-20", "twenty");
    assert_eq!(databuild.run(&["logs", "-f", "--no-wait", "build-2"]).code(0).text(), "twenty\n");
    // Nobody chose this one, and few type all of it.
    databuild.run(&["run", "-q", "--", "echo", "generated"]).code(0);
    let listed = databuild.run(&["runs", "-o", "json"]).code(0);
    let latest: serde_json::Value = serde_json::from_str(listed.text().lines().next().unwrap()).unwrap();
    let id = latest["job_run_id"].as_str().unwrap();
    assert_eq!(databuild.run(&["logs", "-f", &id[..30]]).code(0).text(), "generated\n");
    let refused = databuild.run(&["run", "--id", "latest", "--", "echo"]).code(125);
    refused.says("that is how the run that started last is called");
}

/// However many ids that somebody chose begin as a generated one does.
#[test]
fn a_generated_id_is_found_behind_more_chosen_ones_than_a_page_has() {
    let databuild = Databuild::new();
    let ended_on = |id: &str, day: u32| {
        let folder = databuild.home.path().join("logs/job_runs").join(id);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("stdout.log"), format!("{id}\n")).unwrap();
        let time = format!("2026-01-{day:02}T00:00:00Z");
        let document = serde_json::json!({"exit_code": 0, "started_at": time, "finished_at": time});
        fs::write(folder.join("metadata.json"), document.to_string()).unwrap();
    };
    let oldest = JobRunId::generate().to_string();
    let (beginning, newest) = (&oldest[..30], format!("{}000000", &oldest[..30]));
    ended_on(&oldest, 1);
    for n in 0..1_001 {
        ended_on(&format!("{beginning}.{n}"), 2);
    }
    assert_eq!(databuild.run(&["logs", "-f", beginning]).code(0).text(), format!("{oldest}\n"));
    ended_on(&newest, 3);
    let refused = databuild.run(&["logs", "-f", beginning]).code(2);
    let refused = refused.says("more than one run begins with").says(&oldest).says(&newest);
    assert!(!refused.stderr.contains(&format!("{beginning}.")), "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_has_not_begun_is_not_found_by_who_does_not_wait() {
    let setup = Setup::new().await;
    let done =
        setup.databuild.run(&["logs", "-f", "--no-wait", "later"]).code(3).says("there is no run later in");
    assert_eq!(done.text(), "");
    setup.finished("here", "x\n");
    setup.databuild.run(&["logs", "-f", "--no-wait", "here"]).code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_restarts_costs_no_line_and_repeats_none() {
    let shared: Arc<dyn LogStore> = Arc::new(Reopened::new());
    let quick = || ServerOptions { retry: std::time::Duration::from_millis(10), ..ServerOptions::default() };
    let held = HeldAddress::any();
    let mut server = Server::start_at(held.address, Arc::clone(&shared), quick()).await;
    let databuild = Databuild::asking(format!("http://{held}"));
    let append = |n: u64| {
        shared.append(&run_id("r"), databuild_logs::Stream::Stdout, format!("{n}\n").as_bytes()).unwrap();
    };
    append(1);
    let mut follower = databuild.start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), "1");
    for round in 1..=3 {
        server.stop().await.unwrap();
        append(round * 10);
        server = Server::start_at(held.address, Arc::clone(&shared), quick()).await;
        assert_eq!(follower.line(), (round * 10).to_string());
        append(round * 10 + 1);
        assert_eq!(follower.line(), (round * 10 + 1).to_string());
    }
    server.stop().await.unwrap();
    shared.finish(&run_id("r"), databuild_logs::RunEnd::now(exited(0))).unwrap();
    let _server = Server::start_at(held.address, Arc::clone(&shared), quick()).await;
    let done = follower.done().code(0).says("run r succeeded");
    assert_eq!(done.text(), "1\n10\n11\n20\n21\n30\n31\n");
}

/// The connection breaks within an event; what is resumed is what was seen whole.
#[test]
fn a_connection_that_breaks_is_resumed_behind_the_last_whole_line() {
    let service = Scripted::new(|head, before| match (path(head), before) {
        ("/api/job_runs/r", _) => run_document("r"),
        (_, 0) => events(
            "retry: 1\nevent: log\nid: 1\ndata: {\"n\":1,\"s\":\"stdout\",\"m\":\"one\"}\n\n\
             event: log\nid: 2\ndata: {\"n\":2,\"s\":\"stdout\",\"m\":\"two\"}\n\n\
             event: log\nid: 3\ndata: {\"n\":3,\"s\":\"std",
        ),
        (_, 1) => answer("503 Service Unavailable", "text/html", "starting"),
        _ => events(
            "event: log\nid: 3\ndata: {\"n\":3,\"s\":\"stdout\",\"m\":\"three\"}\n\n\
             event: complete\nid: 3!\ndata: {\"exit_code\":0,\"duration_ms\":5,\"state\":\"succeeded\",\"lines\":3,\"dropped_bytes\":0}\n\n",
        ),
    });
    let databuild = Databuild::asking(&service.url);
    let done = databuild.run(&["logs", "-f", "r"]).code(0).says("run r succeeded in 0.005 s");
    assert_eq!(done.text(), "one\ntwo\nthree\n");
    let requests = service.requests("/logs/stdout");
    assert_eq!(requests.len(), 3);
    assert!(!requests[0].to_lowercase().contains("last-event-id"));
    for resumed in &requests[1..] {
        assert!(resumed.to_lowercase().contains("last-event-id: 2\r\n"), "{resumed}");
    }
}

#[test]
fn a_window_that_breaks_is_resumed_for_what_is_left_of_it() {
    let service = Scripted::new(|head, before| match (path(head), before) {
        ("/api/job_runs/r", _) => run_document("r"),
        (_, 0) => events("retry: 1\nevent: log\nid: 6\ndata: {\"n\":6,\"s\":\"stdout\",\"m\":\"six\"}\n\n"),
        _ => events(
            "event: log\nid: 7\ndata: {\"n\":7,\"s\":\"stdout\",\"m\":\"seven\"}\n\nevent: eof\nid: 7!\ndata: {\"next\":7,\"state\":\"running\"}\n\n",
        ),
    });
    let databuild = Databuild::asking(&service.url);
    let done = databuild.run(&["logs", "--since-line", "5", "-n", "2", "r"]).code(0);
    assert_eq!(done.text(), "six\nseven\n");
    let requests = service.requests("/logs/stdout");
    assert!(requests[0].contains("since=5&lines=2"), "{requests:?}");
    assert!(requests[1].contains("since=6&lines=1"), "{requests:?}");
}

#[test]
fn holes_are_told_on_stderr_and_the_log_goes_on() {
    let service = Scripted::new(|head, _| match path(head) {
        "/api/job_runs/r" => run_document("r"),
        _ => events(
            "event: log\nid: 1\ndata: {\"n\":1,\"s\":\"stdout\",\"m\":\"one\"}\n\n\
             event: gap\nid: 13\ndata: {\"stream\":\"stdout\",\"from\":2,\"lines\":12,\"bytes\":3400,\"reason\":\"disk_full\"}\n\n\
             event: log\nid: 14\ndata: {\"n\":14,\"s\":\"stdout\",\"m\":\"fourteen\"}\n\n\
             event: evicted\nid: 14!\ndata: {\"id\":\"r\",\"evicted_at\":\"2026-01-01T00:00:00Z\",\"reason\":\"too old\",\"lines\":14,\"bytes\":1}\n\n",
        ),
    });
    let databuild = Databuild::asking(&service.url);
    let done = databuild
        .run(&["logs", "-f", "r"])
        .code(3)
        .says("-- 12 lines of stdout (3.4 kB) were not kept: disk full --")
        .says("run r was evicted at 2026-01-01T00:00:00.000000Z: too old");
    assert_eq!(done.text(), "one\nfourteen\n");
}

/// A service that says nothing new to one who has seen the end: 204.
#[test]
fn an_end_that_was_seen_already_is_an_end() {
    let service = Scripted::new(|head, _| match path(head) {
        "/api/job_runs/r" => run_document("r"),
        _ => b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n".to_vec(),
    });
    let databuild = Databuild::asking(&service.url);
    databuild.run(&["logs", "-f", "r"]).code(0).says("run r succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_viewer_and_never_the_run() {
    let setup = Setup::new().await;
    setup.out("r", "line\n");
    let mut follower = setup.databuild.start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), "line");
    follower.signal(Signal::INT);
    let done = follower.done().code(130);
    assert_eq!(done.stderr, "");
    assert_eq!(setup.store.run(&run_id("r")).unwrap().state.kind(), StateKind::Running);
}

/// With nobody reading and a full pipe, the viewer is stuck in a write.
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_viewer_that_nobody_reads_from() {
    let setup = Setup::new().await;
    setup.out("r", numbers(100_000));
    let mut child = setup.databuild.command(&["logs", "-f", "r"]).spawn().unwrap();
    let out = child.stdout.take().unwrap();
    // Each write begins a page of the pipe if it does not fit into the last one: up to half of them stays empty.
    let half = rustix::pipe::fcntl_getpipe_size(&out).unwrap() as u64 / 2 - 4096;
    let waiting = || rustix::io::ioctl_fionread(&out).unwrap();
    until(
        || {
            let before = waiting();
            std::thread::sleep(std::time::Duration::from_millis(100));
            before >= half && waiting() == before
        },
        || format!("the pipe does not fill up: {} bytes", waiting()),
    );
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_of_a_silent_run_ends_with_its_reader() {
    let setup = Setup::new().await;
    setup.out("r", "line\n");
    let mut child = setup.databuild.command(&["logs", "-f", "r"]).spawn().unwrap();
    assert_eq!(head(child.stdout.take().unwrap()), "line\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn who_chose_a_service_is_not_left_waiting_in_a_folder() {
    let databuild = Databuild::asking(NOBODY);
    databuild.run(&["logs", "-f", "later"]).code(5).says("no service answers at http://127.0.0.1:1");
}

fn run_document(id: &str) -> Vec<u8> {
    let document = format!(
        "{{\"job_run_id\":\"{id}\",\"state\":\"succeeded\",\"exit_code\":0,\
         \"started_at\":\"2026-01-01T00:00:00Z\",\"finished_at\":\"2026-01-01T00:00:01Z\"}}"
    );
    answer("200 OK", "application/json", &document)
}
