//! The buffer: what it saves, what it keeps, and what it says when the store behind fails.

use std::thread;
use std::time::Duration;

use databuild_logs::{
    BufferOptions, BufferedLogStore, Exit, JobRunId, LogError, LogStore, Outcome, ReadOptions, RunEnd,
    RunSpec, RunWriter, StateKind, Stream, View,
};

use crate::support::faulty::FaultyStore;
use crate::support::wait_until;

const NEVER: Duration = Duration::from_secs(24 * 3600);

/// Only what is asked for is handed on.
const PATIENT: BufferOptions =
    BufferOptions { max_bytes: 64 * 1024, max_delay: NEVER, max_total_bytes: 16 * 1024 * 1024 };

/// What is there is handed on at once.
const HASTY: BufferOptions = BufferOptions { max_delay: Duration::from_millis(1), ..PATIENT };

fn over(options: BufferOptions) -> (FaultyStore, BufferedLogStore) {
    let inner = FaultyStore::default();
    let store = BufferedLogStore::new(inner.arc(), options);
    (inner, store)
}

fn start(store: &dyn LogStore) -> (JobRunId, Box<dyn RunWriter>) {
    let id = JobRunId::generate();
    let writer = store.start(RunSpec::new(id.clone())).unwrap();
    (id, writer)
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

#[test]
fn a_thousand_lines_become_two_appends() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    let line = format!("{}\n", "x".repeat(99));
    for _ in 0..1000 {
        writer.append(Stream::Stdout, line.as_bytes()).unwrap();
    }
    writer.flush().unwrap();
    let lengths: Vec<usize> = inner.appends().iter().map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(lengths, [65_500, 34_500]);
    assert_eq!(inner.bytes(&id, Stream::Stdout), line.repeat(1000));
}

#[test]
fn the_order_of_both_streams_is_kept_to_the_byte() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    let appends: Vec<(Stream, String)> = (0..5000)
        .map(|n| {
            let stream = if n % 7 < 3 { Stream::Stderr } else { Stream::Stdout };
            (stream, format!("{n}{}", if n % 2 == 0 { "\n" } else { " and " }))
        })
        .collect();
    for (n, (stream, text)) in appends.iter().enumerate() {
        // Some through the store: it is the same run.
        if n % 10 == 0 {
            store.append(&id, *stream, text.as_bytes()).unwrap();
        } else {
            writer.append(*stream, text.as_bytes()).unwrap();
        }
    }
    writer.finish(success()).unwrap();
    let bytewise = |appends: Vec<(Stream, Vec<u8>)>| -> Vec<(Stream, u8)> {
        appends.into_iter().flat_map(|(stream, bytes)| bytes.into_iter().map(move |b| (stream, b))).collect()
    };
    let given = appends.into_iter().map(|(stream, text)| (stream, text.into_bytes())).collect();
    let got = inner.appends();
    assert!(got.len() < 5000 / 2, "{} appends were not gathered", got.len());
    assert!(bytewise(got) == bytewise(given), "the order changed");
}

#[test]
fn what_waited_long_enough_is_handed_on_unasked() {
    let (inner, store) = over(HASTY);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"from the writer\n").unwrap();
    wait_until("the writer's line arrived", || inner.appends().len() == 1);
    writer.append(Stream::Stderr, b"again\n").unwrap();
    wait_until("the second line arrived", || inner.appends().len() == 2);
    let other = JobRunId::generate();
    store.append(&other, Stream::Stdout, b"starts ").unwrap();
    store.append(&other, Stream::Stdout, b"the run\n").unwrap();
    wait_until("both appends by id arrived", || inner.bytes(&other, Stream::Stdout) == "starts the run\n");
    assert_eq!(inner.bytes(&id, Stream::Stdout), "from the writer\n");
}

#[test]
fn a_reader_sees_what_was_appended_before() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"one\n").unwrap();
    assert_eq!(inner.bytes(&id, Stream::Stdout), "", "the line is still in the buffer");
    assert_eq!(store.run(&id).unwrap().stdout.lines, 1);
    writer.append(Stream::Stdout, b"two\n").unwrap();
    let page = store.runs(&databuild_logs::RunQuery::default()).unwrap();
    assert_eq!(page.runs[0].stdout.lines, 2);
    writer.append(Stream::Stdout, b"three\n").unwrap();
    drop(store.read(&id, ReadOptions::new(View::All)).unwrap());
    assert_eq!(inner.bytes(&id, Stream::Stdout), "one\ntwo\nthree\n");
}

