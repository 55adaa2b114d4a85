//! Runs that are never evicted.

use super::*;

fn pinned(store: &dyn LogStore) -> Vec<String> {
    let mut ids: Vec<_> =
        store.runs(&RunQuery::default()).unwrap().pinned.iter().map(ToString::to_string).collect();
    ids.sort();
    ids
}

#[test]
fn a_pinned_run_stays_until_its_pin_is_taken_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 3);
    left(&store);
    store.set_pinned(&id("1"), true).unwrap();
    store.set_pinned(&id("1"), true).unwrap();
    assert_eq!(pinned(&store), ["1"]);
    let report = store.gc(&all()).unwrap();
    assert_eq!((evicted(&report), report.kept.len()), (vec!["2", "3"], 0), "it is not even looked at");
    assert!(report.bytes_after > 100_000, "what is pinned counts");
    assert_eq!(left(&store), ["1"]);
    store.set_pinned(&id("1"), false).unwrap();
    store.set_pinned(&id("1"), false).unwrap();
    assert_eq!(pinned(&store), [""; 0]);
    assert_eq!(evicted(&store.gc(&all()).unwrap()), ["1"]);
    for pin in [true, false] {
        assert!(matches!(store.set_pinned(&id("1"), pin), Err(LogError::Evicted(_))));
        assert!(matches!(store.set_pinned(&id("never"), pin), Err(LogError::NotFound { .. })));
    }
}

#[test]
fn a_run_that_goes_on_can_be_pinned() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let writer = store.start(RunSpec::new(id("r"))).unwrap();
    store.set_pinned(&id("r"), true).unwrap();
    writer.finish(RunEnd::now(Outcome::Lost)).unwrap();
    assert_eq!(evicted(&store.gc(&all()).unwrap()), [""; 0]);
    assert_eq!((left(&store), pinned(&store)), (vec!["r".to_owned()], vec!["r".to_owned()]));
    store.close().unwrap();
    drop(store);
    assert_eq!(findings(folder.path()), []);
}

#[test]
fn a_pin_outlives_the_store_and_its_index() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 2);
    left(&store);
    store.set_pinned(&id("1"), true).unwrap();
    let stays = |store: FileLogStore| {
        assert_eq!(pinned(&store), ["1"]);
        let report = store.gc(&GcRequest { dry_run: true, ..all() }).unwrap();
        assert_eq!(evicted(&report), ["2"]);
        store.close().unwrap();
    };
    stays(store);
    stays(open(folder.path()));
    rebuild_index(folder.path(), |_| ()).unwrap();
    assert_eq!(findings(folder.path()), []);
    stays(open(folder.path()));
    fs::remove_file(folder.path().join("index.redb")).unwrap();
    stays(open(folder.path()));
}

#[test]
fn a_pin_that_the_index_has_not_heard_of_holds_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 2);
    left(&store);
    // As a process without the index does it, or `touch`.
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    other.set_pinned(&id("1"), true).unwrap();
    assert_eq!(pinned(&other), ["1"]);
    let report = store.gc(&all()).unwrap();
    assert_eq!(evicted(&report), ["2"]);
    assert!(report.kept.len() == 1 && report.kept[0].why == "it is pinned", "{report:?}");
    assert_eq!(store.gc(&all()).unwrap().kept, [], "the index knows by now");
    store.close().unwrap();
    drop(store);
    assert_eq!(findings(folder.path()), []);
    fs::remove_file(folder.path().join("job_runs/1/pinned")).unwrap();
    assert_eq!(findings(folder.path()), [FindingKind::RecordDiffers]);
    check_index(folder.path(), CheckOptions { deep: false, repair: true }, |_| ()).unwrap();
    assert_eq!(evicted(&open(folder.path()).gc(&all()).unwrap()), ["1"]);
}
