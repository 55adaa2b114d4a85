//! Runs whose turn it is and that can't go.

use std::sync::Arc;

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
    assert!(shared.hindrance(index, &record, 1, false).unwrap().contains("the log folder"));
    assert!(shared.runs().forgotten.is_empty());
    fs::rename(&away, &logs).unwrap();
    fs::remove_dir_all(shared.layout.run(&id).path()).unwrap();
    assert!(shared.hindrance(index, &record, 1, false).unwrap().contains("its folder"));
    assert_eq!(shared.runs().forgotten, [1]);
}
