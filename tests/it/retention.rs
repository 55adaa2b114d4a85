//! What is evicted and what is not, what readers are told, and what is left.

mod crash;
mod damage;
mod emergency;
mod pins;
mod reused;
mod service;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::Duration;

use databuild_logs::{
    CheckOptions, EvictionReason, Exit, FileLogStore, FileStoreOptions, FindingKind, GcReport, GcRequest,
    JobRunId, LogError, LogStore, Outcome, ReadEnd, ReadEvent, ReadOptions, RetentionPolicy, RunEnd,
    RunQuery, RunSpec, Stream, Tombstone, UnixMicros, View, check_index, rebuild_index,
};
use futures_util::StreamExt;

use crate::support::wait_until;

const HOUR: Duration = Duration::from_secs(3600);

fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

fn open(folder: &Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions::default()).unwrap()
}

fn open_with(folder: &Path, retention: RetentionPolicy) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions { retention, ..FileStoreOptions::default() }).unwrap()
}

/// A run that ended so long ago, with so many kB of output.
fn ended(store: &dyn LogStore, run: &str, ago: Duration, kb: usize) {
    let mut writer = store.start(RunSpec::new(id(run))).unwrap();
    for line in 0..kb * 10 {
        writer.append(Stream::Stdout, format!("{line:099}\n").as_bytes()).unwrap();
    }
    let ended_at = UnixMicros(UnixMicros::now().0 - u64::try_from(ago.as_micros()).unwrap());
    writer.finish(RunEnd { ended_at, ..RunEnd::now(Outcome::Exited(Exit::Code(0))) }).unwrap();
}

/// Runs `1` to `count`, of which the first ended first; 100 kB each.
fn ended_by_the_hour(store: &dyn LogStore, count: u32) {
    for run in 1..=count {
        ended(store, &run.to_string(), HOUR * (count + 1 - run), 100);
    }
}

fn older_than(age: Duration) -> GcRequest {
    GcRequest { older_than: Some(age), ..GcRequest::default() }
}

fn at_most(bytes: u64) -> GcRequest {
    GcRequest { max_bytes: Some(bytes), ..GcRequest::default() }
}

/// All that can go.
fn all() -> GcRequest {
    at_most(1)
}

fn evicted(report: &GcReport) -> Vec<&str> {
    report.evicted.iter().map(|run| run.id.as_str()).collect()
}

fn left(store: &dyn LogStore) -> Vec<String> {
    let runs = store.runs(&RunQuery::default()).unwrap().runs;
    let mut ids: Vec<_> = runs.iter().map(|run| run.id().to_string()).collect();
    ids.sort();
    ids
}

#[track_caller]
fn tombstone(store: &dyn LogStore, run: &str) -> Tombstone {
    match store.run(&id(run)) {
        Err(LogError::Evicted(stone)) => *stone,
        other => panic!("{run} is not evicted: {other:?}"),
    }
}

/// Bytes on disk of everything below a folder, as `du` counts them.
fn used(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let of = |entry: fs::DirEntry| match entry.file_type().unwrap().is_dir() {
        true => used(&entry.path()) + entry.metadata().unwrap().blocks() * 512,
        false => entry.metadata().unwrap().blocks() * 512,
    };
    entries.map(of).sum()
}

fn trash(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("trash")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn findings(folder: &Path) -> Vec<FindingKind> {
    let report = check_index(folder, CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    report.findings.iter().map(|finding| finding.kind).collect()
}

#[test]
fn runs_older_than_the_limit_go_oldest_first_and_leave_a_tombstone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 5);
    let report = store.gc(&older_than(HOUR * 5 / 2)).unwrap();
    assert_eq!(evicted(&report), ["1", "2", "3"]);
    assert!(report.evicted.iter().all(|run| run.reason == EvictionReason::Expired && run.bytes > 100_000));
    assert_eq!(left(&store), ["4", "5"]);
    let stone = tombstone(&store, "2");
    assert_eq!((stone.lines, stone.bytes), (1_000, 100_000));
    assert_eq!(stone.reason, "older than 150 minutes");
    assert!(UnixMicros::now().millis_since(stone.evicted_at) < 60_000);
    assert!(!folder.path().join("job_runs/2").exists());
    assert_eq!(trash(folder.path()), [""; 0]);
    assert!(matches!(store.run(&id("never")), Err(LogError::NotFound { .. })));
    assert!(matches!(store.start(RunSpec::new(id("2"))), Err(LogError::AlreadyExists { .. })));
    store.close().unwrap();
    assert_eq!(findings(folder.path()), []);
    assert_eq!(tombstone(&open(folder.path()), "2"), stone);
}

