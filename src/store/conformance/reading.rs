//! Where a read starts and ends, and the order of two streams.

use std::sync::Arc;

use futures_util::StreamExt;

use super::{
    Seen, after, all_bytes, append, finish, finished, let_the_clock_move, read, read_from, show, start,
};
use crate::line::{ByteOffset, LineNumber, Stream, UnixMicros, View};
use crate::run::JobRunId;
use crate::store::{LogStore, ReadEnd, ReadOptions, Start, StreamOptions};

const LINES: u64 = 40;

fn numbered(lines: u64) -> String {
    (1..=lines).map(|n| format!("line {n}\n")).collect()
}

/// Both streams in turns, with whole lines and parts of lines; gives the lines in the order of their ends.
fn two_streams(store: &dyn LogStore) -> (JobRunId, Box<dyn crate::store::RunWriter>, Vec<(Stream, String)>) {
    let (id, mut writer) = start(store);
    let mut order = Vec::new();
    for n in 0..20 {
        let (one, other) =
            if n % 3 == 0 { (Stream::Stdout, Stream::Stderr) } else { (Stream::Stderr, Stream::Stdout) };
        // The line of `one` begins first and ends last.
        append(&mut *writer, one, format!("{n} begins, "));
        append(&mut *writer, other, format!("{n} a\n{n} b\n"));
        append(&mut *writer, one, format!("{n} ends\n"));
        order.push((other, format!("{n} a")));
        order.push((other, format!("{n} b")));
        order.push((one, format!("{n} begins, {n} ends")));
    }
    (id, writer, order)
}

fn with_streams(lines: &[Seen]) -> Vec<(Stream, String)> {
    lines.iter().map(|line| (line.stream, String::from_utf8_lossy(&line.text).into_owned())).collect()
}

/// `Start::After(n)` gives line n + 1 first, for every n, in a live run and in a finished one; behind the last
/// line there is nothing, and no error.
pub async fn a_read_starts_behind_any_line(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, numbered(LINES));
    for first in 0..=LINES + 2 {
        let got = read_from(&*store, &id, View::STDOUT, after(first)).await;
        let numbers: Vec<u64> = got.lines.iter().map(|line| line.number).collect();
        assert_eq!(numbers, (first + 1..=LINES).collect::<Vec<_>>(), "after line {first}");
        assert_eq!(got.running(), LINES.max(first), "where the next read goes on");
    }
    finish(writer);
    for first in 0..=LINES + 2 {
        let got = read_from(&*store, &id, View::STDOUT, after(first)).await;
        let texts: Vec<String> = (first + 1..=LINES).map(|n| format!("line {n}")).collect();
        assert_eq!(show(&got.texts()), texts, "after line {first}");
        got.completed();
    }
}

/// `LastLines` gives the end of the backlog and never what lies before `after`; `Since` gives what arrived at
/// that moment or later.
pub async fn last_lines_and_since_start_where_they_say(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    for n in 1..=LINES {
        let stream = if n % 4 == 0 { Stream::Stderr } else { Stream::Stdout };
        append(&mut *writer, stream, format!("line {n}\n"));
        if n % 5 == 0 {
            writer.flush().expect("a live run can be flushed");
            let_the_clock_move().await;
        }
    }
    finish(writer);
    for view in [View::STDOUT, View::STDERR, View::All] {
        let all = read(&*store, &id, ReadOptions { times: true, ..ReadOptions::new(view) }).await.lines;
        let total = all.len() as u64;
        let positions = |lines: &[Seen]| lines.iter().map(|line| line.position).collect::<Vec<_>>();
        for count in [0, 1, 2, total - 1, total, total + 1, u64::MAX] {
            for behind in [0, 3, total - 1, total] {
                let start = Start::LastLines { count, after: LineNumber(behind) };
                let got = read_from(&*store, &id, view, start).await;
                let from = total.saturating_sub(count).max(behind);
                assert_eq!(
                    positions(&got.lines),
                    (from + 1..=total).collect::<Vec<_>>(),
                    "{start:?} of {view}"
                );
                let position = store.position(&id, view, start).expect("a run that is there has positions");
                assert_eq!(position, LineNumber(from), "{start:?} of {view}");
            }
        }
        let times: Vec<UnixMicros> = all.iter().filter_map(|line| line.time).collect();
        assert_eq!(times.len(), all.len(), "every line of {view} has a time");
        assert!(times.first() < times.last(), "lines that were flushed apart have times of their own");
        let moments = times.iter().flat_map(|time| [time.0 - 1, time.0, time.0 + 1]).chain([0, u64::MAX]);
        for moment in moments.map(UnixMicros) {
            let got = read_from(&*store, &id, view, Start::Since(moment)).await;
            let expected: Vec<Seen> = all.iter().filter(|line| line.time >= Some(moment)).cloned().collect();
            assert_eq!(positions(&got.lines), positions(&expected), "{view} since {moment}");
            let position = store.position(&id, view, Start::Since(moment)).expect("as above");
            assert_eq!(position.0, total - expected.len() as u64, "{view} since {moment}");
        }
    }
}

