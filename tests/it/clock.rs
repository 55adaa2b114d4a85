//! A clock that was ahead and is set back, between runs, and while a service is away. What it says is made up here in the
//! files that a run leaves: every time in them is moved, and nothing else.

use std::fs;
use std::path::Path;
use std::time::Duration;

use databuild_logs::{
    CheckOptions, Exit, FileLogStore, FileStoreOptions, GcRequest, JobRunId, LineNumber, LogStore, Outcome,
    ReadEnd, ReadEvent, ReadOptions, RunEnd, RunQuery, RunSpec, Start, StateKind, Stream, UnixMicros, View,
    check_index, rebuild_index,
};
use futures_util::StreamExt;

use crate::support::{copy_folder, wait_until};

const HOUR: i64 = 3_600_000_000;
const DAY: i64 = 24 * HOUR;

fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

/// A service that asks after the writers of its runs all the time.
fn service(folder: &Path) -> FileLogStore {
    let liveness_interval = Duration::from_millis(1);
    FileLogStore::open(folder, FileStoreOptions { liveness_interval, ..FileStoreOptions::default() }).unwrap()
}

fn other_process(folder: &Path) -> FileLogStore {
    FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap()
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

fn ended(store: &dyn LogStore, run: &str) {
    let mut writer = store.start(RunSpec::new(id(run))).unwrap();
    writer.append(Stream::Stdout, b"one\ntwo\n").unwrap();
    writer.finish(success()).unwrap();
}

/// Moves every time in a document. Its length stays: a time has always the same number of characters.
fn move_times(text: &str, by: i64) -> String {
    let parts = text.split('"').map(|part| match part.parse::<UnixMicros>() {
        Ok(time) => UnixMicros(time.0.checked_add_signed(by).unwrap()).to_string(),
        Err(_) => part.to_owned(),
    });
    let moved = parts.collect::<Vec<_>>().join("\"");
    assert_eq!(moved.len(), text.len());
    moved
}

/// Makes a run's files look as if its writer's clock had been so far off. Marks tell of times only what lies between
/// them: of the journal, the documents at its beginning and its end are all that changes.
fn move_clock(folder: &Path, run: &str, by: i64) {
    let folder = folder.join("job_runs").join(run);
    let mut journal = fs::read(folder.join("journal")).unwrap();
    let mut at = 8;
    while at < journal.len() {
        let (offset, mut length, mut shift) = (at as u64, 0, 0);
        loop {
            length |= usize::from(journal[at] % 0x80) << shift;
            (at, shift) = (at + 1, shift + 7);
            if journal[at - 1] < 0x80 {
                break;
            }
        }
        let body = at + 4..at + 4 + length;
        if matches!(journal[body.start], 1 | 4) {
            let document = std::str::from_utf8(&journal[body.start + 1..body.end]).unwrap();
            let moved = move_times(document, by);
            journal[body.start + 1..body.end].copy_from_slice(moved.as_bytes());
            let sum = crc32fast::hash(&[&offset.to_le_bytes(), &journal[body.clone()]].concat());
            journal[at..at + 4].copy_from_slice(&sum.to_le_bytes());
        }
        at = body.end;
    }
    // In place: whoever writes the run has the file open, and locked.
    let file = fs::File::options().write(true).open(folder.join("journal")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &journal, 0).unwrap();
    let metadata = folder.join("metadata.json");
    if let Ok(text) = fs::read_to_string(&metadata) {
        fs::write(metadata, move_times(&text, by)).unwrap();
    }
}

/// The runs page by page, newest first.
fn listed(store: &dyn LogStore) -> Vec<String> {
    let mut query = RunQuery { limit: Some(1), ..RunQuery::default() };
    let mut ids = Vec::new();
    loop {
        let page = store.runs(&query).unwrap();
        ids.extend(page.runs.iter().map(|run| run.id().to_string()));
        match page.next {
            Some(next) => query.cursor = Some(next),
            None => return ids,
        }
    }
}

#[track_caller]
fn is_sound(folder: &Path) {
    let report = check_index(folder, CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(report.findings, []);
}

/// A day's error of the clock, forth and back: `ahead` ran while it was ahead, `behind` while it was behind.
fn folder_of_a_wild_clock() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = service(folder.path());
    ended(&store, "first");
    store.close().unwrap();
    drop(store);
    let other = other_process(folder.path());
    for (run, by) in [("ahead", DAY), ("behind", -DAY)] {
        ended(&other, run);
        move_clock(folder.path(), run, by);
        // By its times it could be a copy; it is whole when nothing has changed for five seconds.
        std::thread::sleep(Duration::from_millis(5_200));
        let store = service(folder.path());
        assert_eq!(listed(&store)[0], run);
        store.close().unwrap();
    }
    let store = service(folder.path());
    ended(&store, "last");
    store.close().unwrap();
    folder
}

#[test]
fn runs_stay_in_the_order_in_which_they_came_whatever_the_clock_said() {
    let folder = folder_of_a_wild_clock();
    let as_they_came = ["last", "behind", "ahead", "first"];
    for _ in 0..2 {
        let store = service(folder.path());
        assert_eq!(listed(&store), as_they_came);
        store.close().unwrap();
    }
    is_sound(folder.path());
    assert_eq!(listed(&other_process(folder.path())), as_they_came);
    // A rebuild knows nothing but what their writers said.
    rebuild_index(folder.path(), |_| ()).unwrap();
    let as_they_said = ["ahead", "last", "first", "behind"];
    let store = service(folder.path());
    assert_eq!(listed(&store), as_they_said);
    store.close().unwrap();
    is_sound(folder.path());
}

#[test]
fn a_run_that_ends_tomorrow_is_neither_old_nor_in_the_way_of_those_that_are() {
    let folder = folder_of_a_wild_clock();
    let store = service(folder.path());
    let evict = |older_than| {
        let report = store.gc(&GcRequest { older_than, ..GcRequest::default() }).unwrap();
        report.evicted.iter().map(|run| run.id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(evict(Some(Duration::from_secs(3_600))), ["behind"]);
    assert_eq!(evict(Some(Duration::from_secs(3_600))), [""; 0]);
    assert_eq!(
        evict(Some(Duration::from_nanos(1))),
        ["first", "last"],
        "by their ends, and not the one to come"
    );
    // The size knows no clock.
    let report = store.gc(&GcRequest { max_bytes: Some(1), ..GcRequest::default() }).unwrap();
    assert_eq!(report.evicted.iter().map(|run| run.id.as_str()).collect::<Vec<_>>(), ["ahead"]);
    store.close().unwrap();
    drop(store);
    is_sound(folder.path());
}

/// When the lines of a run came, and how it stands.
async fn times(store: &dyn LogStore, run: &JobRunId, start: Start) -> (Vec<u64>, ReadEnd) {
    let options = ReadOptions { times: true, start, ..ReadOptions::new(View::STDOUT) };
    let mut events = store.read(run, options).unwrap();
    let mut times = Vec::new();
    loop {
        match events.next().await.unwrap().unwrap() {
            ReadEvent::Lines(batch) => times.extend(batch.lines().map(|line| line.time.unwrap().0)),
            ReadEvent::Gap { gap, .. } => panic!("{gap:?}"),
            ReadEvent::End(end) => return (times, end),
        }
    }
}

/// The clock is set back by an hour while a run goes on and the service is away: the run's times rise all the same, and
/// when its writer dies it does not end before its last line.
#[tokio::test]
async fn a_run_over_which_the_clock_goes_back_has_times_that_rise_up_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let other = other_process(folder.path());
    let run = id("lost");
    let mut writer = other.start(RunSpec::new(run.clone())).unwrap();
    writer.append(Stream::Stdout, b"1\n2\n").unwrap();
    writer.flush().unwrap();
    move_clock(folder.path(), "lost", HOUR);
    let store = service(folder.path());
    let started = store.run(&run).unwrap().started_at;
    assert!(started.0 > UnixMicros::now().0 + HOUR as u64 / 2);
    store.close().unwrap();
    drop(store);
    writer.append(Stream::Stdout, b"3\n").unwrap();
    writer.flush().unwrap();
    let store = service(folder.path());
    let (live, end) = times(&store, &run, Start::After(LineNumber(0))).await;
    assert!(matches!(end, ReadEnd::Running { next } if next.0 == 3), "{end:?}");
    assert!(live.is_sorted() && live[0] > started.0 && live[1] < live[2], "{live:?}");
    // All of them came later than now, and behind the last there is none.
    assert_eq!(times(&store, &run, Start::Since(UnixMicros::now())).await.0, live);
    assert_eq!(times(&store, &run, Start::Since(UnixMicros(live[2]))).await.0, live[2..]);
    assert_eq!(times(&store, &run, Start::Since(UnixMicros(live[2] + 1))).await.0, [0; 0]);
    store.close().unwrap();
    drop(store);
    // Nobody has the journal of a copy locked.
    let crashed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), crashed.path());
    writer.finish(success()).unwrap();
    let store = service(crashed.path());
    wait_until("its writer is missed", || store.run(&run).unwrap().state.is_over());
    let over = store.run(&run).unwrap();
    assert_eq!((over.state.kind(), over.started_at, over.stdout.lines), (StateKind::Lost, started, 3));
    assert!(over.state.ended().unwrap().0 >= live[2], "{over:?}");
    assert!(over.duration_ms().unwrap() < HOUR as u64 / 2_000, "{over:?}");
    assert_eq!(times(&store, &run, Start::After(LineNumber(0))).await.0, live);
    store.close().unwrap();
    drop(store);
    is_sound(crashed.path());
}

