//! Runs whose turn it is and that can't go.

use std::sync::Arc;

use super::victims::Hindrance;
use super::*;
use crate::index::Known;
use crate::run::{Exit, JobRunId, RunSpec};
use crate::store::file::adopt::ForeignRun;
use crate::store::file::shared::Tracked;
use crate::store::file::{FileLogStore, FileStoreOptions};
use crate::store::{LogStore, Outcome, RunEnd};

#[test]
fn a_run_that_is_still_in_the_memory_of_the_store_goes_the_next_time() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    let id: JobRunId = "x".parse().unwrap();
    let long_ago = UnixMicros(UnixMicros::now().0 - 3_600_000_000);
    let end = RunEnd { ended_at: long_ago, ..RunEnd::now(Outcome::Exited(Exit::Code(0))) };
    store.start(RunSpec::new(id.clone())).unwrap().finish(end).unwrap();
    let shared = &store.shared;
    let index = shared.index_to_evict().unwrap();
    commit_all(shared, index);
    let policy = RetentionPolicy { max_age: Some(Duration::from_secs(60)), ..RetentionPolicy::OFF };
    let order = Order { policy, to_free: 0, dry_run: false, at_most: MOST_EVICTED };
    let mut turn = shared.evictions.none_for_now();
    let mut evict = || shared.evict(index, &mut turn, order).unwrap();

    let number = match index.find(&id).unwrap() {
        Some(Known::Run(number, _)) => number,
        other => panic!("{other:?}"),
    };
    let foreign = ForeignRun::open(&shared.layout, &id, Some(number), None).unwrap();
    shared.runs().by_id.insert(id.clone(), Tracked::Foreign(Arc::new(foreign)));
    for _ in 0..2 {
        let report = evict();
        assert!(report.evicted.is_empty());
        assert_eq!(report.kept.iter().map(|kept| &kept.id).collect::<Vec<_>>(), [&id]);
    }
    shared.runs().by_id.remove(&id);
    assert_eq!(evict().evicted.iter().map(|run| &run.id).collect::<Vec<_>>(), [&id]);
}

#[test]
fn what_went_before_the_store_was_closed_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    let id: JobRunId = "x".parse().unwrap();
    store.start(RunSpec::new(id.clone())).unwrap().finish(RunEnd::now(Outcome::Lost)).unwrap();
    let shared = &store.shared;
    let index = shared.index_to_evict().unwrap();
    commit_all(shared, index);
    let policy = RetentionPolicy { max_bytes: Some(1), ..RetentionPolicy::OFF };
    let order = Order { policy, to_free: 0, dry_run: false, at_most: MOST_EVICTED };
    let mut turn = shared.evictions.none_for_now();
    let (planned, _) = shared.planned(index, &turn, order, 2).unwrap();
    let mut report = GcReport::default();
    let victims = shared.look_at(index, &mut turn, planned, order, &mut report).unwrap();
    index.close().unwrap();
    let gone = shared.carry_out(index, &mut turn, victims, order, &mut report).unwrap();
    assert_eq!(gone.iter().map(|victim| &victim.stone.id).collect::<Vec<_>>(), [&id]);
    assert!(report.unfinished.is_some());
}

#[test]
fn a_run_that_went_with_the_whole_log_folder_is_not_forgotten() {
    let home = tempfile::tempdir().unwrap();
    let [logs, away] = ["logs", "away"].map(|name| home.path().join(name));
    let store = FileLogStore::open(&logs, FileStoreOptions::default()).unwrap();
    let id: JobRunId = "x".parse().unwrap();
    let end = RunEnd::now(Outcome::Exited(Exit::Code(0)));
    store.start(RunSpec::new(id.clone())).unwrap().finish(end).unwrap();
    let shared = &store.shared;
    let index = shared.index_to_evict().unwrap();
    commit_all(shared, index);
    let record = index.record(1).unwrap().unwrap();
    fs::rename(&logs, &away).unwrap();
    assert_eq!(shared.hindrance(index, &record, 1, false), Some(Hindrance::Away));
    assert!(shared.runs().forgotten.is_empty());
    fs::rename(&away, &logs).unwrap();
    fs::remove_dir_all(shared.layout.run(&id).path()).unwrap();
    assert_eq!(shared.hindrance(index, &record, 1, false), Some(Hindrance::NotThere));
    assert_eq!(shared.runs().forgotten, [1]);
}

