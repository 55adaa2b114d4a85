//! A reader that disconnects at any byte and resumes misses nothing and repeats nothing.

use std::sync::Arc;

use databuild_logs::{LogStore, MemoryLogStore, ServerOptions, Stream};
use proptest::prelude::*;

use super::{exited, finished, id, numbered, running};
use crate::support::http::{ANY_PORT, Server};
use crate::support::sse::{Event, Parser};

const STDOUT: &str = "/api/job_runs/r/logs/stdout";

fn ids(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.id.as_str()).collect()
}

#[tokio::test]
async fn resuming_at_every_id_goes_on_behind_it() {
    let server = Server::start(finished(&numbered(12))).await;
    for target in [STDOUT.to_owned(), format!("{STDOUT}?follow=true&lines=3"), format!("{STDOUT}?since=11")] {
        for seen in 0..=12_u64 {
            let events = server.get_with(&target, &[("Last-Event-ID", &seen.to_string())]).await.events();
            let mut expected: Vec<String> = (seen + 1..=12).map(|n| n.to_string()).collect();
            expected.push("12!".to_owned());
            assert_eq!(ids(&events), expected, "{target} after {seen}");
        }
    }
}

#[tokio::test]
async fn a_window_that_is_resumed_ends_where_it_would_have() {
    let server = Server::start(finished(&numbered(12))).await;
    for (query, seen, expected) in [
        ("?since=2&lines=5", "4", vec!["5", "6", "7", "7!"]),
        ("?since=2&lines=5", "7", vec!["7!"]),
        ("?since=2&lines=5", "9", vec!["9!"]),
        ("?lines=3", "10", vec!["11", "12", "12!"]),
        ("?since_time=2020-01-01T00:00:00Z&lines=3", "1", vec!["2", "3", "3!"]),
        ("?since_time=2020-01-01T00:00:00Z&lines=3", "3", vec!["3!"]),
        ("?lines=0", "10", vec!["10!"]),
    ] {
        let events = server.get_with(&format!("{STDOUT}{query}"), &[("Last-Event-ID", seen)]).await.events();
        assert_eq!(ids(&events), expected, "{query} after {seen}");
    }
}

#[tokio::test]
async fn after_the_end_there_is_nothing_to_reconnect_for() {
    let server = Server::start(finished(b"x\n")).await;
    for target in [STDOUT, "/api/job_runs/r/logs/all", "/api/job_runs/unknown/logs/stdout"] {
        let answer = server.get_with(target, &[("Last-Event-ID", "1!")]).await;
        assert_eq!((answer.status, answer.body.len()), (204, 0));
    }
}

#[tokio::test]
async fn a_last_event_id_that_is_none_is_named() {
    let server = Server::start(finished(b"x\n")).await;
    for bad in ["x", "!", "-1", "1!!", "1.5", "18446744073709551616"] {
        let problem = server.get_with(STDOUT, &[("Last-Event-ID", bad)]).await.problem(400);
        assert_eq!(problem.parameter.as_deref(), Some("Last-Event-ID"), "{bad}");
    }
    assert_eq!(server.get_with(STDOUT, &[("Last-Event-ID", "")]).await.events().len(), 2);
}

#[tokio::test]
async fn an_id_beyond_the_end_waits_or_ends() {
    let server = Server::start(finished(b"x\n")).await;
    let events = server.get_with(STDOUT, &[("Last-Event-ID", "99")]).await.events();
    assert_eq!(ids(&events), ["99!"]);

    let store = running(b"x\n");
    let server = Server::start(store.clone()).await;
    let mut follower = server.open(&format!("{STDOUT}?follow=true"), &[("Last-Event-ID", "2")]).await;
    store.append(&id("r"), Stream::Stdout, b"y\nz\n").unwrap();
    assert_eq!(follower.events_until(|_| true).await[0].data, "z");
}

#[tokio::test]
async fn a_follower_of_new_lines_only_that_is_cut_off_before_the_first_one_misses_nothing() {
    for (query, seen) in [("follow=true&lines=0", 2), ("follow=true&since_time=2999-01-01T00:00:00Z", 2)] {
        let store = running(b"1\n2\nunfinished");
        let server = Server::start(store.clone()).await;
        let target = format!("{STDOUT}?{query}");
        let mut follower = server.open(&target, &[]).await;
        let mut parser = Parser::default();
        while parser.last_id.is_empty() {
            assert_eq!(parser.feed(&follower.piece().await.unwrap()), []);
        }
        assert_eq!(parser.last_id, seen.to_string(), "{query}");
        drop(follower);
        store.append(&id("r"), Stream::Stdout, b" line\n4\n").unwrap();
        store.finish(&id("r"), exited(0)).unwrap();
        let events = server.get_with(&target, &[("Last-Event-ID", &parser.last_id)]).await.events();
        let data: Vec<_> = events.iter().map(|event| event.data.as_str()).collect();
        assert_eq!(data[..2], ["unfinished line", "4"], "{query}");
    }
}