/// The clock is set back by an hour just before a run ends.
#[tokio::test]
async fn a_run_that_ends_before_it_began_took_no_time_and_is_as_old_as_its_end() {
    let folder = tempfile::tempdir().unwrap();
    for store in [service(folder.path()), other_process(folder.path())] {
        let run = JobRunId::generate();
        let mut writer = store.start(RunSpec::new(run.clone())).unwrap();
        writer.append(Stream::Stdout, b"1\n2\nno end").unwrap();
        let began = store.run(&run).unwrap().started_at;
        let ended_at = UnixMicros(began.0 - HOUR as u64);
        let over = writer.finish(RunEnd { ended_at, ..success() }).unwrap();
        assert_eq!((over.duration_ms(), over.completion().duration_ms), (Some(0), Some(0)));
        assert_eq!(store.run(&run).unwrap(), over);
        let (lines, end) = times(&store, &run, Start::After(LineNumber(0))).await;
        assert_eq!(lines.len(), 3);
        assert!(lines[..2].iter().all(|&line| line > began.0), "{lines:?} and {began:?}");
        assert_eq!(end, ReadEnd::Complete(Box::new(over)));
        store.close().unwrap();
    }
    let store = service(folder.path());
    assert_eq!(listed(&store).len(), 2);
    let older_than =
        |seconds| GcRequest { older_than: Some(Duration::from_secs(seconds)), ..GcRequest::default() };
    assert_eq!(store.gc(&older_than(2 * 3_600)).unwrap().evicted, []);
    assert_eq!(store.gc(&older_than(3_500)).unwrap().evicted.len(), 2);
    store.close().unwrap();
    drop(store);
    is_sound(folder.path());
}
