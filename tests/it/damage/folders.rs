//! Folders that come, go, or lead elsewhere.

use super::*;

#[tokio::test]
async fn a_run_whose_folder_is_removed_ends_for_its_followers() {
    let folder = tempfile::tempdir().unwrap();
    let other = other_process(folder.path());
    let store = service(folder.path());
    let by_hand = folder.path().join("job_runs/plain");
    fs::create_dir_all(&by_hand).unwrap();
    fs::write(by_hand.join("stdout.log"), "one\n").unwrap();
    let mut writer = other.start(RunSpec::new(id("journaled"))).unwrap();
    writer.append(Stream::Stdout, b"one\n").unwrap();
    writer.flush().unwrap();
    for run in ["plain", "journaled"] {
        wait_until("the run is known", || store.run(&id(run)).is_ok_and(|run| run.stdout.lines == 1));
        let followers = VIEWS.map(|view| store.read(&id(run), followed(view)).unwrap());
        fs::remove_dir_all(folder.path().join("job_runs").join(run)).unwrap();
        for follower in followers {
            let (_, end) = in_time(drain(follower)).await.unwrap();
            let ReadEnd::Evicted(tombstone) = end else { panic!("{end:?}") };
            assert_eq!((tombstone.id.as_str(), tombstone.lines), (run, 1));
        }
    }
    drop(writer);
    wait_until("the index has forgotten them", || {
        store.runs(&RunQuery::default()).unwrap().runs.is_empty()
            && matches!(store.run(&id("plain")), Err(LogError::NotFound { .. }))
    });
}

#[test]
fn an_id_whose_folder_was_removed_can_be_used_again() {
    let folder = tempfile::tempdir().unwrap();
    for text in ["first\n", "second\nand more\n"] {
        let store = service(folder.path());
        let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
        writer.append(Stream::Stdout, text.as_bytes()).unwrap();
        writer.finish(success()).unwrap();
        store.close().unwrap();
        drop(store);
        let store = service(folder.path());
        let listed = store.runs(&RunQuery::default()).unwrap().runs;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].stdout.bytes, text.len() as u64);
        assert_eq!(store.run(&id("x")).unwrap(), listed[0]);
        store.close().unwrap();
        drop(store);
        fs::remove_dir_all(folder.path().join("job_runs/x")).unwrap();
    }
}

#[tokio::test]
async fn links_and_pipes_are_not_followed_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("stdout.log"), "secret\n").unwrap();
    fs::write(outside.path().join("metadata.json"), r#"{"job_run_id":"log","exit_code":0}"#).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("job_runs");
    for name in ["log", "pipe"] {
        fs::create_dir_all(runs.join(name)).unwrap();
    }
    symlink(outside.path().join("stdout.log"), runs.join("log/stdout.log")).unwrap();
    symlink(outside.path().join("metadata.json"), runs.join("log/metadata.json")).unwrap();
    let fifo = runs.join("pipe/stdout.log");
    assert!(std::process::Command::new("mkfifo").arg(fifo).status().unwrap().success());
    fs::write(runs.join("a-file"), "").unwrap();
    symlink(outside.path(), runs.join("link")).unwrap();
    let stores: [Arc<dyn LogStore>; 2] =
        [Arc::new(other_process(folder.path())), Arc::new(service(folder.path()))];
    for store in &stores {
        for name in ["link", "a-file"] {
            let found = store.run(&id(name));
            assert!(matches!(found, Err(LogError::NotFound { .. })), "{name}: {found:?}");
        }
        for name in ["log", "pipe"] {
            match read_store(&**store, name, ReadOptions::new(View::STDOUT)).await {
                Ok((seen, _)) => assert!(seen.is_empty(), "{seen:?}"),
                Err(error) => assert!(matches!(error, LogError::Io { .. }), "{error}"),
            }
        }
        store.runs(&RunQuery::default()).unwrap();
        assert!(matches!(store.start(RunSpec::new(id("link"))), Err(LogError::AlreadyExists { .. })));
    }
}

