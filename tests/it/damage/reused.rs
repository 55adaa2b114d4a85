//! Ids that are used again after somebody removed the folder of a run that was over.

use databuild_logs::{Exit, GcRequest, RetentionPolicy, RunState};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

/// A store that hears of what others do by inotify alone.
fn deaf(folder: &Path, retention: RetentionPolicy) -> FileLogStore {
    let options = FileStoreOptions {
        liveness_interval: HOUR,
        rescan_interval: HOUR,
        retention,
        ..FileStoreOptions::default()
    };
    FileLogStore::open(folder, options).unwrap()
}

fn printed(store: &dyn LogStore, run: &str, text: &str, code: i32) -> JobMetadata {
    let mut writer = store.start(RunSpec::new(id(run))).unwrap();
    writer.append(Stream::Stdout, text.as_bytes()).unwrap();
    writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(code)))).unwrap()
}

fn remove(folder: &Path, run: &str) {
    fs::remove_dir_all(folder.join("job_runs").join(run)).unwrap();
}

fn closed(store: FileLogStore) {
    store.close().unwrap();
    drop(store);
}

fn listed(store: &dyn LogStore) -> Vec<JobMetadata> {
    store.runs(&RunQuery::default()).unwrap().runs
}

#[tokio::test]
async fn an_id_that_was_used_again_while_no_service_ran_is_that_of_the_later_run() {
    let folder = tempfile::tempdir().unwrap();
    let other = other_process(folder.path());
    // The second is as long as the first.
    for (first, second) in [("1\n2\n3\n", "4\n5\n6\n"), ("1\n2\n", "a longer line\nanother\nand more\n")] {
        let store = service(folder.path());
        printed(&store, "x", first, 0);
        closed(store);
        remove(folder.path(), "x");
        let later = printed(&other, "x", second, 7);
        for by_list in [false, true] {
            let store = service(folder.path());
            if by_list {
                assert_eq!(listed(&store), std::slice::from_ref(&later));
            }
            assert_eq!(store.run(&id("x")).unwrap(), later);
            let (seen, end) = read(&store, "x", followed(View::STDOUT)).await;
            assert_eq!(texts(&seen), second.lines().collect::<Vec<_>>());
            let ReadEnd::Complete(end) = end else { panic!("{end:?}") };
            assert_eq!(end.state.exit(), Some(Exit::Code(7)));
            assert_eq!(listed(&store), std::slice::from_ref(&later));
            closed(store);
        }
        remove(folder.path(), "x");
    }
}

#[tokio::test]
async fn a_follower_of_a_run_that_has_the_id_of_an_earlier_one_gets_all_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let other = other_process(folder.path());
    for with_service in [true, false] {
        let store = deaf(folder.path(), RetentionPolicy::OFF);
        printed(&other, "x", "old\n".repeat(100).as_str(), 0);
        wait_until("it is known", || store.run(&id("x")).is_ok_and(|run| run.state.is_over()));
        let store = match with_service {
            true => store,
            false => {
                closed(store);
                remove(folder.path(), "x");
                deaf(folder.path(), RetentionPolicy::OFF)
            }
        };
        if with_service {
            remove(folder.path(), "x");
        }
        // Who comes before it has begun waits for it.
        let early = tokio::spawn({
            let store = store.clone();
            async move { read(&store, "x", followed(View::STDOUT)).await }
        });
        tokio::task::yield_now().await;
        let mut writer = other.start(RunSpec::new(id("x"))).unwrap();
        writer.append(Stream::Stdout, b"new 1\n").unwrap();
        writer.flush().unwrap();
        let late = tokio::spawn({
            let store = store.clone();
            async move { read(&store, "x", followed(View::STDOUT)).await }
        });
        wait_until("the line is seen", || store.run(&id("x")).is_ok_and(|run| run.stdout.lines == 1));
        assert_eq!(store.run(&id("x")).unwrap().state, RunState::Running);
        writer.append(Stream::Stdout, b"new 2\n").unwrap();
        writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(3)))).unwrap();
        for follower in [early, late] {
            let (seen, end) = in_time(follower).await.unwrap();
            assert_eq!(texts(&seen), ["new 1", "new 2"]);
            let ReadEnd::Complete(end) = end else { panic!("{end:?}") };
            assert_eq!(end.state.exit(), Some(Exit::Code(3)));
        }
        closed(store);
        remove(folder.path(), "x");
    }
}

