//! The index is damaged or taken away, before a service opens it and under one that serves.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use databuild_logs::{
    CheckOptions, FileLogStore, FileStoreOptions, LogError, LogStore, RunQuery, RunSpec, Stream, check_index,
};
use redb::{Database, ReadableTable, TableDefinition};

use super::{assert_numbered, dump, id, index_file, lines, numbered, open, quarantined, success};
use crate::support::wait_until;

const LINES: u64 = 4_000;

/// A folder with three runs of [`LINES`] lines, and no service.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ["a", "b", "c"].iter().for_each(|run| numbered(&store, run, LINES));
    store.close().unwrap();
    folder
}

fn ids(store: &dyn LogStore) -> Vec<String> {
    let runs = store.runs(&RunQuery::default()).unwrap().runs;
    runs.iter().map(|run| run.id().to_string()).collect()
}

async fn all_is_right(store: &dyn LogStore) {
    assert_eq!(ids(store), ["c", "b", "a"]);
    for run in ["a", "b", "c"] {
        assert_numbered(store, run, LINES).await;
    }
}

/// A service whose rescan comes soon.
fn watchful(folder: &Path) -> FileLogStore {
    let soon = Duration::from_millis(50);
    let options =
        FileStoreOptions { liveness_interval: soon, rescan_interval: soon, ..FileStoreOptions::default() };
    FileLogStore::open(folder, options).unwrap()
}

#[tokio::test]
async fn what_is_no_file_is_moved_aside_as_what_is_damaged() {
    for way in ["open", "rebuild", "repair"] {
        let folder = folder();
        let path = index_file(folder.path());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        match way {
            "rebuild" => drop(databuild_logs::rebuild_index(folder.path(), |_| ()).unwrap()),
            "repair" => {
                let options = CheckOptions { deep: false, repair: true };
                assert!(check_index(folder.path(), options, |_| ()).unwrap().is_clean());
            }
            _ => {}
        }
        all_is_right(&open(folder.path())).await;
        assert_eq!(quarantined(folder.path()), 1, "{way}");
    }
}

#[tokio::test]
async fn what_is_neither_file_nor_folder_is_moved_aside_too() {
    for way in ["open", "rebuild"] {
        let folder = folder();
        let path = index_file(folder.path());
        fs::remove_file(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        if way == "rebuild" {
            databuild_logs::rebuild_index(folder.path(), |_| ()).unwrap();
        }
        all_is_right(&open(folder.path())).await;
        assert_eq!(quarantined(folder.path()), 1, "{way}");
    }
}

/// A folder in the place of the index is somebody's, with something in it.
#[test]
fn of_what_was_moved_aside_files_are_removed_at_last_and_folders_stay() {
    let folder = folder();
    let path = index_file(folder.path());
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("notes.txt"), "mine").unwrap();
    open(folder.path()).close().unwrap();
    for _ in 0..5 {
        fs::write(&path, [0; 8192]).unwrap();
        open(folder.path()).close().unwrap();
    }
    assert_eq!(quarantined(folder.path()), 3 + 1);
    let entries = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(entries.filter(|path| path.join("notes.txt").exists()).count(), 1);
}

#[tokio::test]
async fn an_index_of_another_format_is_moved_aside_and_made_anew() {
    let folder = folder();
    // Names come first in a page, and then what they stand for.
    let path = index_file(folder.path());
    let mut bytes = fs::read(&path).unwrap();
    let row = b"completeformat\x01\x01\0\0\0";
    let places: Vec<_> = (0..bytes.len() - row.len()).filter(|&at| bytes[at..].starts_with(row)).collect();
    assert!(!places.is_empty());
    places.into_iter().for_each(|at| bytes[at + row.len() - 4] = 99);
    fs::write(&path, bytes).unwrap();
    let store = open(folder.path());
    assert_eq!(quarantined(folder.path()), 1);
    all_is_right(&store).await;
}

#[tokio::test]
async fn an_index_cut_anywhere_is_made_anew() {
    for part in [1, 3, 6, 7] {
        let folder = folder();
        let file = OpenOptions::new().write(true).open(index_file(folder.path())).unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(length * part / 8).unwrap();
        all_is_right(&open(folder.path())).await;
    }
}

#[tokio::test]
async fn an_index_of_zeros_and_one_of_nothing_are_made_anew() {
    for content in [Vec::new(), vec![0; 100_000]] {
        let folder = folder();
        fs::write(index_file(folder.path()), content).unwrap();
        all_is_right(&open(folder.path())).await;
        assert_eq!(quarantined(folder.path()), 1);
    }
}

