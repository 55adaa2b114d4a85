use std::fs;
use std::time::Duration;

use super::half::MERGE_MICROS;
use super::*;
use crate::index::progress::GapAt;
use crate::journal::{Arrival, Parsed, Record, What, parse};
use crate::line::LineNumber;
use crate::line::View;
use crate::run::{Exit, Gap, JobRunId, RunState};
use crate::store::file::FileLogStore;
use crate::store::{LogStore, Outcome, ReadEvent, ReadOptions};
use futures_util::StreamExt;
use proptest::prelude::*;

fn own_run() -> (tempfile::TempDir, OwnRun) {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(folder.path());
    let run =
        OwnRun::create(&layout, RunSpec::new("x".parse().unwrap()), Some(1), &FileStoreOptions::default())
            .unwrap();
    (folder, run)
}

fn end() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

/// The arrivals in a run's journal.
fn journal(run: &OwnRun) -> Vec<Arrival> {
    let bytes = fs::read(run.run.folder.journal()).unwrap();
    let mut offset = 0;
    let mut arrivals = Vec::new();
    while let Parsed::Record(record, length) = parse(&bytes[offset..], offset as u64) {
        offset += length;
        arrivals.extend(if let Record::Arrival(arrival) = record { Some(arrival) } else { None });
    }
    assert_eq!(offset, bytes.len(), "all of the journal is sound");
    arrivals
}

/// Puts another file in the place of a log for as long as `action` takes.
fn with_log(run: &OwnRun, stream: Stream, path: &str, action: impl FnOnce()) {
    let swap = |other: &mut AppendFile| {
        let mut half = run.half();
        std::mem::swap(&mut half.files.as_mut().unwrap().logs[stream.index()], other);
    };
    let mut other = AppendFile::open(path.into()).unwrap();
    swap(&mut other);
    action();
    swap(&mut other);
}

#[test]
fn a_clock_that_was_set_back_does_not_make_one_mark_of_all_that_follows() {
    let (_folder, run) = own_run();
    {
        let mut half = run.half();
        let first = UnixMicros(half.progress.time.0 + 10_000_000);
        half.append(Stream::Stdout, b"one\n", first).unwrap();
        for n in 0..3 {
            let later = UnixMicros(first.0 - 5_000_000 + n * 2 * MERGE_MICROS);
            half.append(Stream::Stdout, b"later\n", later).unwrap();
        }
        half.write_marks();
    }
    let lines: Vec<u64> = journal(&run).iter().map(|mark| mark.lines).collect();
    assert_eq!(lines, [1, 1, 1, 1]);
}

#[test]
fn readers_see_nothing_of_a_line_whose_beginning_a_hole_takes_away() {
    let (_folder, run) = own_run();
    run.append(Stream::Stdout, b"a\nbeg").unwrap();
    assert_eq!(run.run.state().visible, [5, 0]);
    with_log(&run, Stream::Stdout, "/dev/full", || {
        run.append(Stream::Stdout, b"in\nlost\nalso").unwrap_err();
        assert_eq!(run.run.state().visible, [2, 0]);
        run.append(Stream::Stderr, b"goes on\n").unwrap();
    });
    run.append(Stream::Stdout, b" lost\nkept\n").unwrap();
    assert_eq!(fs::read(run.run.folder.log(Stream::Stdout)).unwrap(), b"a\nkept\n");
    assert_eq!(run.run.state().visible, [7, 8]);
    let gaps = Arc::clone(&run.run.state().gaps);
    let gap = Gap {
        stream: Stream::Stdout,
        after: LineNumber(1),
        lines: 3,
        bytes: 21,
        reason: GapReason::DiskFull,
    };
    assert_eq!(*gaps, [GapAt { gap, offset: 2 }]);
    let metadata = run.finish(end()).unwrap();
    assert_eq!((metadata.stdout.lines, metadata.stdout.dropped_lines), (5, 3));
}

fn begin(folder: &tempfile::TempDir) -> OwnRun {
    let spec = RunSpec::new("r".parse().unwrap());
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    OwnRun::create(&Layout::new(folder.path()), spec, None, &options).unwrap()
}

/// Lets the disk refuse a stream from now on, or no more.
pub(super) fn refuse(own: &OwnRun, stream: Stream, refused: bool) {
    let mut half = own.half();
    let files = half.files.as_mut().unwrap();
    let path = own.run.folder.log(stream);
    // A device that is always full takes the place of the log.
    let log = if refused { "/dev/full".into() } else { path };
    files.logs[stream.index()] = AppendFile::open(log).unwrap();
}

