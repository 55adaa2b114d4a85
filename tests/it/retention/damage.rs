//! A bit of the index is wrong, in a row that has no checksum: no run goes because of it.

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::*;

const EVICTABLE: TableDefinition<'_, (u64, u64), u64> = TableDefinition::new("evictable");
const TOTALS: TableDefinition<'_, &str, u64> = TableDefinition::new("totals");

/// 35 TB, or more than a year.
const BIT: u64 = 1 << 45;

/// Four runs that ended within the last hours, and no service.
fn four_runs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 4);
    store.close().unwrap();
    folder
}

/// What takes up more than there is.
fn wrong_sum(folder: &Path) {
    let database = Database::open(folder.join("index.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut totals = transaction.open_table(TOTALS).unwrap();
        let sum = totals.get("finished_bytes").unwrap().unwrap().value();
        totals.insert("finished_bytes", sum ^ BIT).unwrap();
    }
    transaction.commit().unwrap();
}

/// A run that takes up more than there is, by its row.
fn wrong_size(folder: &Path) {
    change_first(folder, |at, bytes| (at, bytes ^ BIT));
}

/// A run that ended long ago.
fn wrong_end(folder: &Path) {
    change_first(folder, |(ended, number), bytes| ((ended ^ BIT, number), bytes));
}

/// The row of a run that there is not.
fn no_number(folder: &Path) {
    change_first(folder, |(ended, number), bytes| ((ended, number ^ BIT), bytes));
}

/// The row of another run.
fn wrong_number(folder: &Path) {
    change_first(folder, |(ended, number), bytes| ((ended, number ^ 2), bytes));
}

fn change_first(folder: &Path, change: impl FnOnce((u64, u64), u64) -> ((u64, u64), u64)) {
    let database = Database::open(folder.join("index.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut rows = transaction.open_table(EVICTABLE).unwrap();
        let (at, bytes) = rows.pop_first().unwrap().map(|(at, bytes)| (at.value(), bytes.value())).unwrap();
        let (at, bytes) = change(at, bytes);
        rows.insert(at, bytes).unwrap();
    }
    transaction.commit().unwrap();
}

fn moved_aside(folder: &Path) -> usize {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with("index.redb.corrupt-")).count()
}

/// A service with the limits that it has when it is told nothing.
fn serve(folder: &Path) -> FileLogStore {
    open_with(folder, RetentionPolicy::OF_SERVICE)
}

#[test]
fn a_wrong_bit_in_what_eviction_goes_by_evicts_nothing_and_the_index_is_made_anew() {
    for damage in [wrong_sum, wrong_end] {
        let folder = four_runs();
        damage(folder.path());
        let store = serve(folder.path());
        wait_until("the index is moved aside", || moved_aside(folder.path()) == 1);
        wait_until("all runs are known again", || left(&store) == ["1", "2", "3", "4"]);
        let report = store.gc(&GcRequest::default()).unwrap();
        assert_eq!((evicted(&report), report.bytes_after < 2_000_000), (vec![], true), "{report:?}");
        store.close().unwrap();
        drop(store);
        assert_eq!((findings(folder.path()), trash(folder.path())), (vec![], vec![]));
    }
}

#[test]
fn a_request_finds_a_wrong_bit_too_and_is_carried_out_by_the_new_index() {
    for damage in [wrong_sum, wrong_size, wrong_end, wrong_number, no_number] {
        let folder = four_runs();
        damage(folder.path());
        let store = open(folder.path());
        let report = store.gc(&GcRequest { dry_run: true, ..older_than(HOUR * 24) }).unwrap();
        assert_eq!(evicted(&report), [""; 0], "{report:?}");
        let report = store.gc(&GcRequest { older_than: Some(HOUR * 7 / 2), ..at_most(10_000_000) }).unwrap();
        assert_eq!(evicted(&report), ["1"], "{report:?}");
        assert_eq!(evicted(&store.gc(&GcRequest { keep_last: Some(2), ..all() }).unwrap()), ["2"]);
        assert_eq!(left(&store), ["3", "4"]);
        store.close().unwrap();
        drop(store);
        assert_eq!((findings(folder.path()), moved_aside(folder.path())), (vec![], 1));
    }
}

#[test]
fn a_check_finds_a_wrong_bit_in_what_eviction_goes_by_and_mends_it() {
    for damage in [wrong_sum, wrong_size, wrong_end, wrong_number, no_number] {
        let folder = four_runs();
        damage(folder.path());
        assert_ne!(findings(folder.path()), []);
        let report = check_index(folder.path(), CheckOptions { deep: false, repair: true }, |_| ()).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(findings(folder.path()), []);
        let store = serve(folder.path());
        assert_eq!(evicted(&store.gc(&GcRequest::default()).unwrap()), [""; 0]);
        assert_eq!(left(&store), ["1", "2", "3", "4"]);
    }
}

/// Where in the file the rows stand that eviction goes by: keys and values of each run, and the sum.
fn places(folder: &Path) -> Vec<usize> {
    let path = folder.join("index.redb");
    let mut patterns = Vec::new();
    {
        let database = Database::open(&path).unwrap();
        let transaction = database.begin_read().unwrap();
        for row in transaction.open_table(EVICTABLE).unwrap().iter().unwrap() {
            let (at, bytes) = row.unwrap();
            let (ended, number) = at.value();
            patterns.push([ended.to_le_bytes(), number.to_le_bytes()].concat());
            patterns.push(bytes.value().to_le_bytes().to_vec());
        }
        let sum = transaction.open_table(TOTALS).unwrap().get("finished_bytes").unwrap().unwrap().value();
        patterns.push(sum.to_le_bytes().to_vec());
    }
    let file = fs::read(path).unwrap();
    let mut places = Vec::new();
    for pattern in patterns {
        let found = (0..file.len() - pattern.len()).filter(|&at| file[at..].starts_with(&pattern));
        places.extend(found.flat_map(|at| at..at + pattern.len()));
    }
    places.sort_unstable();
    places.dedup();
    places
}

/// As a disk does it, with no regard to the order of the rows.
#[test]
fn no_bit_of_what_eviction_goes_by_takes_a_run_that_is_to_stay() {
    let folder = four_runs();
    let places = places(folder.path());
    let sound = fs::read(folder.path().join("index.redb")).unwrap();
    let mut made_anew = 0;
    for (round, at) in places.iter().enumerate().filter(|(round, _)| round % 2 == 0) {
        let copy = tempfile::tempdir().unwrap();
        crate::support::copy_folder(folder.path(), copy.path());
        let bit = (round / 2 * 5 + at) % 8;
        let mut flipped = sound.clone();
        flipped[*at] ^= 1 << bit;
        fs::write(copy.path().join("index.redb"), flipped).unwrap();
        let what = format!("bit {bit} of byte {at}");
        let store = open(copy.path());
        // The first ended four hours ago.
        let requests =
            [older_than(HOUR * 24), at_most(10_000_000_000), GcRequest { keep_last: Some(3), ..all() }];
        for (request, may_go) in requests.iter().zip([&[][..], &[], &["1"]]) {
            match store.gc(request) {
                Ok(report) => assert!(evicted(&report).iter().all(|run| may_go.contains(run)), "{what}"),
                Err(LogError::Index { .. }) => {}
                Err(error) => panic!("{what}: {error}"),
            }
        }
        for run in ["2", "3", "4"] {
            assert_eq!(store.run(&id(run)).unwrap().stdout.lines, 1_000, "{what}");
        }
        made_anew += moved_aside(copy.path());
        drop(store.close());
    }
    assert!(made_anew > 20, "{made_anew} of {}", places.len() / 2);
}