/// Times are told when they are asked for, and always for both streams; they never go back.
pub async fn times_never_go_back(store: Arc<dyn LogStore>) {
    let (id, writer, order) = two_streams(&*store);
    finish(writer);
    let both = read_from(&*store, &id, View::All, after(0)).await;
    let times: Vec<_> = both.lines.iter().map(|line| line.time).collect();
    assert_eq!(times.len(), order.len());
    assert!(times.iter().all(Option::is_some), "a read of both streams always tells the times");
    assert!(times.is_sorted(), "times go back: {times:?}");
    for stream in Stream::BOTH {
        let options = ReadOptions { times: true, ..ReadOptions::new(View::One(stream)) };
        let one = read(&*store, &id, options).await;
        let of_stream: Vec<_> =
            both.lines.iter().filter(|line| line.stream == stream).map(|line| line.time).collect();
        let told: Vec<_> = one.lines.iter().map(|line| line.time).collect();
        assert_eq!(told, of_stream, "a line has one time, whichever view it is read in");
    }
}

/// A limit ends a read: with `Running` and where to go on while the run goes on, with `Complete` after.
pub async fn a_limit_ends_a_read(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, numbered(LINES));
    let limited = |limit, first, follow| ReadOptions {
        start: after(first),
        limit: Some(limit),
        follow,
        ..ReadOptions::new(View::STDOUT)
    };
    for follow in [false, true] {
        for (limit, first) in [(0, 0), (1, 0), (1, LINES - 1), (7, 11), (LINES, 0)] {
            let got = read(&*store, &id, limited(limit, first, follow)).await;
            assert_eq!(got.lines.len() as u64, limit, "{limit} lines after {first}");
            assert_eq!(got.lines.first().map(|line| line.number), (limit > 0).then_some(first + 1));
            assert_eq!(got.running(), first + limit, "{limit} lines after {first}, follow {follow}");
        }
    }
    let got = read(&*store, &id, limited(LINES, LINES - 2, false)).await;
    assert_eq!(got.running(), LINES, "fewer lines than the limit are there");
    finish(writer);
    let got = read(&*store, &id, limited(3, 0, false)).await;
    assert_eq!(got.lines.len(), 3);
    got.completed();
}

/// A byte offset is the number of bytes before the line, and bytes read from there begin with it.
pub async fn byte_offsets_are_where_lines_begin(store: Arc<dyn LogStore>) {
    let text = "one\n\nthree\nfour\n";
    let id = finished(&*store, text.as_bytes());
    let offset = |start| store.byte_offset(&id, Stream::Stdout, start).expect("an offset of a whole run");
    for (line, bytes) in [(0, 0), (1, 4), (2, 5), (3, 11), (4, 16), (9, 16)] {
        assert_eq!(offset(after(line)), ByteOffset(bytes), "after line {line}");
        let rest =
            store.read_bytes(&id, Stream::Stdout, ByteOffset(bytes), 100).expect("bytes of a whole run");
        assert_eq!(rest, text.as_bytes()[bytes as usize..]);
    }
    assert_eq!(offset(Start::LastLines { count: 2, after: LineNumber(0) }), ByteOffset(5));
    assert_eq!(offset(Start::LastLines { count: 2, after: LineNumber(3) }), ByteOffset(11));
    assert_eq!(offset(Start::Since(UnixMicros(0))), ByteOffset(0));
    let behind = store.read_bytes(&id, Stream::Stdout, ByteOffset(17), 10).expect("an offset behind the end");
    assert!(behind.is_empty(), "bytes from behind the end: {behind:?}");
}

