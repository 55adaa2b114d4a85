//! Parameters, statuses, lists: everything that is not a stream.

use databuild_logs::{
    JobMetadata, LogError, LogStore, MemoryLogStore, RunList, RunSpec, ServerOptions, StateKind,
};

use super::{exited, finished, id, numbered, running};
use crate::support::http::Server;
use crate::support::stores::Scripted;

const STDOUT: &str = "/api/job_runs/r/logs/stdout";

/// The texts of the lines, and the name of the event that ended them.
async fn lines(server: &Server, query: &str) -> (Vec<String>, String) {
    let mut events = server.get(&format!("{STDOUT}{query}")).await.events();
    let end = events.pop().expect("there is an end");
    (events.into_iter().map(|event| event.data).collect(), end.name)
}

fn texts(numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    numbers.into_iter().map(|n| n.to_string()).collect()
}

#[tokio::test]
async fn since_and_lines_choose_the_lines() {
    let server = Server::start(finished(&numbered(10))).await;
    for (query, expected) in [
        ("", 1..=10),
        ("?since=0", 1..=10),
        ("?since=7", 8..=10),
        ("?lines=3", 8..=10),
        ("?lines=30", 1..=10),
        ("?since=2&lines=3", 3..=5),
        ("?since=8&lines=30", 9..=10),
        ("?follow=false&since=9", 10..=10),
        ("?since_time=1970-01-01T00:00:00Z&lines=2", 1..=2),
        ("?unknown=parameter&since=9", 10..=10),
        // Following a run that is over ends like reading it.
        ("?follow=true", 1..=10),
        ("?follow=1&lines=2", 9..=10),
        ("?follow=true&lines=9&since=8", 9..=10),
    ] {
        assert_eq!(lines(&server, query).await, (texts(expected), "complete".to_owned()), "{query}");
    }
    for query in [
        "?lines=0",
        "?since=10",
        "?since=99",
        "?since=18446744073709551615",
        "?since_time=2999-01-01T00:00:00Z",
    ] {
        assert_eq!(lines(&server, query).await, (Vec::new(), "complete".to_owned()), "{query}");
    }
}