#[test]
fn the_cap_counts_everything_by_blocks_and_takes_no_more_than_it_must() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 6);
    let request = GcRequest { dry_run: true, ..at_most(u64::MAX) };
    let before = store.gc(&request).unwrap().bytes_after;
    let disk = used(folder.path());
    assert!(before.abs_diff(disk) <= 64 * 1024, "{before} bytes by the index, {disk} by the disk");
    // 150 kB less: that takes two of the oldest.
    let report = store.gc(&at_most(before - 150_000)).unwrap();
    assert_eq!(evicted(&report), ["1", "2"]);
    assert!(report.evicted.iter().all(|run| run.reason == EvictionReason::SizeCap));
    assert!(report.bytes_after <= before - 150_000);
    assert!(used(folder.path()).abs_diff(report.bytes_after) <= 64 * 1024);
    assert!(tombstone(&store, "1").reason.starts_with("the log folder took up more than "));
    assert_eq!(evicted(&store.gc(&at_most(before - 150_000)).unwrap()), [""; 0]);
}

#[test]
fn the_newest_runs_are_kept_whatever_the_limits_say() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 5);
    let request = GcRequest { keep_last: Some(2), older_than: Some(Duration::from_secs(1)), ..all() };
    assert_eq!(evicted(&store.gc(&request).unwrap()), ["1", "2", "3"]);
    assert_eq!(evicted(&store.gc(&request).unwrap()), [""; 0]);
    assert_eq!(left(&store), ["4", "5"]);
}

#[test]
fn a_run_that_goes_on_is_never_evicted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    let mut own = store.start(RunSpec::new(id("own"))).unwrap();
    let mut foreign = other.start(RunSpec::new(id("foreign"))).unwrap();
    own.append(Stream::Stdout, &[b'\n'; 100_000]).unwrap();
    foreign.append(Stream::Stdout, &[b'\n'; 100_000]).unwrap();
    wait_until("both are known", || left(&store) == ["foreign", "own"]);
    let request = GcRequest { older_than: Some(Duration::from_nanos(1)), ..all() };
    assert_eq!(evicted(&store.gc(&request).unwrap()), [""; 0]);
    own.finish(RunEnd::now(Outcome::Lost)).unwrap();
    foreign.finish(RunEnd::now(Outcome::Lost)).unwrap();
    wait_until("both are gone", || {
        store.gc(&request).unwrap();
        left(&store).is_empty()
    });
}

#[test]
fn a_dry_run_says_the_same_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 4);
    let request = older_than(HOUR * 5 / 2);
    let said = store.gc(&GcRequest { dry_run: true, ..request }).unwrap();
    assert_eq!((evicted(&said), said.dry_run), (vec!["1", "2"], true));
    assert_eq!(left(&store), ["1", "2", "3", "4"]);
    assert!(!folder.path().join("trash").exists());
    let done = store.gc(&request).unwrap();
    assert_eq!((&done.evicted, done.kept.len()), (&said.evicted, 0));
}

#[test]
fn the_policy_is_kept_after_each_end_without_being_asked() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 3);
    store.close().unwrap();
    drop(store);
    let store =
        open_with(folder.path(), RetentionPolicy { max_age: Some(HOUR * 3 / 2), ..RetentionPolicy::OFF });
    wait_until("what is old is gone when the store is opened", || left(&store) == ["3"]);
    ended(&store, "late", HOUR * 9, 1);
    wait_until("what ended is looked at", || matches!(store.run(&id("late")), Err(LogError::Evicted(_))));
    assert_eq!(left(&store), ["3"]);
}