#[test]
fn nothing_is_left_behind_when_store_and_writer_are_dropped() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"before\n").unwrap();
    let by_id = JobRunId::generate();
    for part in ["by ", "id\n"] {
        store.append(&by_id, Stream::Stderr, part.as_bytes()).unwrap();
    }
    drop(store);
    assert_eq!(inner.bytes(&by_id, Stream::Stderr), "by id\n");
    assert_eq!(inner.bytes(&id, Stream::Stdout), "before\n");
    writer.append(Stream::Stdout, b"after\n").unwrap();
    drop(writer);
    assert_eq!(inner.bytes(&id, Stream::Stdout), "before\nafter\n");
    assert_eq!(inner.inner.0.run(&id).unwrap().state.kind(), StateKind::Lost);
}

#[test]
fn close_hands_on_and_later_appends_still_arrive() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"before\n").unwrap();
    store.close().unwrap();
    assert_eq!((inner.bytes(&id, Stream::Stdout), inner.closed()), ("before\n".into(), 1));
    writer.append(Stream::Stdout, b"after\n").unwrap();
    assert_eq!(writer.finish(success()).unwrap().stdout.lines, 2);
}

#[track_caller]
fn assert_full<T: std::fmt::Debug>(result: Result<T, LogError>) {
    assert!(matches!(&result, Err(error) if error.is_disk_full()), "{result:?}");
}

#[test]
fn a_failure_is_told_once_by_whatever_comes_next() {
    let (inner, store) = over(HASTY);
    let (id, mut writer) = start(&store);
    // By an append, of what the timer could not hand on; its own bytes are taken.
    inner.fail("append", 1);
    writer.append(Stream::Stdout, b"lost 1\n").unwrap();
    wait_until("the timer met the failure", || inner.failed() == 1);
    assert_full(writer.append(Stream::Stdout, b"kept 1\n"));
    writer.append(Stream::Stdout, b"kept 2\n").unwrap();
    writer.flush().unwrap();
    // By an append through the store: it is the same run.
    inner.fail("append", 1);
    writer.append(Stream::Stdout, b"lost 2\n").unwrap();
    wait_until("the timer met the failure", || inner.failed() == 2);
    assert_full(store.append(&id, Stream::Stdout, b"kept 3\n"));
    writer.flush().unwrap();
    // By the end, which is an end all the same.
    inner.fail("append", 1);
    writer.append(Stream::Stdout, b"lost 4\n").unwrap();
    wait_until("the timer met the failure", || inner.failed() == 3);
    assert_full(writer.finish(success()));
    let run = store.run(&id).unwrap();
    assert_eq!(run.state.kind(), StateKind::Succeeded);
    assert_eq!(inner.bytes(&id, Stream::Stdout), "kept 1\nkept 2\nkept 3\n");
}

#[test]
fn a_failure_that_a_reader_met_is_told_to_the_writer() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"lost\n").unwrap();
    inner.fail("append", 1);
    assert_eq!(store.run(&id).unwrap().stdout.lines, 0);
    assert_full(writer.flush());
    writer.flush().unwrap();
    assert_eq!(inner.failed(), 1);
}

#[test]
fn an_append_that_hands_on_tells_of_its_own_failure() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"lost\n").unwrap();
    inner.fail("append", 1);
    // It does not fit beside what is there, which is handed on first, and that fails.
    assert_full(writer.append(Stream::Stdout, &[b'x'; 65_536]));
    writer.flush().unwrap();
    assert_eq!((inner.failed(), inner.bytes(&id, Stream::Stdout).len()), (1, 65_536));
}

#[test]
fn two_failures_before_the_end_are_both_told() {
    let (inner, store) = over(PATIENT);
    let (_, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"lost\n").unwrap();
    inner.fail("append", 1);
    inner.fail("flush", 1);
    let error = writer.flush().unwrap_err();
    assert!(error.is_disk_full());
    let text = error.to_string();
    assert!(text.contains("append faulty") && text.contains("flush faulty"), "{text}");
    inner.fail("append", 1);
    inner.fail("finish", 1);
    writer.append(Stream::Stdout, b"lost too\n").unwrap();
    let text = writer.finish(success()).unwrap_err().to_string();
    assert!(text.contains("append faulty") && text.contains("finish faulty"), "{text}");
}