#[tokio::test]
async fn an_old_index_in_place_of_the_new_one_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old.redb");
    {
        let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
        let mut live = other.start(RunSpec::new(id("b"))).unwrap();
        let store = open(folder.path());
        numbered(&store, "a", LINES);
        numbered(&store, "gone", 5);
        store.run(&id("b")).unwrap();
        store.close().unwrap();
        fs::copy(index_file(folder.path()), &old).unwrap();
        let text: String = (1..=LINES).map(|n| format!("{n:079}\n")).collect();
        live.append(Stream::Stdout, text.as_bytes()).unwrap();
        live.finish(success()).unwrap();
        let store = open(folder.path());
        numbered(&store, "c", LINES);
        store.close().unwrap();
    }
    fs::remove_dir_all(folder.path().join("job_runs/gone")).unwrap();
    fs::rename(old, index_file(folder.path())).unwrap();
    let store = open(folder.path());
    store.runs(&RunQuery::default()).unwrap();
    store.close().unwrap();
    let store = open(folder.path());
    let mut found = ids(&store);
    found.sort();
    assert_eq!(found, ["a", "b", "c"]);
    for run in ["a", "b", "c"] {
        assert_numbered(&store, run, LINES).await;
    }
    store.close().unwrap();
    let repaired = dump(folder.path());
    databuild_logs::rebuild_index(folder.path(), |_| ()).unwrap();
    assert_eq!(dump(folder.path()), repaired);
}

#[tokio::test]
async fn an_index_deleted_under_a_service_is_noticed_and_made_anew() {
    let folder = folder();
    let store = watchful(folder.path());
    ids(&store);
    let mut live = store.start(RunSpec::new(id("live"))).unwrap();
    live.append(Stream::Stdout, &b"a line\n".repeat(30_000)).unwrap();
    fs::remove_file(index_file(folder.path())).unwrap();
    wait_until("there is an index again", || index_file(folder.path()).exists());
    assert_eq!(ids(&store), ["live", "c", "b", "a"]);
    live.append(Stream::Stdout, b"the last\n").unwrap();
    live.finish(success()).unwrap();
    assert_eq!(lines(&store, "live", 30_000, 9).await.unwrap(), ["the last"]);
    for run in ["a", "b", "c"] {
        assert_numbered(&store, run, LINES).await;
    }
    store.close().unwrap();
    let made_anew = dump(folder.path());
    databuild_logs::rebuild_index(folder.path(), |_| ()).unwrap();
    assert_eq!(dump(folder.path()), made_anew, "nothing is missing in it");
}

#[tokio::test]
async fn an_index_overwritten_under_a_service_costs_no_line() {
    let folder = folder();
    let store = watchful(folder.path());
    let mut live = store.start(RunSpec::new(id("live"))).unwrap();
    let file = OpenOptions::new().write(true).open(index_file(folder.path())).unwrap();
    let length = file.metadata().unwrap().len();
    for page in 1..length / 4096 {
        file.write_all_at(&[0xa5; 4096], page * 4096).unwrap();
    }
    for n in 0..200 {
        live.append(Stream::Stdout, format!("{n}\n").as_bytes()).unwrap();
    }
    live.finish(success()).unwrap();
    for run in ["a", "b", "c"] {
        assert_numbered(&store, run, LINES).await;
    }
    assert_eq!(lines(&store, "live", 198, 9).await.unwrap(), ["198", "199"]);
    store.close().unwrap();
    let store = open(folder.path());
    assert_eq!(ids(&store).len(), 4);
    assert_numbered(&store, "b", LINES).await;
}

#[tokio::test]
async fn an_old_index_put_in_place_under_a_service_is_moved_aside() {
    let folder = folder();
    let old = folder.path().join("old.redb");
    fs::copy(index_file(folder.path()), &old).unwrap();
    let store = watchful(folder.path());
    numbered(&store, "d", LINES);
    fs::rename(old, index_file(folder.path())).unwrap();
    wait_until("it is moved aside", || quarantined(folder.path()) == 1);
    assert_eq!(ids(&store), ["d", "c", "b", "a"]);
    assert_numbered(&store, "d", LINES).await;
}