#[tokio::test]
async fn without_follow_a_run_that_goes_on_ends_with_eof() {
    let server = Server::start(running(&numbered(5))).await;
    let events = server.get(&format!("{STDOUT}?since=1&lines=2")).await.events();
    let seen: Vec<_> = events.iter().map(|event| (event.name.as_str(), event.id.as_str())).collect();
    assert_eq!(seen, [("log", "2"), ("log", "3"), ("eof", "3!")]);
    assert_eq!(events[2].data, r#"{"next":3,"state":"running"}"#);
}

#[tokio::test]
async fn a_bad_parameter_is_named() {
    let server = Server::start(finished(b"x\n")).await;
    for (target, parameter) in [
        ("/logs/stdout?since=x", "since"),
        ("/logs/stdout?since=-1", "since"),
        ("/logs/stdout?since=%2B1", "since"),
        ("/logs/stdout?since=", "since"),
        ("/logs/stdout?since=1&since=1", "since"),
        ("/logs/stdout?lines=1.5", "lines"),
        ("/logs/stdout?lines=18446744073709551616", "lines"),
        ("/logs/stdout?follow=yes", "follow"),
        ("/logs/stdout?format=xml", "format"),
        ("/logs/stdout?since_time=yesterday", "since_time"),
        ("/logs/stdout?since_time=2026-01-31T10:42:00Z&since=1", "since_time"),
        ("/logs/stdout?since_time=2026-01-31T10:42:00Z&lines=1&follow=true", "lines"),
        ("/logs/stdout/raw?since=x", "since"),
        ("/logs/stdout/raw?lines=x", "lines"),
    ] {
        let problem = server.get(&format!("/api/job_runs/r{target}")).await.problem(400);
        assert_eq!(problem.parameter.as_deref(), Some(parameter), "{target}: {}", problem.detail);
        assert!(problem.detail.contains(parameter), "{target}: {}", problem.detail);
    }
    for (target, parameter) in [
        ("/api/job_runs?limit=0", "limit"),
        ("/api/job_runs?limit=1001", "limit"),
        ("/api/job_runs?limit=x", "limit"),
        ("/api/job_runs?cursor=x", "cursor"),
        ("/api/job_runs?state=finished", "state"),
        ("/api/job_runs?partition=a&partition=b", "partition"),
        ("/api/job_runs/..%2Fetc", "job_run_id"),
        ("/api/job_runs/-f/logs/stdout", "job_run_id"),
        ("/api/job_runs/%ff/logs/stdout", "job_run_id"),
        ("/api/job_runs/a%00b/logs/stdout/raw", "job_run_id"),
    ] {
        let problem = server.get(target).await.problem(400);
        assert_eq!(problem.parameter.as_deref(), Some(parameter), "{target}: {}", problem.detail);
    }
}

#[tokio::test]
async fn what_is_not_there_is_a_problem_too() {
    let server = Server::start(finished(b"x\n")).await;
    for target in ["/nothing", "/api", "/api/nothing", "/api/openapi.json", "/assets/nothing/more"] {
        let problem = server.get(&format!("{target}?x=1")).await.problem(404);
        assert_eq!(problem.detail, format!("nothing is at {target}"));
    }
    for target in [
        "/api/job_runs/other",
        "/api/job_runs/other/logs/stdout",
        "/api/job_runs/other/logs/stdout/raw",
        "/api/job_runs/r/logs/stdin",
        "/api/job_runs/r/logs/all/raw",
        "/assets/nothing.js",
    ] {
        server.get(target).await.problem(404);
    }
    for target in [STDOUT, "/api/job_runs", "/", "/healthz"] {
        let answer = server.request("POST", target, &[]).await;
        answer.problem(405);
        assert_eq!(answer.header("allow"), Some("GET,HEAD"), "{target}");
    }
}

#[tokio::test]
async fn the_errors_of_a_store_have_their_status() {
    type MakeError = fn() -> LogError;
    let cases: [(MakeError, u16, &str); 6] = [
        (|| LogError::Closed, 503, "shutting-down"),
        (|| LogError::Index { path: "i".into(), detail: "d".into() }, 503, "index"),
        (|| LogError::InUse { path: "i".into() }, 503, "in-use"),
        (|| LogError::Corrupt { path: "c".into(), what: "w".into() }, 500, "corrupt"),
        (|| LogError::Evicted(Box::new(tombstone())), 410, "evicted"),
        (
            || LogError::Inner {
                what: "the far one".into(),
                source: Box::new(LogError::NotFound { id: id("r") }),
            },
            404,
            "not-found",
        ),
    ];
    for (error, status, kind) in cases {
        let server = Server::start(Scripted::refusing(error)).await;
        let problem = server.get(STDOUT).await.problem(status);
        assert_eq!(problem.kind, kind);
        assert_eq!(problem.tombstone.is_some(), status == 410, "{kind}");
        server.get("/readyz").await.problem(503);
        assert_eq!(server.get("/healthz").await.status, 200);
    }
}

fn tombstone() -> databuild_logs::Tombstone {
    databuild_logs::Tombstone {
        id: id("r"),
        evicted_at: databuild_logs::UnixMicros(1),
        reason: "the log folder is over 10 GB".into(),
        lines: 1,
        bytes: 2,
    }
}

#[tokio::test]
async fn runs_are_listed_newest_first_in_pages() {
    let store = MemoryLogStore::new();
    for n in 0..7 {
        let mut spec = RunSpec::new(id(&format!("run-{n}"))).command(["make"]);
        spec.building_partitions = vec![if n % 2 == 0 { "data/even" } else { "data/odd" }.to_owned()];
        let writer = store.start(spec).unwrap();
        writer.finish(exited(if n == 3 { 1 } else { 0 })).unwrap();
    }
    let server = Server::start(store).await;
    let list = async |query: &str| -> (Vec<String>, Option<String>) {
        let answer = server.get(&format!("/api/job_runs{query}")).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
        let list: RunList = answer.json();
        (list.runs.iter().map(|run| run.id().to_string()).collect(), list.next)
    };

    let all = list("").await;
    assert_eq!(all.0, (0..7).rev().map(|n| format!("run-{n}")).collect::<Vec<_>>());
    assert_eq!(all.1, None);

    let mut paged = Vec::new();
    let mut query = "?limit=3".to_owned();
    let mut pages = 0;
    while let (page, Some(next)) = list(&query).await {
        assert_eq!(page.len(), 3);
        paged.extend(page);
        query = format!("?limit=3&cursor={next}");
        pages += 1;
    }
    paged.extend(list(&query).await.0);
    assert_eq!((paged, pages), (all.0, 2));

    assert_eq!(list("?state=failed").await.0, ["run-3"]);
    assert_eq!(list("?partition=data%2Fodd").await.0, ["run-5", "run-3", "run-1"]);
    assert_eq!(list("?partition=data/odd&state=succeeded&limit=1").await.0, ["run-5"]);
    assert_eq!(list("?id_prefix=run-3").await.0, ["run-3"]);
    assert_eq!(list("?state=lost").await, (Vec::new(), None));

    let run: JobMetadata = server.get("/api/job_runs/run-3").await.json();
    assert_eq!((run.id().as_str(), run.state.kind()), ("run-3", StateKind::Failed));
}

#[tokio::test]
async fn head_tells_what_get_would() {
    let server = Server::start(finished(b"x\n")).await;
    for target in [STDOUT, "/api/job_runs", "/api/job_runs/r/logs/stdout/raw", "/", "/healthz"] {
        let (head, get) = (server.request("HEAD", target, &[]).await, server.get(target).await);
        assert_eq!((head.status, head.header("content-type")), (get.status, get.header("content-type")));
        assert!(head.body.is_empty() && !get.body.is_empty(), "{target}");
    }
    server.request("HEAD", "/api/job_runs/other/logs/stdout", &[]).await;
}

#[tokio::test]
async fn every_answer_carries_the_headers_that_keep_a_page_safe() {
    let server = Server::start(finished(b"<script>\n")).await;
    for target in
        [STDOUT, "/api/job_runs", "/api/job_runs/r/logs/stdout/raw", "/", "/assets/app.js", "/nothing"]
    {
        let answer = server.get(target).await;
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{target}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{target}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{target}");
        assert_eq!(answer.header("access-control-allow-origin"), None, "{target}");
    }
    let stream = server.get(STDOUT).await;
    assert_eq!(stream.header("content-type"), Some("text/event-stream"));
    assert_eq!(stream.header("cache-control"), Some("no-cache, no-transform"));
    assert_eq!(stream.header("x-accel-buffering"), Some("no"));
}

#[tokio::test]
async fn the_pages_files_are_asked_for_again_and_not_sent_again() {
    let server = Server::start(MemoryLogStore::new()).await;
    let page = server.get("/").await;
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    let assets: Vec<&str> = page.text().split('"').filter(|text| text.starts_with("/assets/")).collect();
    assert!(assets.len() >= 3, "{assets:?}");
    for target in assets.into_iter().chain(["/"]) {
        let tag = server.get(target).await.header("etag").unwrap().to_owned();
        assert_eq!(server.get_with(target, &[("If-None-Match", &tag)]).await.status, 304, "{target}");
        assert_eq!(server.get_with(target, &[("If-None-Match", "\"old\"")]).await.status, 200, "{target}");
    }
}

#[tokio::test]
async fn on_loopback_only_names_of_loopback_are_served() {
    let server = Server::start(finished(b"x\n")).await;
    for target in [STDOUT, "/", "/healthz", "/nothing"] {
        let problem = server.get_with(target, &[("Host", "evil.example")]).await.problem(403);
        assert_eq!(problem.kind, "foreign-host");
        let host = format!("localhost:{}", server.address.port());
        assert_ne!(server.get_with(target, &[("Host", &host)]).await.status, 403);
    }
}

/// Probes that speak HTTP/1.0 name no host; a browser always does.
#[tokio::test]
async fn on_loopback_who_names_no_host_is_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::start(finished(b"x\n")).await;
    for target in ["/healthz", "/readyz", "/api/job_runs"] {
        let mut probe = tokio::net::TcpStream::connect(server.address).await.unwrap();
        probe.write_all(format!("GET {target} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{target}: {answer}");
    }
}

#[tokio::test]
async fn a_token_is_wanted_on_the_api_alone() {
    let options = ServerOptions { token: Some("s3cret".into()), ..ServerOptions::default() };
    let server = Server::start_with(finished(b"x\n"), options).await;
    for target in [STDOUT, "/api/job_runs", "/api/job_runs/r", "/api/nothing"] {
        for given in [&[][..], &[("Authorization", "Bearer s3cre")], &[("Authorization", "Basic s3cret")]] {
            let answer = server.get_with(target, given).await;
            assert_eq!(answer.problem(401).kind, "unauthorized");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
        let status = server.get_with(target, &[("Authorization", "Bearer s3cret")]).await.status;
        assert_eq!(status, if target.ends_with("nothing") { 404 } else { 200 });
    }
    for target in ["/", "/assets/app.js", "/healthz", "/readyz"] {
        assert_eq!(server.get(target).await.status, 200, "{target}");
    }
}

#[test]
fn options_do_not_show_the_token() {
    let options = ServerOptions { token: Some("s3cret".into()), ..ServerOptions::default() };
    assert!(!format!("{options:?}").contains("s3cret"));
}
