//! What a writer and its readers hold of a run is bounded, whatever the disk does.

use super::hole::MAX_RETRY_MICROS;
use super::tests::refuse;
use super::*;
use crate::index::progress::MAX_GAPS;
use crate::line::{ByteOffset, LineNumber, View};
use crate::run::JobRunId;
use crate::store::file::FileLogStore;
use crate::store::{
    CheckOptions, LogStore, Outcome, ReadEvent, ReadOptions, ReadStream, Start, check_index, dump_index,
    rebuild_index,
};
use futures_util::StreamExt;

/// What a stream was given: the lines that were kept, and `None` for each that was lost.
type Given = Vec<Option<String>>;

fn id() -> JobRunId {
    "r".parse().unwrap()
}

fn open(folder: &tempfile::TempDir) -> FileLogStore {
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    FileLogStore::open(folder.path(), options).unwrap()
}

/// Appends lines to standard output of a disk that is full on and off, with a hole each time and lines between, and a
/// line to standard error now and then.
fn full_on_and_off(own: &OwnRun, holes: usize) -> [Given; 2] {
    let mut given = [Vec::new(), Vec::new()];
    let mut now = own.run.metadata().started_at.0;
    for hole in 0..holes {
        refuse(own, Stream::Stdout, true);
        now += 2 * MAX_RETRY_MICROS;
        let lost = 1 + hole % 3;
        drop(own.append_at(Stream::Stdout, "lost\n".repeat(lost).as_bytes(), UnixMicros(now)));
        given[0].extend(vec![None; lost]);
        refuse(own, Stream::Stdout, false);
        now += 2 * MAX_RETRY_MICROS;
        for stream in [Stream::Stdout, Stream::Stdout, Stream::Stderr] {
            let given = &mut given[stream.index()];
            let text = format!("{stream} {}", given.len() + 1);
            own.append_at(stream, format!("{text}\n").as_bytes(), UnixMicros(now)).unwrap();
            given.push(Some(text));
        }
    }
    own.flush();
    given
}

/// Checks that every line behind `after` comes once, with its number and its text, or lies in a hole.
async fn assert_all(mut events: ReadStream, view: View, after: u64, given: &[Given; 2]) {
    let mut at = [0, 0];
    if let View::One(stream) = view {
        at = given.each_ref().map(|given| given.len() as u64);
        at[stream.index()] = after;
    }
    let mut position = after;
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => {
                assert_eq!(batch.first_position.0, position + 1);
                for line in batch.lines() {
                    let number = &mut at[batch.stream.index()];
                    *number += 1;
                    assert_eq!(line.number.0, *number, "{view} behind {after}");
                    let text = given[batch.stream.index()][*number as usize - 1].as_deref();
                    assert_eq!(Some(line.text), text.map(str::as_bytes), "{view} behind {after}: {number}");
                }
                position += batch.lines;
            }
            ReadEvent::Gap { gap, next } => {
                let number = &mut at[gap.stream.index()];
                let end = gap.after.0 + gap.lines;
                assert!(
                    gap.after.0 <= *number && *number < end,
                    "{view} behind {after}: {gap:?} at {number}"
                );
                let lost = &given[gap.stream.index()][gap.after.0 as usize..end as usize];
                assert!(lost.iter().all(Option::is_none), "{view} behind {after}: {gap:?}");
                *number = end;
                position = next.0;
            }
            ReadEvent::End(_) => {}
        }
    }
    assert_eq!(at, given.each_ref().map(|given| given.len() as u64), "{view} behind {after}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_on_and_off_leaves_few_holes_in_memory_and_all_of_them_for_readers() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let writer = store.start(RunSpec::new(id())).unwrap();
    let own = store.shared.own(&id()).unwrap();
    let follow = |view| store.read(&id(), ReadOptions { follow: true, ..ReadOptions::new(view) }).unwrap();
    let followers = [View::STDOUT, View::All].map(|view| (view, follow(view)));
    let collected = followers.map(|(view, mut events)| {
        let seen = tokio::spawn(async move {
            let mut seen = Vec::new();
            while let Some(event) = events.next().await {
                seen.push(event);
            }
            seen
        });
        (view, seen)
    });
    let holes = MAX_GAPS + 300;
    let given = full_on_and_off(&own, holes);
    assert_eq!(own.run.state().gaps.len(), MAX_GAPS);
    let run = writer.finish(RunEnd::now(Outcome::Lost)).unwrap();
    let lost = given[0].iter().filter(|line| line.is_none()).count() as u64;
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (given[0].len() as u64, lost));
    assert_eq!(run.stdout.dropped_bytes, lost * 5, "all that was dropped is counted");
    for (view, seen) in collected {
        assert_all(futures_util::stream::iter(seen.await.unwrap()).boxed(), view, 0, &given).await;
    }
    store.close().unwrap();
    drop((own, store));

    let rows = || {
        let mut rows = Vec::new();
        dump_index(folder.path(), |row| {
            rows.push(row);
            Ok(())
        })
        .unwrap();
        rows
    };
    let before = rows();
    rebuild_index(folder.path(), |_| ()).unwrap();
    assert_eq!(rows(), before);
    let checked = check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(checked.findings, []);

    let without = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    for store in [open(&folder), without] {
        let all = given[0].len() as u64;
        let middle = all * MAX_GAPS as u64 / holes as u64;
        let starts = [0, 1, 2, 3, middle - 1, middle, middle + 1, middle + 2, middle + 3, all - 1, all];
        for after in starts {
            let start = Start::After(LineNumber(after));
            for times in [false, true] {
                let options = ReadOptions { start, times, ..ReadOptions::new(View::STDOUT) };
                assert_all(store.read(&id(), options).unwrap(), View::STDOUT, after, &given).await;
            }
            let kept = given[0][..after as usize].iter().flatten().map(|line| line.len() as u64 + 1);
            let offset = store.byte_offset(&id(), Stream::Stdout, start).unwrap();
            assert_eq!(offset, ByteOffset(kept.sum()), "behind {after}");
        }
        assert_all(store.read(&id(), ReadOptions::new(View::All)).unwrap(), View::All, 0, &given).await;
    }
}
