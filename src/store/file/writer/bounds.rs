//! What a writer holds in memory is bounded, whatever the disk does.

use super::*;
use crate::index::progress::MAX_GAPS;

fn begin(folder: &tempfile::TempDir) -> OwnRun {
    let spec = RunSpec::new("r".parse().unwrap());
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    OwnRun::create(&Layout::new(folder.path()), spec, Some(1), &options).unwrap()
}

/// Lets a device that is always full take the place of the journal, or of a log, for as long as `action` takes.
fn full(own: &OwnRun, which: Option<Stream>, action: impl FnOnce()) {
    let swap = |other: &mut AppendFile| {
        let mut half = own.half();
        let files = half.files.as_mut().unwrap();
        match which {
            Some(stream) => std::mem::swap(&mut files.logs[stream.index()], other),
            None => files.journal.swap_file(other),
        }
    };
    let mut other = AppendFile::open("/dev/full".into()).unwrap();
    swap(&mut other);
    action();
    swap(&mut other);
}

#[test]
fn a_journal_that_takes_nothing_makes_neither_marks_nor_holes_pile_up() {
    let folder = tempfile::tempdir().unwrap();
    let own = begin(&folder);
    let start = own.run.metadata().started_at.0;
    full(&own, None, || {
        for n in 0..20_000 {
            let stream = if n % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            drop(own.append_at(stream, b"line\n", UnixMicros(start + n * 2 * MERGE_MICROS)));
        }
        let half = own.half();
        assert!(half.unwritten.len() <= MAX_UNWRITTEN + 1, "{} marks", half.unwritten.len());
        assert_eq!((half.gaps.len(), half.found.len()), (0, 0));
        drop(half);
        let state = own.run.state();
        assert!(state.tail.len() <= MAX_UNWRITTEN + 2, "{} in the tail", state.tail.len());
        assert!(state.gaps.len() <= 2);
    });
    let run = own.finish(RunEnd::now(Outcome::Lost)).unwrap();
    assert_eq!((run.stdout.lines, run.stderr.lines), (10_000, 10_000), "every line is there or counted");
    assert_eq!(
        run.stdout.dropped_lines + run.stdout.bytes / 5 + run.stderr.dropped_lines + run.stderr.bytes / 5,
        20_000
    );
}

/// A disk that is full on and off for days leaves a hole each time.
#[test]
fn the_holes_of_a_run_that_are_kept_in_memory_and_in_the_index_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let own = begin(&folder);
    let mut now = own.run.metadata().started_at.0;
    let rounds = MAX_GAPS as u64 + 300;
    for _ in 0..rounds {
        now += 2 * MAX_RETRY_MICROS;
        full(&own, Some(Stream::Stdout), || {
            drop(own.append_at(Stream::Stdout, b"lost\n", UnixMicros(now)));
        });
        now += 2 * MAX_RETRY_MICROS;
        own.append_at(Stream::Stdout, b"kept\n", UnixMicros(now)).unwrap();
    }
    assert_eq!(own.run.state().gaps.len(), MAX_GAPS);
    assert_eq!(own.run.state().record().gaps.len(), MAX_GAPS);
    let run = own.finish(RunEnd::now(Outcome::Lost)).unwrap();
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (2 * rounds, rounds), "all are counted");
}
