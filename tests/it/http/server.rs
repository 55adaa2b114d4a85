//! Streams that are open for long: waiting, heartbeats, slow clients, the shutdown.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use databuild_logs::{LogStore, MemoryLogStore, ReadEvent, ServerOptions, Stream};

use super::{exited, finished, id, running};
use crate::support::address::HeldAddress;
use crate::support::http::Server;
use crate::support::stores::{Reopened, Scripted, batch};

const FOLLOW: &str = "/api/job_runs/r/logs/stdout?follow=true";

fn heartbeat(every: Duration) -> ServerOptions {
    ServerOptions { heartbeat: every, ..ServerOptions::default() }
}

#[tokio::test]
async fn a_run_that_has_not_started_is_waited_for_with_heartbeats() {
    let store = MemoryLogStore::new();
    let server = Server::start_with(store.clone(), heartbeat(Duration::from_millis(5))).await;
    server.get("/api/job_runs/r/logs/stdout").await.problem(404);
    let mut follower = server.open(FOLLOW, &[]).await;
    assert_eq!(follower.answer.status, 200, "the head does not wait");
    for _ in 0..3 {
        assert_eq!(follower.piece().await.as_deref(), Some(&b":\n\n"[..]));
    }
    store.append(&id("r"), Stream::Stdout, b"at last\n").unwrap();
    let events = follower.events_until(|_| true).await;
    assert_eq!(events[0].data, "at last");
    store.finish(&id("r"), exited(0)).unwrap();
    assert_eq!(follower.events_until(|_| true).await[0].name, "complete");
    assert_eq!(follower.piece().await, None, "the response ends");
}

#[tokio::test]
async fn a_line_is_sent_when_it_is_there_and_heartbeats_stay_comments() {
    let store = running(b"1\n");
    let server = Server::start_with(store.clone(), heartbeat(Duration::from_millis(5))).await;
    let mut follower = server.open(FOLLOW, &[]).await;
    for n in 2..50_u64 {
        let events = follower.events_until(|_| true).await;
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0].data, (n - 1).to_string());
        store.append(&id("r"), Stream::Stdout, format!("{n}\n").as_bytes()).unwrap();
    }
}

#[tokio::test]
async fn only_new_lines_are_followed_with_no_backlog() {
    let store = running(b"old\n");
    let server = Server::start_with(store.clone(), heartbeat(Duration::from_millis(5))).await;
    let mut follower = server.open(&format!("{FOLLOW}&lines=0"), &[]).await;
    // Where the read begins is told at once, so that it can be resumed there; then there is silence.
    assert_eq!(follower.piece().await.as_deref(), Some(&b"id: 1\n\n"[..]));
    assert_eq!(follower.piece().await.as_deref(), Some(&b":\n\n"[..]));
    store.append(&id("r"), Stream::Stdout, b"new\n").unwrap();
    let event = follower.events_until(|_| true).await.remove(0);
    assert_eq!((event.data.as_str(), event.id.as_str()), ("new", "2"));
}

/// The most bytes that the system holds for one end of a connection.
fn largest_buffer(setting: &str) -> usize {
    let sizes = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{setting}")).unwrap();
    sizes.split_whitespace().next_back().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_client_that_stops_reading_stops_its_own_reading_and_nothing_else() {
    const LINE: usize = 1 << 16;
    let text = [&[b'x'; LINE - 1][..], b"\n"].concat();
    let endless =
        Scripted::new(move |index| Some(Ok(ReadEvent::Lines(batch(index as u64 + 1, text.clone())))));
    let pulled = Arc::clone(&endless.pulled);
    let server = Server::start(endless).await;
    let mut stalled = server.open(FOLLOW, &[]).await;
    stalled.piece().await.expect("it begins");

    // Another client reads far more than the buffers of two sockets hold.
    let mut reader = server.open(FOLLOW, &[]).await;
    let mut received = 0;
    while received < 256 << 20 {
        received += reader.piece().await.expect("it goes on").len();
    }
    let by_reader = received / LINE;
    drop(reader);
    // What the reader did not get any more is counted with it: two sockets' buffers at their largest.
    let by_stalled = pulled.load(Ordering::SeqCst) - by_reader;
    let bound = (8 << 20) + 2 * (largest_buffer("tcp_rmem") + largest_buffer("tcp_wmem"));
    assert!(by_stalled * LINE < bound, "{by_stalled} batches were pulled beside the {by_reader} read");
    assert_eq!(server.get("/healthz").await.text(), "ok");
}

#[tokio::test]
async fn the_shutdown_ends_streams_with_an_event() {
    let server = Server::start(running(b"1\n")).await;
    let mut backlog = server.open(FOLLOW, &[]).await;
    let mut waiting = server.open("/api/job_runs/later/logs/stdout?follow=true", &[]).await;
    assert_eq!(backlog.events_until(|_| true).await[0].data, "1");
    let address = server.address;
    let stopping = tokio::spawn(server.stop());
    for stream in [&mut backlog, &mut waiting] {
        let end = stream.events_until(|_| true).await.remove(0);
        assert_eq!((end.name.as_str(), end.data.as_str()), ("shutdown", "{}"));
        assert_eq!(stream.piece().await, None, "the response ends as it should");
    }
    stopping.await.unwrap().unwrap();
    let refused = tokio::net::TcpStream::connect(address).await.map(drop).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::ConnectionRefused));
}

