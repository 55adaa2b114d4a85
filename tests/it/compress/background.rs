//! What the service does by itself, some time after a run has ended.

use std::time::{Duration, Instant};

use super::*;

fn compressing(folder: &Path, after: Duration) -> FileLogStore {
    FileLogStore::open(
        folder,
        FileStoreOptions { compress_after: Some(after), ..FileStoreOptions::default() },
    )
    .unwrap()
}

fn is_compressed(folder: &Path, run: &str) -> bool {
    !of_run(folder, run, "journal").exists() && !of_run(folder, run, "stdout.log").exists()
}

fn small_run(store: &dyn LogStore, run: &str) {
    let mut writer = store.start(RunSpec::new(id(run))).unwrap();
    writer.append(Stream::Stdout, "a line of output\n".repeat(500).as_bytes()).unwrap();
    writer.finish(success()).unwrap();
}

#[tokio::test]
async fn what_is_old_enough_is_compressed_and_what_is_not_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for run in 0..20 {
        small_run(&store, &format!("old-{run}"));
    }
    store.close().unwrap();
    let off = open(folder.path());
    std::thread::sleep(Duration::from_millis(1_500));
    assert!(!is_compressed(folder.path(), "old-0"), "off: nothing is compressed");
    off.close().unwrap();
    let later = compressing(folder.path(), Duration::from_secs(3_600));
    std::thread::sleep(Duration::from_millis(1_500));
    assert!(!is_compressed(folder.path(), "old-0"), "not yet");
    later.close().unwrap();

    let store = compressing(folder.path(), Duration::ZERO);
    let live = store.start(RunSpec::new(id("live"))).unwrap();
    wait_until("all that was there is compressed", || {
        (0..20).all(|run| is_compressed(folder.path(), &format!("old-{run}")))
    });
    small_run(&store, "new");
    wait_until("so is what ended since", || is_compressed(folder.path(), "new"));
    assert!(of_run(folder.path(), "live", "journal").exists());
    live.finish(success()).unwrap();
    wait_until("and the last one", || !of_run(folder.path(), "live", "journal").exists());
    store.close().unwrap();
    is_clean(folder.path());
    let known = |row: &serde_json::Value| row["table"] != "runs" || row["compressed"] == true;
    dump_index(folder.path(), |row| {
        assert!(known(&row), "the index knows of it: {row}");
        Ok(())
    })
    .unwrap();
}

#[tokio::test]
async fn a_run_that_is_read_is_left_for_later() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "read");
    small_run(&store, "other");
    store.close().unwrap();
    let store = FileLogStore::open(
        folder.path(),
        FileStoreOptions { compress_after: Some(Duration::from_millis(10)), ..FileStoreOptions::default() },
    );
    let store = store.unwrap();
    let mut events = store.read(&id("read"), ReadOptions::new(View::STDOUT)).unwrap();
    events.next().await.unwrap().unwrap();
    wait_until("the other one is compressed", || is_compressed(folder.path(), "other"));
    std::thread::sleep(Duration::from_millis(1_200));
    let begun = is_compressed(folder.path(), "read");
    drop(events);
    wait_until("nobody reads it any more", || is_compressed(folder.path(), "read"));
    assert!(!begun, "it had a reader in its way");
    store.close().unwrap();
}

#[tokio::test]
async fn a_store_that_goes_leaves_what_it_was_compressing_as_it_was() {
    for wait in [0, 5, 20, 60] {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        write_run(&store, "x");
        let before = read(&store, "x", ReadOptions::new(View::All)).await;
        store.close().unwrap();
        let store = compressing(folder.path(), Duration::ZERO);
        std::thread::sleep(Duration::from_millis(wait));
        if wait % 2 == 0 {
            store.close().unwrap();
        }
        drop(store);
        let store = compressing(folder.path(), Duration::ZERO);
        assert!(read(&store, "x", ReadOptions::new(View::All)).await == before);
        wait_until("it goes on", || is_compressed(folder.path(), "x"));
        assert!(read(&store, "x", ReadOptions::new(View::All)).await == before);
    }
}

/// Moves a log folder with five runs to `away` before any of them is due; `None` if that took too long.
fn moved_in_time(logs: &Path, away: &Path, due: Duration) -> Option<FileLogStore> {
    let began = Instant::now();
    let store = compressing(logs, due);
    for run in 0..5 {
        small_run(&store, &format!("old-{run}"));
    }
    wait_until("the store knows of them", || {
        store.runs(&RunQuery::default()).is_ok_and(|page| page.runs.len() == 5)
    });
    // They are in the index by then.
    std::thread::sleep(Duration::from_millis(500));
    std::fs::rename(logs, away).unwrap();
    (began.elapsed() < due).then_some(store)
}

/// What is due while the log folder is away is compressed when it is back, and not an hour later.
#[test]
fn a_log_folder_that_was_away_is_compressed_when_it_is_back() {
    let home = tempfile::tempdir().unwrap();
    let due = Duration::from_secs(3);
    let moved = (0..5).find_map(|n| {
        let [logs, away] = ["logs", "away"].map(|name| home.path().join(format!("{name}-{n}")));
        Some((moved_in_time(&logs, &away, due)?, logs, away))
    });
    let (store, logs, away) = moved.expect("a machine on which five runs are written in three seconds");
    std::thread::sleep(due + Duration::from_secs(2));
    assert!((0..5).all(|run| !is_compressed(&away, &format!("old-{run}"))));
    std::fs::rename(&away, &logs).unwrap();
    wait_until("all of them are compressed", || {
        (0..5).all(|run| is_compressed(&logs, &format!("old-{run}")))
    });
    store.close().unwrap();
    is_clean(&logs);
}