#[test]
fn close_tells_what_could_not_be_handed_on() {
    let (inner, store) = over(PATIENT);
    let (_, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"lost\n").unwrap();
    inner.fail("append", 1);
    assert_full(store.close());
    store.close().unwrap();
    writer.flush().unwrap();
}

#[test]
fn an_end_that_failed_may_be_tried_again() {
    let (inner, store) = over(PATIENT);
    let id = JobRunId::generate();
    for part in ["one ", "line\n"] {
        store.append(&id, Stream::Stdout, part.as_bytes()).unwrap();
    }
    inner.fail("finish", 1);
    assert_full(store.finish(&id, success()));
    assert_eq!(store.run(&id).unwrap().state.kind(), StateKind::Running);
    store.append(&id, Stream::Stdout, b"another\n").unwrap();
    assert_eq!(store.finish(&id, success()).unwrap().stdout.lines, 2);
}

#[test]
fn memory_is_bounded_however_many_runs_there_are() {
    let options = BufferOptions { max_total_bytes: 100_000, ..PATIENT };
    let (inner, store) = over(options);
    let mut runs: Vec<_> = (0..200).map(|_| start(&store)).collect();
    let line = format!("{}\n", "y".repeat(299));
    let mut most = 0;
    for _ in 0..20 {
        for (_, writer) in &mut runs {
            writer.append(Stream::Stdout, line.as_bytes()).unwrap();
            most = most.max(store.held_bytes());
            assert!(most <= options.max_total_bytes, "{most} bytes are held");
        }
    }
    assert!(most > options.max_total_bytes / 2, "only {most} bytes were held: the bound was not tried");
    for (id, writer) in runs {
        writer.finish(success()).unwrap();
        assert_eq!(inner.bytes(&id, Stream::Stdout), line.repeat(20));
    }
    assert_eq!(store.held_bytes(), 0, "a run that is over holds nothing");
}

#[test]
fn a_stuck_store_stops_the_appender_and_not_the_memory() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    inner.block(true);
    let line = format!("{}\n", "z".repeat(99));
    let all = line.repeat(10_000);
    let appender = thread::spawn(move || {
        for _ in 0..10_000 {
            writer.append(Stream::Stdout, line.as_bytes()).unwrap();
        }
        writer
    });
    wait_until("the appender is stuck", || inner.stuck() == 1);
    assert!(!appender.is_finished());
    assert!(store.held_bytes() <= PATIENT.max_bytes, "{} bytes are held", store.held_bytes());
    inner.block(false);
    appender.join().unwrap().finish(success()).unwrap();
    assert_eq!(inner.bytes(&id, Stream::Stdout), all);
}

#[test]
fn memory_that_a_burst_took_is_given_back() {
    let (inner, store) = over(HASTY);
    let (_, mut writer) = start(&store);
    writer.append(Stream::Stdout, &[b'x'; 60_000]).unwrap();
    for lines in 1..=3 {
        wait_until("the timer came", || inner.appends().len() == lines);
        writer.append(Stream::Stdout, b"a line\n").unwrap();
    }
    assert!(store.held_bytes() <= 4096, "{} bytes are held for a line", store.held_bytes());
    let by_id = JobRunId::generate();
    for _ in 0..3 {
        store.append(&by_id, Stream::Stdout, b"a line\n").unwrap();
    }
    drop(writer);
    wait_until("a run that nobody ends is let go", || store.held_bytes() == 0);
    store.append(&by_id, Stream::Stdout, b"a line\n").unwrap();
    store.finish(&by_id, success()).unwrap();
    assert_eq!(inner.bytes(&by_id, Stream::Stdout), "a line\n".repeat(4));
}

#[test]
fn a_large_append_is_not_copied_into_the_buffer() {
    let (inner, store) = over(PATIENT);
    let (_, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"first ").unwrap();
    writer.append(Stream::Stdout, &vec![b'x'; 1 << 20]).unwrap();
    let lengths: Vec<usize> = inner.appends().iter().map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(lengths, [6, 1 << 20]);
    assert!(store.held_bytes() <= PATIENT.max_bytes);
}

#[test]
fn a_run_that_was_ended_behind_the_buffer_is_noticed() {
    let (inner, store) = over(PATIENT);
    let (id, mut writer) = start(&store);
    inner.inner.0.finish(&id, success()).unwrap();
    writer.append(Stream::Stdout, b"late\n").unwrap();
    assert!(matches!(writer.flush(), Err(LogError::Finished { .. })));
    drop(writer);
    assert_eq!(store.run(&id).unwrap().state.kind(), StateKind::Succeeded);
}