#[tokio::test]
async fn a_client_that_does_not_come_to_its_end_is_dropped() {
    let text = [&[b'x'; 65_535][..], b"\n"].concat();
    let endless =
        Scripted::new(move |index| Some(Ok(ReadEvent::Lines(batch(index as u64 + 1, text.clone())))));
    let options = ServerOptions { drain: Duration::from_millis(20), ..ServerOptions::default() };
    let server = Server::start_with(endless, options).await;
    let mut stalled = server.open(FOLLOW, &[]).await;
    stalled.piece().await.expect("it begins");
    server.stop().await.unwrap();
    let end = loop {
        match stalled.try_piece().await {
            Ok(Some(_)) => {}
            other => break other.map_err(|error| error.kind()),
        }
    };
    assert_eq!(end, Err(ErrorKind::UnexpectedEof), "cut off, not ended");
}

#[tokio::test]
async fn followers_go_on_at_the_next_server() {
    let store = Arc::new(Reopened::new());
    store.append(&id("r"), Stream::Stdout, b"1\n").unwrap();
    let held = HeldAddress::any();
    let server = Server::start_at(held.address, store.clone(), ServerOptions::default()).await;
    let mut follower = server.open(FOLLOW, &[]).await;
    assert_eq!(follower.events_until(|_| true).await[0].data, "1");
    let stopping = tokio::spawn(server.stop());
    let end = follower.events_until(|_| true).await.remove(0);
    assert_eq!((end.name.as_str(), end.id.as_str()), ("shutdown", "1"), "the id stays");
    stopping.await.unwrap().unwrap();

    store.append(&id("r"), Stream::Stdout, b"2\n").unwrap();
    let server = Server::start_at(held.address, store, ServerOptions::default()).await;
    let mut follower = server.open(FOLLOW, &[("Last-Event-ID", &end.id)]).await;
    assert_eq!(follower.events_until(|_| true).await[0].data, "2");
}

#[tokio::test]
async fn ready_is_said_while_the_store_answers() {
    let server = Server::start(MemoryLogStore::new()).await;
    for target in ["/healthz", "/readyz"] {
        let answer = server.get(target).await;
        assert_eq!((answer.status, answer.text()), (200, "ok"));
    }
}

#[tokio::test]
async fn others_are_served_with_a_token_only() {
    let everywhere = "0.0.0.0:0".parse().unwrap();
    let listener = databuild_logs::listen(everywhere).unwrap();
    let store = Arc::new(MemoryLogStore::new());
    let refused = databuild_logs::serve(listener, store, ServerOptions::default(), async {}).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);

    let options = ServerOptions { token: Some("t".into()), ..ServerOptions::default() };
    let server = Server::start_at(everywhere, Arc::new(finished(b"x\n")), options).await;
    let headers = [("Host", "build-7.example"), ("Authorization", "Bearer t")];
    assert_eq!(server.get_with("/api/job_runs/r", &headers).await.status, 200);
}

#[tokio::test]
async fn the_router_alone_fits_into_another_server() {
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt;
    let router = databuild_logs::router(Arc::new(finished(b"x\n")), ServerOptions::default());
    let request = Request::get("/api/job_runs/r").header("Host", "any.example").body(Body::empty()).unwrap();
    assert_eq!(router.oneshot(request).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_signal_to_stop_is_seen() {
    let stop = databuild_logs::stop_signal().unwrap();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
    stop.await;
}
