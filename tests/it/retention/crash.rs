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

/// With runs beside it, and as the only thing that is left.
#[test]
fn a_check_without_the_index_finishes_it_when_there_is_one_again() {
    for others in [true, false] {
        let folder = moved_to_trash();
        if !others {
            ["2", "3"]
                .iter()
                .for_each(|run| fs::remove_dir_all(folder.path().join("job_runs").join(run)).unwrap());
        }
        fs::remove_file(folder.path().join("index.redb")).unwrap();
        let check =
            |repair| check_index(folder.path(), CheckOptions { deep: false, repair }, |_| ()).unwrap();
        let kinds: Vec<_> = check(false).findings.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [FindingKind::IndexMissing, FindingKind::Leftover]);
        assert_eq!(trash(folder.path()).len(), 1, "looking changes nothing");
        let report = check(true);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(trash(folder.path()), [""; 0]);
        assert_eq!(findings(folder.path()), []);
        let store = open(folder.path());
        assert_eq!(tombstone(&store, "1").lines, 1_000);
        assert_eq!(left(&store).len(), if others { 2 } else { 0 });
    }
}

/// What others put into the folder of an evicted run stays there, and is no eviction that was cut short.
#[test]
fn a_trash_that_holds_nothing_of_ours_asks_for_no_index() {
    let folder = tempfile::tempdir().unwrap();
    let trashed = folder.path().join("trash/1.1790000000000000-expired");
    fs::create_dir_all(&trashed).unwrap();
    fs::create_dir(folder.path().join("job_runs")).unwrap();
    fs::write(trashed.join("notes.txt"), "mine").unwrap();
    for repair in [false, true] {
        assert_eq!(
            check_index(folder.path(), CheckOptions { deep: false, repair }, |_| ()).unwrap().findings,
            []
        );
    }
    assert!(!folder.path().join("index.redb").exists() && trashed.join("notes.txt").exists());
}

#[test]
fn a_rebuild_keeps_what_is_left_of_runs_in_the_trash() {
    for has_index in [true, false] {
        let folder = moved_to_trash();
        if !has_index {
            fs::remove_file(folder.path().join("index.redb")).unwrap();
        }
        let report = rebuild_index(folder.path(), |_| ()).unwrap();
        assert_eq!((report.runs, report.tombstones), (2, 1));
        assert_eq!(trash(folder.path()).len(), 1, "its files are the next service's");
        // Known before anybody looks into the trash again.
        fs::rename(folder.path().join("trash"), folder.path().join("elsewhere")).unwrap();
        assert_eq!(tombstone(&open(folder.path()), "1").lines, 1_000);
        fs::rename(folder.path().join("elsewhere"), folder.path().join("trash")).unwrap();
        finished(folder.path());
    }
}

#[test]
fn a_run_that_has_the_id_of_one_in_the_trash_is_left_alone() {
    let folder = moved_to_trash();
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    ended(&other, "1", Duration::ZERO, 2);
    assert_eq!(rebuild_index(folder.path(), |_| ()).unwrap().tombstones, 0);
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
