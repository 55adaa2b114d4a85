//! What goes wrong is said in a line, with what to do about it, and by the exit code.

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use super::{Setup, exited};
use crate::support::cli::{Databuild, NOBODY, Scripted, answer, events, path};
use crate::support::http::Server;

#[test]
fn what_does_not_parse_is_named() {
    let databuild = Databuild::asking(NOBODY);
    for (args, named) in [
        (&["logs"][..], "<RUN>"),
        (&["logs", "r", "-n", "x"], "expected a number of lines, or all"),
        (&["logs", "r", "-n", "-1"], "--tail"),
        (&["logs", "r", "--since-line", "x"], "'--since-line <N>': expected a line number"),
        (&["logs", "r", "--since-line", "-3"], "'--since-line <N>': expected a line number"),
        (&["gc", "--keep-last", "many"], "'--keep-last <N>': expected a number of runs"),
        (&["logs", "r", "-o", "yaml"], "[possible values: text, json, raw]"),
        (&["logs", "r", "--stdout", "--stderr"], "--stderr"),
        (&["logs", "r", "--all", "--stderr"], "--all"),
        (&["logs", "r", "--color", "blue"], "--color"),
        (&["logs", "a/b"], "\"a/b\" is not a run id: only A-Z"),
        (&["logs", "../etc"], "\"../etc\" is not a run id: it starts with '.'"),
        (&["logs", ""], "\"\" is not a run id: it is empty"),
        (&["logs", "r", "--server", "nowhere"], "--server is \"nowhere\""),
        (&["logs", "r", "--server", "https://x"], "--server is \"https://x\": https is not built in"),
        (&["runs", "--limit", "0"], "--limit"),
        (&["runs", "--state", "bored"], "expected running, succeeded, failed, cancelled or lost"),
        (&["runs", "-o", "raw"], "[possible values: text, json]"),
        (&["serve", "--listen", "7780"], "--listen is \"7780\": expected an address and a port"),
        (&["unknown"], "unknown"),
    ] {
        let done = databuild.run(args).code(2).says(named);
        assert_eq!(done.text(), "", "{args:?}");
    }
}

#[test]
fn a_variable_that_does_not_parse_is_named() {
    let with = |name, value| Databuild::asking(NOBODY).with(name, value);
    with("DATABUILD_LOG_SERVER", "ftp://x")
        .run(&["runs"])
        .code(2)
        .says("DATABUILD_LOG_SERVER is \"ftp://x\"");
    with("DATABUILD_LOG_LISTEN", "x").run(&["serve"]).code(2).says("DATABUILD_LOG_LISTEN is \"x\"");
    with("DATABUILD_LOG_LEVEL", "a=b=c").run(&["serve"]).code(2).says("DATABUILD_LOG_LEVEL is \"a=b=c\"");
    for level in ["verbose", "warning", "trace=", "info,databuild_logs"] {
        let refused = format!("DATABUILD_LOG_LEVEL is {level:?}: expected error, warn, info");
        for verb in ["serve", "runs"] {
            with("DATABUILD_LOG_LEVEL", level).run(&[verb]).code(2).says(&refused);
        }
    }
    let done = with("DATABUILD_LOG_TOKEN", "two words").run(&["runs"]).code(2).says("DATABUILD_LOG_TOKEN");
    assert!(!done.stderr.contains("two words"), "a token is never shown: {}", done.stderr);
}