#[test]
fn a_library_that_was_not_told_to_evicts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended(&store, "old", HOUR * 24 * 400, 1);
    assert_eq!(evicted(&store.gc(&GcRequest::default()).unwrap()), [""; 0]);
    let by_folder = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    assert!(matches!(by_folder.gc(&all()), Err(LogError::Unsupported { .. })));
    let memory = databuild_logs::MemoryLogStore::new();
    assert!(matches!(memory.gc(&all()), Err(LogError::Unsupported { .. })));
    assert!(matches!(memory.set_pinned(&id("x"), true), Err(LogError::Unsupported { .. })));
}

#[test]
fn stores_that_wrap_others_pass_it_on() {
    use databuild_logs::{BufferOptions, BufferedLogStore, CompositeLogStore, CompositeOptions, Member};
    let folder = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(open(folder.path()));
    let memory = std::sync::Arc::new(databuild_logs::MemoryLogStore::new());
    ended_by_the_hour(&*store, 2);
    left(&*store);
    let members = [Member::required("memory", memory), Member::required("files", store)];
    let both = CompositeLogStore::new(members, CompositeOptions::default()).unwrap();
    let all_of_them = BufferedLogStore::new(std::sync::Arc::new(both), BufferOptions::default());
    all_of_them.set_pinned(&id("1"), true).unwrap();
    assert_eq!(evicted(&all_of_them.gc(&all()).unwrap()), ["2"]);
}

/// Reads some of a run, has it evicted, and reads the rest: lines seen, and the end.
async fn evicted_under_reader(view: View, follow: bool) -> (u64, ReadEnd) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    for line in 1..=20_000 {
        writer.append(Stream::Stdout, format!("{line:099}\n").as_bytes()).unwrap();
    }
    writer.append(Stream::Stderr, b"and an error\n").unwrap();
    writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(3)))).unwrap();
    wait_until("the index has it", || {
        evicted(&store.gc(&GcRequest { dry_run: true, ..all() }).unwrap()) == ["r"]
    });
    let mut events = store.read(&id("r"), ReadOptions { follow, ..ReadOptions::new(view) }).unwrap();
    let mut lines = 0;
    let mut gone = false;
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => lines += batch.lines,
            ReadEvent::End(end) => {
                assert!(gone);
                return (lines, end);
            }
            gap @ ReadEvent::Gap { .. } => panic!("{gap:?}"),
        }
        if !gone {
            assert_eq!(evicted(&store.gc(&all()).unwrap()), ["r"]);
            gone = true;
            let again = store.read(&id("r"), ReadOptions { follow, ..ReadOptions::new(view) });
            assert!(matches!(again.err(), Some(LogError::Evicted(_))));
        }
    }
    panic!("no end");
}

#[tokio::test]
async fn who_has_the_file_open_reads_it_to_its_end() {
    let (lines, end) = evicted_under_reader(View::STDOUT, false).await;
    assert_eq!(lines, 20_000);
    assert!(matches!(end, ReadEnd::Complete(run) if run.state.exit() == Some(Exit::Code(3))));
}

#[tokio::test]
async fn who_follows_is_told_that_the_run_is_evicted() {
    let (lines, end) = evicted_under_reader(View::STDOUT, true).await;
    assert_eq!(lines, 20_000, "after what could be read");
    assert!(matches!(end, ReadEnd::Evicted(stone) if stone.lines == 20_001));
}

#[tokio::test]
async fn a_file_that_went_before_it_was_opened_is_an_eviction_and_no_hole() {
    let (lines, end) = evicted_under_reader(View::All, false).await;
    assert_eq!(lines, 20_000, "standard error was not opened yet");
    assert!(matches!(end, ReadEnd::Evicted(_)), "{end:?}");
}