/// Many bits, one at a time: every answer is right, or an error that says so.
#[tokio::test]
async fn flipped_bits_never_give_a_wrong_line() {
    let folder = folder();
    let sound = fs::read(index_file(folder.path())).unwrap();
    // A file of a database is mostly empty: what is flipped has to be in use.
    let used: Vec<usize> = (0..sound.len()).filter(|&at| sound[at] != 0).collect();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut errors = 0;
    for _ in 0..60 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = used[usize::try_from(random >> 3).unwrap() % used.len()];
        let mut flipped = sound.clone();
        flipped[at] ^= 1 << (random % 8);
        fs::write(index_file(folder.path()), flipped).unwrap();
        let store = match FileLogStore::open(folder.path(), FileStoreOptions::default()) {
            Ok(store) => store,
            Err(LogError::Index { .. } | LogError::Io { .. }) => {
                errors += 1;
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        for run in ["a", "b", "c"] {
            for after in [0, 1_000, 2_500, LINES - 1] {
                match lines(&store, run, after, 1).await {
                    Ok(found) => assert_eq!(found, [format!("{:079}", after + 1)], "byte {at}"),
                    Err(LogError::Index { .. }) => errors += 1,
                    Err(error) => panic!("{error}, byte {at}"),
                }
            }
            assert_eq!(store.run(&id(run)).unwrap().stdout.lines, LINES, "byte {at}");
        }
        drop(store.close());
    }
    assert!(errors < 20, "most flips cost nothing but a look at the folders: {errors}");
}

/// Flips a bit in the middle of the record of run number `number`, so that only its checksum tells.
fn damage_record(folder: &Path, number: u64) {
    let runs = TableDefinition::<'_, u64, &[u8]>::new("runs");
    let database = Database::open(index_file(folder)).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(runs).unwrap();
        let mut record = table.get(number).unwrap().unwrap().value().to_vec();
        let middle = record.len() / 2;
        record[middle] ^= 1;
        table.insert(number, record.as_slice()).unwrap();
    }
    transaction.commit().unwrap();
}

#[tokio::test]
async fn one_damaged_record_of_a_run_fails_no_open_and_hides_no_run() {
    for number in 1..=3 {
        for is_read_first in [false, true] {
            let folder = folder();
            damage_record(folder.path(), number);
            let store = open(folder.path());
            if is_read_first {
                for run in ["a", "b", "c"] {
                    assert_numbered(&store, run, LINES).await;
                    assert_eq!(store.run(&id(run)).unwrap().stdout.lines, LINES);
                }
            }
            all_is_right(&store).await;
            store.close().unwrap();
            let report =
                check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
            assert_eq!(report.findings, [], "run {number} is in the index again");
        }
    }
}

#[tokio::test]
async fn a_damaged_record_of_a_run_is_found_and_mended_offline() {
    for number in 1..=3 {
        let folder = folder();
        damage_record(folder.path(), number);
        let check =
            |repair| check_index(folder.path(), CheckOptions { deep: false, repair }, |_| ()).unwrap();
        assert!(!check(false).is_clean(), "run {number}");
        assert!(check(true).is_clean(), "run {number}");
        assert_eq!(check(false).findings, [], "run {number}");
        all_is_right(&open(folder.path())).await;
    }
}

#[test]
fn a_second_service_is_refused_even_when_the_index_is_deleted() {
    let folder = folder();
    let store = open(folder.path());
    fs::remove_file(index_file(folder.path())).unwrap();
    let second = FileLogStore::open(folder.path(), FileStoreOptions::default());
    assert!(matches!(second.unwrap_err(), LogError::InUse { .. }));
    store.close().unwrap();
    open(folder.path());
}

/// Opening reads what was live, however much is stored.
#[test]
fn opening_looks_at_what_was_live_and_not_at_what_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    let store = open(folder.path());
    for run in 0..120 {
        numbered(&store, &format!("over-{run}"), 1);
    }
    let live = other.start(RunSpec::new(id("live"))).unwrap();
    store.run(&id("live")).unwrap();
    store.close().unwrap();
    // A journal that nobody may read is not missed as long as nobody looks at it.
    for run in 0..120 {
        let journal = folder.path().join(format!("job_runs/over-{run}/journal"));
        fs::remove_file(&journal).unwrap();
        fs::create_dir(&journal).unwrap();
    }
    let store = open(folder.path());
    assert_eq!(ids(&store).len(), 100, "a page of them");
    assert!(store.run(&id("over-7")).unwrap().state.is_over());
    assert!(!store.run(&id("live")).unwrap().state.is_over());
    drop(live);
}
