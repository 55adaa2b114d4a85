//! The frames, byte for byte.

use databuild_logs::{
    Batch, CutLine, Gap, GapReason, LineNumber, LogError, LogLine, LogStore, MemoryLogStore, ReadEnd,
    ReadEvent, Stream, Tombstone, UnixMicros,
};

use super::{exited, finished, id, running};
use crate::support::http::Server;
use crate::support::stores::{Scripted, batch};

const STDOUT: &str = "/api/job_runs/r/logs/stdout";

/// The body of a finished run that printed this, without its `complete` event.
async fn body_of(stdout: &[u8]) -> String {
    let answer = Server::start(finished(stdout)).await.get(STDOUT).await;
    assert_eq!(answer.status, 200);
    let text = answer.text().to_owned();
    let end = text.find("event: complete\n").expect("a finished run ends with complete");
    text[..end].to_owned()
}

#[tokio::test]
async fn a_line_is_an_event_with_its_number() {
    assert_eq!(
        body_of(b"first\nsecond\n").await,
        "retry: 1000\nevent: log\nid: 1\ndata: first\n\nevent: log\nid: 2\ndata: second\n\n"
    );
}

#[tokio::test]
async fn any_bytes_become_text_that_loses_no_line() {
    for (line, data) in [
        (&b""[..], "data: "),
        (b" indented", "data:  indented"),
        (b"a: b", "data: a: b"),
        (b"crlf\r", "data: crlf"),
        (b"progress 1\rprogress 2", "data: progress 1\ndata: progress 2"),
        (b"\r", "data: "),
        (b"two\r\r", "data: two\ndata: "),
        (b"\rfirst", "data: \ndata: first"),
        ("grün 日本 🦀".as_bytes(), "data: grün 日本 🦀"),
        (b"bad \xff\xfe end", "data: bad \u{FFFD}\u{FFFD} end"),
        (b"torn \xe6\x97", "data: torn \u{FFFD}"),
        (b"nul \0 here", "data: nul \u{FFFD} here"),
        (b"\r\xff\0\r", "data: \ndata: \u{FFFD}\u{FFFD}"),
    ] {
        let printed = [line, b"\nplain\n"].concat();
        let expected =
            format!("retry: 1000\nevent: log\nid: 1\n{data}\n\nevent: log\nid: 2\ndata: plain\n\n");
        assert_eq!(body_of(&printed).await, expected, "{line:?}");
    }
}

#[tokio::test]
async fn a_last_line_without_an_end_comes_whole() {
    for (line, data) in
        [(&b"open"[..], "data: open"), (b"\xff", "data: \u{FFFD}"), (b"a\r", "data: a\ndata: ")]
    {
        let expected = format!("retry: 1000\nevent: log\nid: 1\ndata: x\n\nevent: log\nid: 2\n{data}\n\n");
        assert_eq!(body_of(&[b"x\n", line].concat()).await, expected, "{line:?}");
    }
}

#[tokio::test]
async fn numbers_count_on_over_every_power_of_ten() {
    let body = body_of(&super::numbered(1101)).await;
    let expected: String = (1..=1101).map(|n| format!("event: log\nid: {n}\ndata: {n}\n\n")).collect();
    assert_eq!(body, format!("retry: 1000\n{expected}"));
}

#[tokio::test]
async fn both_streams_name_their_stream_and_count_through() {
    let store = MemoryLogStore::new();
    for (stream, text) in [
        (Stream::Stdout, &b"a\nb\n"[..]),
        (Stream::Stderr, b"c\n"),
        (Stream::Stdout, b"d\n"),
        (Stream::Stderr, b"e\xff\n"),
    ] {
        store.append(&id("r"), stream, text).unwrap();
    }
    store.finish(&id("r"), exited(0)).unwrap();
    let server = Server::start(store).await;
    let events = server.get("/api/job_runs/r/logs/all").await.events();
    let seen: Vec<_> = events.iter().map(|e| (e.name.as_str(), e.id.as_str(), e.data.as_str())).collect();
    assert_eq!(
        seen[..5],
        [
            ("stdout", "1", "a"),
            ("stdout", "2", "b"),
            ("stderr", "3", "c"),
            ("stdout", "4", "d"),
            ("stderr", "5", "e\u{FFFD}"),
        ]
    );
    assert_eq!((seen[5].0, seen[5].1), ("complete", "5!"));

    let events = server.get("/api/job_runs/r/logs/all?format=json").await.events();
    let lines: Vec<LogLine> =
        events[..5].iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect();
    assert!(events[..5].iter().all(|event| event.name == "log"));
    assert_eq!(lines.iter().map(|line| line.n.0).collect::<Vec<_>>(), [1, 2, 1, 3, 2]);
    assert_eq!(lines[2].s, Stream::Stderr);
    assert_eq!(lines[4].b.as_deref(), Some("Zf8="));
    assert!(lines.iter().all(|line| line.t.is_some()));
}