/// However soon: of some the index knows by then, others are in memory.
#[test]
fn an_id_can_be_used_again_at_once_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, other) = (deaf(folder.path(), RetentionPolicy::OFF), other_process(folder.path()));
    for round in 0..30 {
        let run = printed(&other, "x", &"line\n".repeat(round + 1), 0);
        wait_until("it is the one that is told of", || store.run(&id("x")).is_ok_and(|told| told == run));
        if round % 3 == 0 {
            std::thread::sleep(Duration::from_millis(120));
        }
        remove(folder.path(), "x");
    }
    assert!(listed(&store).is_empty());
    let last = printed(&other, "x", "last\n", 0);
    wait_until("it is listed", || listed(&store) == [last.clone()]);
    closed(store);
    assert_eq!(listed(&service(folder.path())), [last]);
}

/// Whoever lists by what the index says of runs finds it when the rows were looked at.
#[test]
fn a_rescan_looks_at_rows_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = service(folder.path());
    printed(&store, "x", "line\n", 0);
    closed(store);
    remove(folder.path(), "x");
    let later = printed(&other_process(folder.path()), "x", "line\n", 1);
    let rescan_interval = Duration::from_millis(20);
    let options = FileStoreOptions {
        liveness_interval: rescan_interval,
        rescan_interval,
        ..FileStoreOptions::default()
    };
    let store = FileLogStore::open(folder.path(), options).unwrap();
    let failed = RunQuery { state: Some(StateKind::Failed), ..RunQuery::default() };
    wait_until("it is found by its state", || store.runs(&failed).unwrap().runs == [later.clone()]);
}

#[test]
fn a_run_whose_folder_was_removed_is_not_there_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let store = deaf(folder.path(), RetentionPolicy::OFF);
    for run in ["x", "y"] {
        printed(&store, run, "line\n", 0);
    }
    let oldest = GcRequest { dry_run: true, max_bytes: Some(1), ..GcRequest::default() };
    wait_until("the index has them", || store.gc(&oldest).unwrap().evicted.len() == 2);
    for run in ["x", "y"] {
        remove(folder.path(), run);
    }
    assert!(listed(&store).is_empty());
    assert!(matches!(store.run(&id("y")), Err(LogError::NotFound { .. })));
}

/// An index of another time is put in the place of the one that there is.
#[tokio::test]
async fn an_index_that_knows_an_earlier_run_only_does_not_hide_the_later_one() {
    let folder = tempfile::tempdir().unwrap();
    let (index, kept) = (folder.path().join("index.redb"), folder.path().join("kept"));
    let store = service(folder.path());
    printed(&store, "x", "1\n2\n3\n", 0);
    closed(store);
    fs::copy(&index, &kept).unwrap();
    remove(folder.path(), "x");
    let store = service(folder.path());
    let later = printed(&store, "x", "4\n5\n6\n7\n", 1);
    closed(store);
    fs::rename(&kept, &index).unwrap();
    let store = service(folder.path());
    let (seen, _) = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
    assert_eq!(texts(&seen), ["4", "5", "6", "7"]);
    assert_eq!(listed(&store), [later]);
}