/// Standard error has no buffer, and others may write to it too.
#[test]
fn a_line_on_standard_error_is_one_write() {
    let (said, stderr) = UnixDatagram::pair().unwrap();
    let databuild = Databuild::new();
    let mut command = databuild.command(&["gc", "--log-dir", "/nonexistent"]);
    assert_eq!(command.stderr(OwnedFd::from(stderr)).status().unwrap().code(), Some(1));
    said.set_nonblocking(true).unwrap();
    let mut written = [0; 1000];
    let length = said.recv(&mut written).unwrap();
    let line = "databuild: the log folder /nonexistent does not exist\n";
    assert_eq!(String::from_utf8_lossy(&written[..length]), line);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_nobody_knows_is_not_found() {
    let setup = Setup::new().await;
    let nothing =
        setup.databuild.run(&["logs", "latest"]).code(3).says("there is no run in the service at http://");
    assert_eq!(nothing.text(), "");
    setup.finished("known", "x\n");
    setup
        .databuild
        .run(&["logs", "unknown"])
        .code(3)
        .says("there is no run unknown in the service at http://");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_beginning_that_fits_several_runs_lists_them() {
    let setup = Setup::new().await;
    for n in 1..=12 {
        setup.finished(&format!("run-{n}"), "x\n");
    }
    setup.finished("ru", "x\n");
    let done = setup.databuild.run(&["logs", "run-"]).code(2).says("more than one run begins with run-");
    assert_eq!(done.stderr.lines().filter(|line| line.starts_with("  run-")).count(), 10, "{}", done.stderr);
    assert!(done.stderr.ends_with("… and more\n"), "{}", done.stderr);
    let done = setup.databuild.run(&["logs", "-f", "run-1"]);
    assert_eq!(done.code(0).text(), "x\n", "an id is an id, whatever else begins so");
}

#[test]
fn a_service_that_is_not_there_is_unreachable() {
    let databuild = Databuild::asking(NOBODY);
    for args in [&["logs", "r"][..], &["logs", "latest"], &["logs", "-f", "--no-wait", "r"]] {
        databuild
            .run(args)
            .code(5)
            .says("databuild: no service answers at http://127.0.0.1:1: ")
            .says("the folder ")
            .says("hint: is the service running? `databuild serve` starts one");
    }
    for databuild in [Databuild::asking(NOBODY), Databuild::new()] {
        let databuild = databuild.with("DATABUILD_LOG_DIR", "/nonexistent/logs");
        for args in [&["logs", "r", "--server", NOBODY][..], &["runs", "--server", NOBODY]] {
            let gone = databuild.run(args).code(5).says("no service answers at http://127.0.0.1:1");
            gone.says("the log folder /nonexistent/logs does not exist");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_given_by_hand_that_is_not_there_is_named_whatever_the_service_knows() {
    let setup = Setup::new().await;
    setup.finished("r", "x\n");
    for args in [&["logs", "r"][..], &["logs", "-f", "r"], &["runs"], &["runs", "pin", "r"]] {
        let done = setup.databuild.run(&[args, &["--log-dir", "/nonexistent/logs"]].concat()).code(1);
        assert_eq!(
            done.says("databuild: --log-dir is /nonexistent/logs: there is no such folder").text(),
            ""
        );
    }
    let in_environment = Databuild::asking(format!("http://{}", setup.server.address));
    in_environment.with("DATABUILD_LOG_DIR", "/nonexistent/logs").run(&["logs", "r"]).code(0);
}

#[test]
fn a_log_folder_that_is_a_file_is_said_to_be_one() {
    let databuild = Databuild::asking(NOBODY);
    let file = databuild.home.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let done = databuild.run(&["--log-dir", file.to_str().unwrap(), "runs"]).code(1);
    done.says("--log-dir is ").says("it is not a folder");
}

#[test]
fn a_server_that_is_not_ours_is_told_from_one_that_is() {
    let page = Scripted::new(|_, _| answer("200 OK", "text/html; charset=utf-8", "<html>"));
    let missing = Scripted::new(|_, _| answer("404 Not Found", "text/plain", "what?"));
    let elsewhere = Scripted::new(|_, _| {
        b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            .to_vec()
    });
    let bare =
        Scripted::new(|_, _| b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec());
    for service in [page, missing, elsewhere, bare] {
        for verb in [&["logs", "r"][..], &["logs", "-f", "r"]] {
            let done = Databuild::asking(&service.url).run(verb).code(5);
            done.says("is not a databuild log service").says("hint: --server or DATABUILD_LOG_SERVER");
        }
    }
}

#[test]
fn a_server_that_speaks_no_http_is_not_ours() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        // Kept open: it is what it says that gives it away.
        let mut open = Vec::new();
        for mut connection in listener.incoming().map_while(Result::ok) {
            drop(connection.write_all(b"SSH-2.0-x\r\n"));
            open.push(connection);
        }
    });
    let answering = Scripted::new(|_, _| b"+OK what do you mean?\r\n".to_vec());
    for url in [url, answering.url] {
        let done = Databuild::asking(url).run(&["logs", "r"]).code(5);
        done.says("is not a databuild log service: it does not speak HTTP");
    }
}

#[test]
fn a_service_that_breaks_off_for_good_is_unreachable_for_who_does_not_follow() {
    let service = Scripted::new(|head, _| match path(head) {
        "/api/job_runs/r" => answer("200 OK", "application/json", r#"{"job_run_id":"r","exit_code":0}"#),
        _ => events("retry: 1\nevent: log\nid: 1\ndata: {\"n\":1,\"s\":"),
    });
    let done = Databuild::asking(&service.url).run(&["logs", "r"]).code(5).says("no service answers at");
    assert_eq!(done.text(), "");
    assert!(service.requests("/stdout").len() > 3, "it tries for a while");
}

#[test]
fn what_is_not_the_protocol_is_said_and_not_shown() {
    let service = Scripted::new(|head, _| match path(head) {
        "/api/job_runs/r" => answer("200 OK", "application/json", r#"{"job_run_id":"r","exit_code":0}"#),
        _ => events("event: log\nid: x\ndata: {\"n\":1,\"s\":\"stdout\",\"m\":\"a\"}\n\n"),
    });
    let done = Databuild::asking(&service.url).run(&["logs", "-f", "r"]).code(1);
    done.says("do not understand each other").says("\"x\"");
}

#[test]
fn a_run_that_was_evicted_says_when_and_why() {
    let service = Scripted::new(|_, _| {
        let problem = r#"{"type":"evicted","title":"Gone","status":410,"detail":"gone","tombstone":{"id":"r",
            "evicted_at":"2026-01-01T00:00:00Z","reason":"older than 7 days","lines":1,"bytes":2}}"#;
        answer("410 Gone", "application/problem+json", problem)
    });
    let done = Databuild::asking(&service.url).run(&["logs", "r"]).code(3);
    done.says("run r was evicted at 2026-01-01T00:00:00.000000Z: older than 7 days");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_wanted_is_asked_for() {
    let options = databuild_logs::ServerOptions { token: Some("secret".to_owned()), ..Default::default() };
    let store = databuild_logs::MemoryLogStore::new();
    databuild_logs::LogStore::append_stdout(&store, "r", "line").unwrap();
    databuild_logs::LogStore::finish(&store, &super::run_id("r"), databuild_logs::RunEnd::now(exited(0)))
        .unwrap();
    let server = Server::start_with(store, options).await;
    let databuild = || Databuild::asking(format!("http://{}", server.address));
    databuild().run(&["logs", "r"]).code(1).says("refuses the token").says("DATABUILD_LOG_TOKEN");
    databuild().with("DATABUILD_LOG_TOKEN", "wrong").run(&["runs"]).code(1).says("refuses the token");
    let done = databuild().with("DATABUILD_LOG_TOKEN", "secret").run(&["logs", "r"]).code(0);
    assert_eq!(done.text(), "line\n");
}