/// What a browser gathers that loses its connection after these many bytes, once and again, until the end.
async fn gather(server: &Server, target: &str, cuts: impl IntoIterator<Item = usize>) -> Vec<Event> {
    let mut cuts = cuts.into_iter();
    let mut events = Vec::new();
    let mut last_id = String::new();
    loop {
        let headers = [("Last-Event-ID", last_id.as_str())];
        let mut answering = server.open(target, if last_id.is_empty() { &[] } else { &headers }).await;
        if answering.answer.status == 204 {
            return events;
        }
        assert_eq!(answering.answer.status, 200);
        let mut parser = Parser::resumed(&last_id);
        let mut left = cuts.next().unwrap_or(usize::MAX);
        while let Some(piece) = answering.piece().await {
            let piece = &piece[..piece.len().min(left)];
            left -= piece.len();
            events.extend(parser.feed(piece));
            if left == 0 {
                break;
            }
        }
        last_id = parser.last_id;
    }
}

#[tokio::test]
async fn cut_at_every_byte_nothing_is_missed_or_repeated() {
    let printed = b"one\n\ntwo \xff\r\nthree\rand\n\x00\n1234567 \xe6\x97\xa5\nseven\neight\nnine\nten\nend";
    let server = Server::start(finished(printed)).await;
    for target in [STDOUT.to_owned(), format!("{STDOUT}?format=json&follow=true")] {
        let body = server.get(&target).await.body;
        let whole = Parser::default().feed(&body);
        for cut in 1..=body.len() {
            assert_eq!(gather(&server, &target, [cut]).await, whole, "cut after {cut} bytes");
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_log_cut_anywhere_comes_exactly_once(
        stdout in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b'\r')], 0..400),
        stderr in proptest::collection::vec(prop_oneof![32..127u8, Just(b'\n')], 0..100),
        cuts in proptest::collection::vec(1..300usize, 0..20),
        query in prop_oneof![Just(""), Just("?format=json"), Just("?follow=true"), Just("?since=3"), Just("?lines=5")],
        view in prop_oneof![Just("stdout"), Just("all")],
    ) {
        runtime().block_on(async {
            let store = MemoryLogStore::new();
            for (out, err) in stdout.chunks(40).zip(stderr.chunks(10).chain(std::iter::repeat(&[][..]))) {
                store.append(&id("r"), Stream::Stdout, out).unwrap();
                store.append(&id("r"), Stream::Stderr, err).unwrap();
            }
            store.append(&id("r"), Stream::Stdout, b"").unwrap();
            store.finish(&id("r"), exited(0)).unwrap();
            let server = Server::start(store).await;
            let target = format!("/api/job_runs/r/logs/{view}{query}");
            let whole = server.get(&target).await.events();
            assert_eq!(gather(&server, &target, cuts).await, whole);
        });
    }

    #[test]
    fn a_run_that_is_followed_while_it_is_written_comes_exactly_once(
        cuts in proptest::collection::vec(1..2000usize, 0..12),
        pieces in proptest::collection::vec(1..200usize, 1..10),
    ) {
        runtime().block_on(async {
            let store = Arc::new(MemoryLogStore::new());
            let server = Server::start_at(ANY_PORT, store.clone(), ServerOptions::default()).await;
            let printed = numbered(400);
            let writer = tokio::task::spawn_blocking(move || {
                let mut rest = &printed[..];
                for piece in pieces.iter().cycle() {
                    let (now, later) = rest.split_at(rest.len().min(*piece));
                    store.append(&id("r"), Stream::Stdout, now).unwrap();
                    std::thread::yield_now();
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
                store.finish(&id("r"), exited(0)).unwrap();
            });
            let events = gather(&server, &format!("{STDOUT}?follow=true"), cuts).await;
            writer.await.unwrap();
            let texts: Vec<String> = events.iter().map(|event| event.data.clone()).collect();
            let expected: Vec<String> = (1..=400).map(|n| n.to_string()).collect();
            assert_eq!(texts[..400], expected);
            assert_eq!((texts.len(), events[400].name.as_str()), (401, "complete"));
        });
    }
}