#[tokio::test]
async fn json_tells_the_time_and_what_has_no_end() {
    let server = Server::start(finished(b"first\r\nopen")).await;
    let before = UnixMicros::now();
    let events = server.get(&format!("{STDOUT}?format=json")).await.events();
    let lines: Vec<LogLine> =
        events[..2].iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect();
    assert_eq!(lines[0].m.as_deref(), Some("first\r"), "nothing is lost");
    assert!(lines[0].t.is_some_and(|time| time <= before));
    assert!(!lines[0].open && lines[1].open);
}

#[tokio::test]
async fn a_line_that_was_cut_says_how_long_it_is() {
    let script = |index| match index {
        0 => Some(Ok(ReadEvent::Lines(Batch {
            cut: Some(CutLine { full_bytes: 7_000_000 }),
            ..batch(1, "the beginning \u{e9}".as_bytes()[..15].to_vec())
        }))),
        1 => Some(Ok(ReadEvent::End(ReadEnd::Running { next: LineNumber(1) }))),
        _ => None,
    };
    let server = Server::start(Scripted::new(script)).await;
    assert_eq!(
        server.get(STDOUT).await.text(),
        "retry: 1000\n: cut 7000000\nevent: log\nid: 1\ndata: the beginning \n\n\
         event: eof\nid: 1!\ndata: {\"next\":1,\"state\":\"running\"}\n\n"
    );
    let events = server.get(&format!("{STDOUT}?format=json")).await.events();
    assert_eq!(serde_json::from_str::<LogLine>(&events[0].data).unwrap().cut, Some(7_000_000));
}

#[tokio::test]
async fn holes_and_ends_are_events_with_their_ids() {
    let tombstone = || Tombstone {
        id: id("r"),
        evicted_at: UnixMicros(0),
        reason: "older than 7 days".into(),
        lines: 3,
        bytes: 9,
    };
    let gap = Gap {
        stream: Stream::Stderr,
        after: LineNumber(4),
        lines: 5,
        bytes: 60,
        reason: GapReason::DiskFull,
    };
    let frames = async |event: fn() -> Result<ReadEvent, LogError>, more: ReadEvent| {
        let script = move |index| match index {
            0 => Some(Ok(more.clone())),
            1 => Some(event()),
            _ => None,
        };
        Server::start(Scripted::new(script)).await.get(STDOUT).await.text().to_owned()
    };
    let hole = ReadEvent::Gap { gap, next: LineNumber(20) };
    let hole_frame = "retry: 1000\nevent: gap\nid: 20\n\
        data: {\"stream\":\"stderr\",\"from\":5,\"lines\":5,\"bytes\":60,\"reason\":\"disk_full\"}\n\n";

    let evicted =
        frames(|| Err(LogError::Closed), ReadEvent::End(ReadEnd::Evicted(Box::new(tombstone())))).await;
    let json = serde_json::to_string(&tombstone()).unwrap();
    assert_eq!(evicted, format!("retry: 1000\nevent: evicted\nid: 0!\ndata: {json}\n\n"));

    let shutdown = frames(|| Ok(ReadEvent::End(ReadEnd::Shutdown)), hole.clone()).await;
    assert_eq!(shutdown, format!("{hole_frame}event: shutdown\ndata: {{}}\n\n"));

    let failed = frames(|| Err(LogError::NotFound { id: id("r") }), hole).await;
    let problem =
        failed.strip_prefix(hole_frame).and_then(|text| text.strip_prefix("event: error\ndata: ")).unwrap();
    let problem: databuild_logs::Problem = serde_json::from_str(problem.trim_end()).unwrap();
    assert_eq!((problem.status, problem.kind.as_str()), (404, "not-found"));
}

#[tokio::test]
async fn complete_says_how_the_run_ended() {
    let store = running(b"x\n");
    store.append(&id("r"), Stream::Stderr, b"y\nz\n").unwrap();
    store.finish(&id("r"), exited(3)).unwrap();
    let server = Server::start(store).await;
    let complete = server.get(STDOUT).await.events().pop().unwrap();
    assert_eq!((complete.name.as_str(), complete.id.as_str()), ("complete", "1!"));
    let data: serde_json::Value = serde_json::from_str(&complete.data).unwrap();
    assert_eq!(
        (&data["exit_code"], &data["state"], &data["lines"]),
        (&3.into(), &"failed".into(), &3.into())
    );
    assert!(data["duration_ms"].is_u64() && data["dropped_bytes"] == 0);
}