#[test]
fn a_folder_that_several_ask_for_at_once_becomes_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let store = service(folder.path());
    for round in 0..4 {
        let name = format!("run-{round}");
        let made = folder.path().join("making");
        fs::create_dir_all(&made).unwrap();
        let line = "x".repeat(99) + "\n";
        fs::write(made.join("stdout.log"), line.repeat(100_000)).unwrap();
        let metadata = format!(r#"{{"job_run_id":"{name}","exit_code":0}}"#);
        fs::write(made.join("metadata.json"), metadata).unwrap();
        fs::rename(&made, folder.path().join("job_runs").join(&name)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let run = store.run(&id(&name)).unwrap();
                    assert_eq!(run.stdout.lines, 100_000);
                });
            }
        });
    }
    store.close().unwrap();
    drop(store);
    let listed = service(folder.path()).runs(&RunQuery::default()).unwrap().runs;
    assert_eq!(listed.len(), 4, "{:?}", listed.iter().map(JobMetadata::id).collect::<Vec<_>>());
}

/// A writer writes its journal's end, then `metadata.json`, then lets go of the journal. Whoever looks in between
/// must let go of the run all the same in the end.
#[test]
fn a_run_that_was_seen_just_before_its_metadata_leaves_the_memory() {
    let (from, of_run) = finished_run("x");
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("job_runs/x");
    copy_folder(&of_run, &run);
    fs::remove_file(run.join("metadata.json")).unwrap();
    let journal = fs::File::open(run.join("journal")).unwrap();
    journal.lock().unwrap();
    let store = service(folder.path());
    assert_eq!(store.run(&id("x")).unwrap().state.kind(), StateKind::Succeeded);
    let journals_open = |path: &Path| {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter(|link| fs::read_link(link.path()).is_ok_and(|target| target == path)).count()
    };
    let journal_of_x = run.join("journal");
    assert!(journals_open(&journal_of_x) >= 2, "the test's own and the store's");
    // Two others that go with the commits behind the one that came too early for this one.
    for name in ["y", "z"] {
        let (_guard, of_other) = finished_run(name);
        let (made, path) = (folder.path().join(name), folder.path().join("job_runs").join(name));
        copy_folder(&of_other, &made);
        fs::rename(made, &path).unwrap();
        assert!(store.run(&id(name)).unwrap().state.is_over());
        wait_until("the index has it", || journals_open(&path.join("journal")) == 0);
    }
    assert!(journals_open(&journal_of_x) >= 2, "it lacks its metadata");
    fs::copy(of_run.join("metadata.json"), run.join("metadata.json")).unwrap();
    drop((journal, from));
    wait_until("the run has left the memory", || journals_open(&journal_of_x) == 0);
    assert_eq!(store.run(&id("x")).unwrap().state.kind(), StateKind::Succeeded);
}

/// After a power cut the index can know of more than the files hold.
#[tokio::test]
async fn a_line_that_comes_while_a_run_is_taken_up_is_not_left_lying() {
    let folder = tempfile::tempdir().unwrap();
    let hour = Duration::from_secs(3600);
    let options =
        FileStoreOptions { liveness_interval: hour, rescan_interval: hour, ..FileStoreOptions::default() };
    let store = FileLogStore::open(folder.path(), options).unwrap();
    let other = other_process(folder.path());
    for round in 0..100 {
        let run = format!("run-{round}");
        let follower = {
            let (store, run) = (store.clone(), run.clone());
            tokio::spawn(async move {
                let options = ReadOptions { limit: Some(3), ..followed(View::STDOUT) };
                read(&store, &run, options).await.0.len()
            })
        };
        tokio::task::yield_now().await;
        let mut writer = other.start(RunSpec::new(id(&run))).unwrap();
        for line in ["1\n", "2\n", "3\n"] {
            writer.append(Stream::Stdout, line.as_bytes()).unwrap();
            writer.flush().unwrap();
        }
        assert_eq!(follower.await.unwrap(), 3, "round {round}");
        writer.finish(success()).unwrap();
    }
}