#[test]
fn a_clock_that_goes_back_neither_stops_the_marks_nor_turns_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let own = begin(&folder);
    let start = own.run.metadata().started_at.0;
    let clock = [5_000, 9_000, 2_000, 2_500, 3_600, 0, 10_000].map(|after| UnixMicros(start + after));
    for now in clock {
        own.append_at(Stream::Stdout, b"x\n", now).unwrap();
    }
    let back_to_1970 = UnixMicros(7);
    own.append_at(Stream::Stdout, b"x\n", back_to_1970).unwrap();
    own.flush();
    let found = journal(&own);
    assert_eq!(found.iter().map(|arrival| arrival.lines).sum::<u64>(), 8);
    assert!(found.len() >= 5, "marks go on: {found:?}");
    assert!(found.iter().all(|arrival| arrival.after_micros >= 1), "{found:?}");
    let end = RunEnd { ended_at: back_to_1970, ..RunEnd::now(Outcome::Lost) };
    let run = own.finish(end).unwrap();
    assert_eq!((run.duration_ms(), run.stdout.lines), (Some(0), 8));
    assert_eq!(run.state, RunState::Lost { ended: back_to_1970 });
}

#[test]
fn a_clock_that_goes_back_does_not_keep_a_hole_open() {
    let folder = tempfile::tempdir().unwrap();
    let own = begin(&folder);
    let now = own.run.metadata().started_at.0 + 10_000_000;
    refuse(&own, Stream::Stdout, true);
    for step in 0..10 {
        drop(own.append_at(Stream::Stdout, b"lost\n", UnixMicros(now + step * 200_000)));
    }
    refuse(&own, Stream::Stdout, false);
    own.append_at(Stream::Stdout, b"kept\n", UnixMicros(now - 5_000_000)).unwrap();
    assert_eq!(fs::read(own.run.folder.log(Stream::Stdout)).unwrap(), b"kept\n");
    assert_eq!(own.finish(RunEnd::now(Outcome::Lost)).unwrap().stdout.dropped_lines, 10);
}

#[test]
fn a_hole_begins_and_ends_where_lines_do() {
    let folder = tempfile::tempdir().unwrap();
    let own = begin(&folder);
    let now = own.run.metadata().started_at.0;
    let append =
        |bytes: &[u8], after: u64| own.append_at(Stream::Stdout, bytes, UnixMicros(now + after)).is_ok();
    assert!(append(b"one\ntw", 1_000));
    refuse(&own, Stream::Stdout, true);
    assert!(!append(b"o\nthree\nfo", 2_000), "the first loss is an error");
    assert!(append(b"ur\nfive", 3_000), "those after it are only counted");
    refuse(&own, Stream::Stdout, false);
    // The rest of a line that began in the hole is lost with it.
    assert!(append(b"!\nsix\n", 2_000_000));
    let gap = *journal(&own).iter().find(|arrival| matches!(arrival.what, What::Gap(_))).unwrap();
    assert_eq!((gap.lines, gap.bytes), (4, 21), "two to five");
    assert_eq!(fs::read(own.run.folder.log(Stream::Stdout)).unwrap(), b"one\nsix\n");
    let run = own.finish(RunEnd::now(Outcome::Lost)).unwrap();
    assert_eq!((run.stdout.lines, run.stdout.bytes, run.stdout.dropped_bytes), (6, 8, 21));
}