/// What is appended to one stream is not seen in the other, of the same run or of another.
pub async fn streams_are_independent(store: Arc<dyn LogStore>) {
    let (one, mut writer_one) = start(&*store);
    let (two, mut writer_two) = start(&*store);
    for n in 0..10 {
        append(&mut *writer_one, Stream::Stdout, format!("out one {n}\n"));
        append(&mut *writer_two, Stream::Stderr, format!("err two {n}\n"));
        append(&mut *writer_one, Stream::Stderr, format!("err one {n}\n"));
    }
    finish(writer_one);
    finish(writer_two);
    for (id, stream, word) in [
        (&one, Stream::Stdout, "out one"),
        (&one, Stream::Stderr, "err one"),
        (&two, Stream::Stdout, ""),
        (&two, Stream::Stderr, "err two"),
    ] {
        let expected: Vec<String> =
            (0..10).filter(|_| !word.is_empty()).map(|n| format!("{word} {n}")).collect();
        let got = read_from(&*store, id, View::One(stream), after(0)).await;
        assert_eq!(show(&got.texts()), expected, "{stream} of {id}");
        let bytes: String = expected.iter().map(|line| format!("{line}\n")).collect();
        assert_eq!(all_bytes(&*store, id, stream, 30), bytes.as_bytes());
    }
}

/// Both streams are read in the order in which their lines were completed, numbered through, each line with its
/// number in its own stream too.
pub async fn both_streams_are_read_in_the_order_of_completed_lines(store: Arc<dyn LogStore>) {
    let (id, writer, mut order) = two_streams(&*store);
    let live = read_from(&*store, &id, View::All, after(0)).await;
    assert_eq!(with_streams(&live.lines), order);
    assert_eq!(live.running(), order.len() as u64);
    let mut writer = writer;
    append(&mut *writer, Stream::Stderr, "no end");
    order.push((Stream::Stderr, "no end".to_owned()));
    finish(writer);
    let got = read_from(&*store, &id, View::All, after(0)).await;
    assert_eq!(with_streams(&got.lines), order);
    let mut in_stream = [0, 0];
    for (index, line) in got.lines.iter().enumerate() {
        in_stream[line.stream.index()] += 1;
        assert_eq!((line.position, line.number), (index as u64 + 1, in_stream[line.stream.index()]));
    }
    for stream in Stream::BOTH {
        let one = read_from(&*store, &id, View::One(stream), after(0)).await;
        let of_stream: Vec<_> = order.iter().filter(|line| line.0 == stream).cloned().collect();
        assert_eq!(with_streams(&one.lines), of_stream, "{stream} alone has the same lines");
    }
}

/// From every position the rest of both streams is read, each line with the numbers it always has.
pub async fn a_read_of_both_streams_resumes_anywhere(store: Arc<dyn LogStore>) {
    let (id, writer, order) = two_streams(&*store);
    finish(writer);
    let all = read_from(&*store, &id, View::All, after(0)).await.lines;
    for seen in 0..=order.len() {
        let rest = read_from(&*store, &id, View::All, after(seen as u64)).await;
        assert_eq!(rest.lines, all[seen..], "resumed after position {seen}");
        let limited = ReadOptions {
            start: after(seen as u64),
            limit: Some(2),
            batch_bytes: 8,
            ..ReadOptions::new(View::All)
        };
        let some = read(&*store, &id, limited).await.lines;
        assert_eq!(some, all[seen..(seen + 2).min(all.len())], "two lines after position {seen}");
    }
}

/// The options of the string streams: skip, at most, the last few.
pub async fn string_options_mean_what_they_say(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stderr, numbered(10));
    let strings = |options| {
        let lines = store.stream_stderr(id.as_str(), options);
        lines.map(|line| line.expect("a line of a whole run")).collect::<Vec<String>>()
    };
    let lines = |from: u64, to: u64| (from..=to).map(|n| format!("line {n}")).collect::<Vec<_>>();
    let options = |since_line, max_lines, tail| StreamOptions { follow: false, since_line, max_lines, tail };
    assert_eq!(strings(options(0, None, None)).await, lines(1, 10));
    assert_eq!(strings(options(4, None, None)).await, lines(5, 10));
    assert_eq!(strings(options(4, Some(3), None)).await, lines(5, 7));
    assert_eq!(strings(options(0, Some(0), None)).await, lines(1, 0));
    assert_eq!(strings(options(0, None, Some(2))).await, lines(9, 10));
    assert_eq!(strings(options(9, None, Some(5))).await, lines(10, 10));
    let end = finish(writer);
    let got = read_from(&*store, &id, View::STDERR, after(10)).await;
    assert_eq!(got.end, ReadEnd::Complete(Box::new(end)), "a read tells what finish told");
}
