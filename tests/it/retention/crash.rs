//! An eviction that is cut short, after whatever step, is finished by whoever opens the folder next.

use super::*;
use crate::support::cli::Databuild;

/// A folder of three runs that no store has open; `1` is moved to the trash as an eviction does it.
fn moved_to_trash() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended_by_the_hour(&store, 3);
    store.close().unwrap();
    fs::create_dir(folder.path().join("trash")).unwrap();
    fs::rename(folder.path().join("job_runs/1"), folder.path().join("trash/1.1790000000000000-expired"))
        .unwrap();
    folder
}

/// What anybody finds after that.
fn finished(folder: &Path) {
    let store = open(folder);
    wait_until("the trash is empty", || trash(folder).is_empty());
    let stone = tombstone(&store, "1");
    assert_eq!(
        (stone.lines, stone.bytes, stone.evicted_at),
        (1_000, 100_000, UnixMicros(1_790_000_000_000_000))
    );
    assert_eq!(stone.reason, "older than runs are kept");
    assert_eq!(left(&store), ["2", "3"]);
    store.close().unwrap();
    drop(store);
    assert_eq!(findings(folder), []);
}

#[test]
fn after_the_move() {
    finished(moved_to_trash().path());
}

#[test]
fn after_the_logs_are_removed_on_a_full_disk() {
    let folder = moved_to_trash();
    for file in ["stdout.log", "stderr.log", "journal"] {
        fs::remove_file(folder.path().join("trash/1.1790000000000000-expired").join(file)).unwrap();
    }
    finished(folder.path());
}

#[test]
fn after_the_move_and_without_the_index() {
    let folder = moved_to_trash();
    fs::remove_file(folder.path().join("index.redb")).unwrap();
    finished(folder.path());
}

#[test]
fn after_the_commit_and_some_of_the_files() {
    let folder = moved_to_trash();
    let trashed = folder.path().join("trash/1.1790000000000000-expired");
    finished(folder.path());
    fs::create_dir(&trashed).unwrap();
    finished(folder.path());
    fs::create_dir(&trashed).unwrap();
    fs::write(trashed.join("journal"), "x").unwrap();
    finished(folder.path());
}

#[test]
fn a_check_finds_and_finishes_it_too() {
    let folder = moved_to_trash();
    let report = check_index(folder.path(), CheckOptions { deep: false, repair: true }, |_| ()).unwrap();
    assert_eq!(report.findings[0].kind, FindingKind::Leftover);
    assert!(report.is_clean(), "{report:?}");
    finished(folder.path());
}

#[test]
fn a_run_that_has_the_id_of_one_in_the_trash_is_left_alone() {
    let folder = moved_to_trash();
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    ended(&other, "1", Duration::ZERO, 2);
    let store = open(folder.path());
    wait_until("the trash is empty", || trash(folder.path()).is_empty());
    assert_eq!(left(&store), ["1", "2", "3"]);
    assert!(folder.path().join("job_runs/1/stdout.log").exists());
}

/// Kills `databuild gc` at every call that changes something, one after the other.
#[test]
fn killed_at_every_call_no_run_is_lost_by_half() {
    let mut kills = 0;
    for call in ["mkdir", "renameat2", "fdatasync", "unlink", "rmdir"] {
        for n in 1.. {
            assert!(n < 60, "{call} has no end");
            let databuild = Databuild::new();
            let logs = databuild.home.path().join("logs");
            let store = open(&logs);
            ended_by_the_hour(&store, 4);
            store.close().unwrap();
            drop(store);
            let killed = gc_killed_at(&databuild, &format!("{call}:when={n}"));
            let store = open(&logs);
            for run in ["1", "2", "3"] {
                match store.run(&id(run)) {
                    Ok(run) => assert_eq!(run.stdout.lines, 1_000, "{call} {n}"),
                    Err(LogError::Evicted(stone)) => assert_eq!(stone.lines, 1_000, "{call} {n}"),
                    // For as long as the trash is not looked at.
                    Err(LogError::NotFound { .. }) => {}
                    Err(error) => panic!("{call} {n}: {error}"),
                }
            }
            assert_eq!(store.run(&id("4")).unwrap().stdout.lines, 1_000, "{call} {n}");
            wait_until("the trash is empty", || trash(&logs).is_empty());
            store.gc(&GcRequest { keep_last: Some(1), ..all() }).unwrap();
            for run in ["1", "2", "3"] {
                assert_eq!(tombstone(&store, run).lines, 1_000, "{call} {n}");
            }
            assert_eq!(left(&store), ["4"], "{call} {n}");
            store.close().unwrap();
            drop(store);
            assert_eq!(findings(&logs), [], "{call} {n}");
            if !killed {
                break;
            }
            kills += 1;
        }
    }
    assert!(kills >= 15, "{kills} kills");
}

/// Runs `databuild gc` for all but one run; gives whether it was killed.
fn gc_killed_at(databuild: &Databuild, point: &str) -> bool {
    let logs = databuild.home.path().join("logs");
    let args = ["gc", "--max-size", "1", "--keep-last", "1", "--log-dir", logs.to_str().unwrap()];
    databuild.run_killed_at(point, &[], &args).code != Some(0)
}

/// What is in the trash alone tells of the run, and which of the two comes first changes nothing.
#[test]
fn a_repair_without_an_index_and_a_rebuild_keep_what_the_trash_tells() {
    let repair = |folder: &Path| {
        let report = check_index(folder, CheckOptions { deep: false, repair: true }, |_| ()).unwrap();
        assert!(report.is_clean(), "{report:?}");
    };
    let rebuild = |folder: &Path| assert_eq!(rebuild_index(folder, |_| ()).unwrap().tombstones, 1);
    for rebuilds_first in [false, true] {
        let folder = moved_to_trash();
        fs::remove_file(folder.path().join("index.redb")).unwrap();
        if rebuilds_first {
            rebuild(folder.path());
        }
        repair(folder.path());
        finished(folder.path());
    }
}