/// The writer died, and so did the service.
#[tokio::test]
async fn what_the_index_knows_of_a_run_that_went_on_is_not_taken_for_that_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let other = other_process(folder.path());
    let mut writer = other.start(RunSpec::new(id("x"))).unwrap();
    let store = service(folder.path());
    // Enough of it for places in the index.
    for n in 0..3_000 {
        writer.append(Stream::Stdout, format!("{n:099}\n").as_bytes()).unwrap();
    }
    writer.flush().unwrap();
    wait_until("it is known", || store.run(&id("x")).is_ok_and(|run| run.stdout.lines == 3_000));
    std::thread::sleep(Duration::from_millis(1_500));
    closed(store);
    drop(writer);
    remove(folder.path(), "x");
    let mut writer = other.start(RunSpec::new(id("x"))).unwrap();
    for n in 0..6_000 {
        writer.append(Stream::Stdout, format!("{n:049}\n").as_bytes()).unwrap();
    }
    let later = writer.finish(success()).unwrap();
    let store = service(folder.path());
    for after in [0, 1_000, 2_500, 5_999] {
        let options = ReadOptions {
            start: Start::After(LineNumber(after)),
            limit: Some(1),
            ..ReadOptions::new(View::STDOUT)
        };
        let (seen, _) = read(&store, "x", options).await;
        assert_eq!(texts(&seen), [format!("{after:049}")]);
    }
    assert_eq!(store.run(&id("x")).unwrap(), later);
    closed(store);
}

#[tokio::test]
async fn a_follower_of_a_run_whose_folder_is_another_s_is_told_so_and_that_one_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (store, other) = (service(folder.path()), other_process(folder.path()));
    let mut lost = other.start(RunSpec::new(id("x"))).unwrap();
    lost.append(Stream::Stdout, b"lost\n".repeat(500).as_slice()).unwrap();
    lost.flush().unwrap();
    wait_until("it is known", || store.run(&id("x")).is_ok_and(|run| run.stdout.lines == 500));
    let follower = store.read(&id("x"), followed(View::STDOUT)).unwrap();
    let moved = folder.path().join("moved");
    fs::rename(folder.path().join("job_runs/x"), &moved).unwrap();
    let another = other_process(folder.path());
    let later = printed(&another, "x", "1\n2\n", 0);
    let (_, end) = in_time(drain(follower)).await.unwrap();
    assert!(matches!(end, ReadEnd::Evicted(_)), "{end:?}");
    wait_until("it is the later one", || store.run(&id("x")).is_ok_and(|run| run == later));
    assert_eq!(texts(&read(&store, "x", followed(View::STDOUT)).await.0), ["1", "2"]);
    drop(lost);
}

#[tokio::test]
async fn a_folder_by_another_tool_can_be_made_again_too() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("job_runs/x");
    let make = |text: &str, metadata: &str| {
        fs::create_dir_all(&run).unwrap();
        fs::write(run.join("stdout.log"), text).unwrap();
        fs::write(run.join("metadata.json"), metadata).unwrap();
    };
    for (text, metadata, code) in [
        ("1\n2\n3\n", r#"{"job_run_id":"x","exit_code":0}"#, 0),
        ("4\n5\n", r#"{"job_run_id":"x","exit_code":0}"#, 0),
        ("6\n7\n", r#"{"exit_code":5,"finished_at":"2026-01-01T00:00:00Z"}"#, 5),
        ("8\n9\n", r#"{"exit_code":6,"finished_at":"2026-01-01T00:00:00Z"}"#, 6),
    ] {
        make(text, metadata);
        for _ in 0..2 {
            let store = service(folder.path());
            wait_until("it is over", || store.run(&id("x")).is_ok_and(|run| run.state.is_over()));
            assert_eq!(store.run(&id("x")).unwrap().state.exit(), Some(Exit::Code(code)), "{text:?}");
            let (seen, _) = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
            assert_eq!(texts(&seen), text.lines().collect::<Vec<_>>());
            assert_eq!(listed(&store).len(), 1);
            closed(store);
        }
        fs::remove_dir_all(&run).unwrap();
    }
}