#[test]
fn a_disk_that_refuses_everything_is_asked_now_and_then_and_the_journal_hears_of_each_hole_first() {
    let folder = tempfile::tempdir().unwrap();
    let own = begin(&folder);
    let now = own.run.metadata().started_at.0;
    refuse(&own, Stream::Stderr, true);
    for after in 0..1_000 {
        drop(own.append_at(Stream::Stderr, b"lost\n", UnixMicros(now + after * 1_000)));
    }
    // The log has nothing of what was tried, and the journal tells of every hole that ended in a try.
    let tries = journal(&own).len();
    assert!((5..=25).contains(&tries), "{tries} tries in a second");
    let run = own.finish(RunEnd::now(Outcome::Lost)).unwrap();
    assert_eq!((run.stderr.lines, run.stderr.dropped_lines, run.stderr.dropped_bytes), (1_000, 1_000, 5_000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What the writer keeps is what its journal bears out: the first line behind every 64 KiB, by the bytes alone.
    #[test]
    fn checkpoints_are_those_of_the_journal_and_of_the_bytes(
        appends in proptest::collection::vec((any::<bool>(), 1..60_000usize, 1..90_000usize), 1..24),
        flush in any::<bool>(),
    ) {
        let (_folder, run) = own_run();
        let mut logs = [Vec::new(), Vec::new()];
        for (stderr, size, line) in appends {
            let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
            let log: &mut Vec<u8> = &mut logs[stream.index()];
            let text: Vec<u8> =
                (0..size).map(|i| if (log.len() + i).is_multiple_of(line) { b'\n' } else { b'x' }).collect();
            run.append(stream, &text).unwrap();
            log.extend_from_slice(&text);
            if flush {
                run.flush();
            }
        }
        run.flush();
        let mut expected = Vec::new();
        for stream in Stream::BOTH {
            let log = &logs[stream.index()];
            let (mut next, mut line) = (Checkpointer::EVERY_BYTES, 0);
            for (at, _) in log.iter().enumerate().filter(|&(_, &byte)| byte == b'\n') {
                line += 1;
                let offset = at as u64 + 1;
                if offset >= next {
                    next = offset + Checkpointer::EVERY_BYTES;
                    expected.push((stream, line, offset));
                }
            }
        }
        let mut progress = Progress::start(run.run.metadata().started_at, 0);
        let mut checkpointer = Checkpointer::new();
        let mut replayed = Vec::new();
        for arrival in journal(&run) {
            prop_assert!(progress.advance(&arrival));
            replayed.extend(checkpointer.after(arrival.stream, &progress).line);
        }
        let kept = run.run.state().waiting.lines.clone();
        prop_assert_eq!(&kept, &replayed);
        let mut found: Vec<_> = kept.iter().map(|at| (at.stream, at.line, at.offset)).collect();
        found.sort_by_key(|&(stream, line, _)| (stream, line));
        prop_assert_eq!(found, expected);
    }
}

/// Both streams are read while marks of them are not in the journal yet, and the reader is overtaken by what is given up.
#[tokio::test]
async fn a_reader_that_is_overtaken_within_marks_that_wait_numbers_what_follows_right() {
    for taken in 0..12 {
        let folder = tempfile::tempdir().unwrap();
        let options = FileStoreOptions { max_run_bytes: 16_000, ..FileStoreOptions::default() };
        let store = FileLogStore::open(folder.path(), options).unwrap();
        let id: JobRunId = "x".parse().unwrap();
        let writer = store.start(RunSpec::new(id.clone())).unwrap();
        let own = store.shared.own(&id).unwrap();
        let start = own.run.metadata().started_at.0 + 1_000_000;
        let mut printed = [0, 0];
        let mut append = |stream: Stream, lines: usize, after: u64| {
            let printed = &mut printed[stream.index()];
            let text: String =
                (*printed..*printed + lines).map(|n| format!("{stream} {}\n", n + 1)).collect();
            *printed += lines;
            own.append_at(stream, text.as_bytes(), UnixMicros(start + after)).unwrap();
        };
        append(Stream::Stdout, 400, 0);
        append(Stream::Stderr, 3, 10);
        append(Stream::Stdout, 100, 20);
        append(Stream::Stderr, 2, 30);
        let read = ReadOptions { follow: true, batch_bytes: 1_000, ..ReadOptions::new(View::All) };
        let mut events = store.read(&id, read).unwrap();
        let mut seen = Vec::new();
        // All of it, at the most.
        while seen.len() < taken
            && let Ok(event) = tokio::time::timeout(Duration::from_millis(100), events.next()).await
        {
            seen.push(event.unwrap().unwrap());
        }
        for round in 1..20 {
            append(Stream::Stdout, 200, round * 2 * MERGE_MICROS);
        }
        append(Stream::Stderr, 2, 100 * MERGE_MICROS);
        writer.finish(end()).unwrap();
        while let Some(event) = events.next().await {
            seen.push(event.unwrap());
        }
        let mut at = [0, 0];
        for event in seen {
            match event {
                ReadEvent::Lines(batch) => {
                    for line in batch.lines() {
                        let (stream, number) = (batch.stream, &mut at[batch.stream.index()]);
                        *number += 1;
                        let text = format!("{stream} {number}");
                        assert_eq!((line.number.0, line.text), (*number, text.as_bytes()), "behind {taken}");
                    }
                }
                ReadEvent::Gap { gap, .. } => {
                    assert_eq!(gap.reason, crate::run::GapReason::RunSizeCap, "behind {taken}: {gap:?}");
                    let number = &mut at[gap.stream.index()];
                    assert_eq!(gap.after.0, *number, "behind {taken}: {gap:?}");
                    *number += gap.lines;
                }
                ReadEvent::End(_) => {}
            }
        }
        assert_eq!(at, printed.map(|lines| lines as u64), "behind {taken}");
    }
}
