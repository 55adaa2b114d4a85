//! Compression and retention at once.

use std::time::Duration;

use databuild_logs::GcRequest;

use super::*;

fn finished_bytes(folder: &Path) -> u64 {
    let mut bytes = 0;
    dump_index(folder, |row| {
        bytes += row["finished_bytes"].as_u64().unwrap_or(0);
        Ok(())
    })
    .unwrap();
    bytes
}

#[test]
fn a_compressed_run_counts_as_what_it_takes_up_now() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "pinned");
    write_run(&store, "x");
    store.set_pinned(&id("pinned"), true).unwrap();
    let now = [store.compress(&id("pinned")).unwrap(), store.compress(&id("x")).unwrap()];
    store.close().unwrap();
    assert_eq!(finished_bytes(folder.path()), now[0].bytes_after + now[1].bytes_after);
    is_clean(folder.path());

    // Both would not fit uncompressed.
    let store = open(folder.path());
    let request = GcRequest { max_bytes: Some(now[0].bytes_before * 3 / 2), ..GcRequest::default() };
    assert_eq!(store.gc(&request).unwrap().evicted, []);
    let all = store.gc(&GcRequest { max_bytes: Some(1), ..GcRequest::default() }).unwrap();
    assert_eq!(
        all.evicted.iter().map(|run| (run.id.as_str(), run.bytes)).collect::<Vec<_>>(),
        [("x", now[1].bytes_after)]
    );
    store.close().unwrap();
    assert_eq!(finished_bytes(folder.path()), now[0].bytes_after);
    assert!(!folder.path().join("job_runs/x").exists());
    is_clean(folder.path());
}

#[test]
fn pinned_runs_are_compressed_in_the_background_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "pinned");
    store.set_pinned(&id("pinned"), true).unwrap();
    store.close().unwrap();
    let options = FileStoreOptions { compress_after: Some(Duration::ZERO), ..FileStoreOptions::default() };
    let store = FileLogStore::open(folder.path(), options).unwrap();
    wait_until("it is compressed", || names(folder.path(), "pinned").contains(&"journal.zst".to_owned()));
    wait_until("its plain files are gone", || !of_run(folder.path(), "pinned", "journal").exists());
    store.close().unwrap();
    is_clean(folder.path());
}

#[test]
fn a_run_that_is_evicted_while_it_is_compressed_is_gone_whole() {
    let (mut stopped, mut done) = (0, 0);
    for round in 0..12 {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(open(folder.path()));
        write_run(&*store, "x");
        let compressing = std::thread::spawn({
            let store = Arc::clone(&store);
            move || store.compress(&id("x"))
        });
        std::thread::sleep(Duration::from_millis(round * 4));
        let report = store.gc(&GcRequest { max_bytes: Some(1), ..GcRequest::default() }).unwrap();
        assert_eq!(report.evicted.len(), 1, "{report:?}");
        match compressing.join().unwrap() {
            Ok(_) => done += 1,
            Err(LogError::Evicted(stone)) if stone.id == id("x") => stopped += 1,
            Err(error) => panic!("{error:?}"),
        }
        assert_eq!(fs::read_dir(folder.path().join("job_runs")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(folder.path().join("trash")).unwrap().count(), 0);
        assert!(matches!(store.run(&id("x")), Err(LogError::Evicted(_))));
        store.close().unwrap();
        is_clean(folder.path());
    }
    assert!(stopped > 0, "one of {done} at least was still under way");
}