/// Runs `r0`, `r1`, … that are over, each by so many hours longer than the one behind it.
fn runs_over(store: &FileLogStore, hours: &[u64]) -> Vec<JobRunId> {
    let now = UnixMicros::now().0;
    let ids: Vec<JobRunId> = (0..hours.len()).map(|number| format!("r{number}").parse().unwrap()).collect();
    for (id, hours) in ids.iter().zip(hours) {
        let ended_at = UnixMicros(now - hours * 3_600_000_000);
        let mut writer = store.start(RunSpec::new(id.clone())).unwrap();
        writer.append(crate::line::Stream::Stdout, &[b'x'; 10_000]).unwrap();
        writer.finish(RunEnd { ended_at, ..RunEnd::now(Outcome::Exited(Exit::Code(0))) }).unwrap();
    }
    commit_all(&store.shared, store.shared.index_to_evict().unwrap());
    ids
}

fn evicted(report: &GcReport) -> Vec<&str> {
    report.evicted.iter().map(|run| run.id.as_str()).collect()
}

#[test]
fn runs_whose_folders_somebody_removed_keep_no_other_from_going() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    let ids = runs_over(&store, &[9, 8, 7, 3, 2]);
    let shared = &store.shared;
    let index = shared.index_to_evict().unwrap();
    for id in &ids[..3] {
        fs::remove_dir_all(shared.layout.run(id).path()).unwrap();
    }
    let evict = |hours: u64, keep_last: u64| {
        let max_age = Some(Duration::from_secs(hours * 3_600));
        let policy = RetentionPolicy { max_age, keep_last, ..RetentionPolicy::OFF };
        let order = Order { policy, to_free: 0, dry_run: false, at_most: MOST_EVICTED };
        shared.evict(index, &mut shared.evictions.none_for_now(), order).unwrap()
    };
    let report = evict(5, 0);
    assert_eq!((evicted(&report), report.kept.len()), (vec![], 3));
    commit_all(shared, index);
    assert_eq!(index.totals().unwrap().evictable, 2);
    assert_eq!(evicted(&evict(1, 1)), ["r3"]);
    assert_eq!(evicted(&evict(1, 0)), ["r4"]);
}

#[test]
fn for_a_folder_that_is_not_there_no_other_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    let ids = runs_over(&store, &[9, 8, 7]);
    let shared = &store.shared;
    let index = shared.index_to_evict().unwrap();
    let mut turn = shared.evictions.none_for_now();
    let all = shared.bytes_of_all(index, &mut turn).unwrap();
    fs::remove_dir_all(shared.layout.run(&ids[0]).path()).unwrap();
    let policy = RetentionPolicy { max_bytes: Some(all - 1), ..RetentionPolicy::OFF };
    for dry_run in [true, false] {
        let order = Order { policy, to_free: 0, dry_run, at_most: MOST_EVICTED };
        let report = shared.evict(index, &mut turn, order).unwrap();
        assert_eq!((evicted(&report), report.kept.len()), (vec![], 1), "dry run: {dry_run}");
        assert!(report.bytes_after < all);
    }
}

#[test]
fn what_is_in_the_trash_is_told_of_under_the_name_that_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    let ids = runs_over(&store, &[2]);
    let shared = &store.shared;
    let index = shared.index_to_evict().unwrap();
    // A copy of a run, of which nobody but its folder knew, was evicted while there was no index.
    let copy = folder.path().join("trash").join("copy.1700000000000000-disk_full");
    fs::create_dir_all(&copy).unwrap();
    fs::copy(shared.layout.run(&ids[0]).metadata(), copy.join("metadata.json")).unwrap();
    shared.forget_what_was_seen();
    shared.keep_policy().unwrap();
    assert!(!copy.exists());
    assert!(matches!(index.find(&"copy".parse().unwrap()).unwrap(), Some(Known::Evicted(_))));
    assert!(matches!(index.find(&ids[0]).unwrap(), Some(Known::Run(..))));
    assert!(store.run(&ids[0]).is_ok());
}

#[test]
fn a_run_that_can_not_be_moved_back_is_not_removed_with_the_trash() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    // An id can look like the end of the name of an eviction.
    let id: JobRunId = "x.1700000000000000-expired".parse().unwrap();
    store.start(RunSpec::new(id.clone())).unwrap().finish(RunEnd::now(Outcome::Lost)).unwrap();
    let layout = &store.shared.layout;
    let trashed = layout.move_to_trash(&id, UnixMicros(1), "expired").unwrap();
    fs::create_dir(layout.run(&id).path()).unwrap();
    assert!(layout.take_back(&id, &trashed).is_err());
    assert!(!trashed.path().exists());
    assert!(layout.list_trash().unwrap().is_empty());
    assert_eq!(fs::read_dir(folder.path().join("trash")).unwrap().count(), 1);
}