#[test]
fn only_what_the_store_made_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("precious"), "x").unwrap();
    let store = open(folder.path());
    ended(&store, "r", HOUR, 1);
    let run = folder.path().join("job_runs/r");
    fs::write(run.join("notes.txt"), "by somebody").unwrap();
    fs::create_dir(run.join("core")).unwrap();
    fs::write(run.join("core/dump"), "x").unwrap();
    symlink(outside.path(), run.join("link")).unwrap();
    fs::remove_file(run.join("stderr.log")).unwrap();
    symlink(outside.path().join("precious"), run.join("stderr.log")).unwrap();
    assert_eq!(evicted(&store.gc(&all()).unwrap()), ["r"]);
    assert_eq!(tombstone(&store, "r").lines, 10);
    assert!(!run.exists());
    let [kept] = trash(folder.path()).try_into().unwrap();
    assert!(kept.starts_with("r.") && kept.ends_with("-size_cap"), "{kept}");
    let kept = folder.path().join("trash").join(kept);
    let mut names: Vec<_> = fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["core", "link", "notes.txt", "stderr.log"]);
    assert_eq!(fs::read(kept.join("core/dump")).unwrap(), b"x");
    assert_eq!(fs::read(outside.path().join("precious")).unwrap(), b"x");
    // It stays for as long as nobody takes it away, and is no run.
    store.close().unwrap();
    drop(store);
    assert_eq!(findings(folder.path()), []);
    let store = open(folder.path());
    assert_eq!(left(&store), [""; 0]);
    assert_eq!(tombstone(&store, "r").lines, 10);
    assert!(kept.join("notes.txt").exists());
}

#[test]
fn a_link_in_the_place_of_a_run_is_neither_followed_nor_removed() {
    let folder = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended(&store, "1", HOUR * 2, 1);
    ended(&store, "2", HOUR, 1);
    left(&store);
    let run = folder.path().join("job_runs/1");
    let elsewhere = outside.path().join("moved");
    fs::rename(&run, &elsewhere).unwrap();
    symlink(&elsewhere, &run).unwrap();
    let report = store.gc(&all()).unwrap();
    assert_eq!(evicted(&report), ["2"], "others go in its place");
    assert_eq!(report.kept.len(), 1);
    assert!(report.kept[0].id == id("1") && report.kept[0].why.contains("link"), "{report:?}");
    assert!(fs::symlink_metadata(&run).unwrap().is_symlink());
    assert!(elsewhere.join("stdout.log").exists());
    wait_until("the index forgets it", || matches!(store.run(&id("1")), Err(LogError::NotFound { .. })));
}

#[test]
fn sums_that_are_wrong_are_found_and_mended() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 3);
    store.close().unwrap();
    drop(store);
    assert_eq!(findings(folder.path()), []);
    // Somebody puts 4 MB beside the log of a run.
    fs::write(folder.path().join("job_runs/2/core"), vec![b'x'; 4_000_000]).unwrap();
    assert_eq!(findings(folder.path()), [FindingKind::TotalsDiffer]);
    let report = check_index(folder.path(), CheckOptions { deep: false, repair: true }, |_| ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(findings(folder.path()), []);
    let store = open(folder.path());
    let bytes = store.gc(&GcRequest { dry_run: true, ..GcRequest::default() }).unwrap().bytes_after;
    assert!(bytes > 4_000_000 && bytes.abs_diff(used(folder.path())) < 64 * 1024, "{bytes}");
}

#[test]
fn a_rebuild_keeps_tombstones_and_adds_up_anew() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 4);
    store.gc(&older_than(HOUR * 5 / 2)).unwrap();
    let dry = GcRequest { dry_run: true, ..GcRequest::default() };
    let stone = tombstone(&store, "1");
    store.close().unwrap();
    drop(store);
    let report = rebuild_index(folder.path(), |_| ()).unwrap();
    assert_eq!((report.runs, report.tombstones), (2, 2));
    let store = open(folder.path());
    assert_eq!(tombstone(&store, "1"), stone);
    let bytes = store.gc(&dry).unwrap().bytes_after;
    assert!(bytes.abs_diff(used(folder.path())) < 64 * 1024, "{bytes}");
}
