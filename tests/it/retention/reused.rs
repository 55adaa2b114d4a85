//! Ids that are used again after somebody removed the folder of a run that was over: the later run is not taken for the
//! earlier one.

use std::thread::sleep;

use databuild_logs::StateKind;

use super::*;
use crate::support::cli::{Databuild, Running, until};

/// What the earlier run's age is measured with: it ended by then.
const LATER: Duration = Duration::from_millis(300);

fn other_process(folder: &Path) -> FileLogStore {
    FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap()
}

fn remove(folder: &Path, run: &str) {
    fs::remove_dir_all(folder.join("job_runs").join(run)).unwrap();
}

#[test]
fn a_run_that_goes_on_is_not_evicted_because_an_earlier_one_had_its_id() {
    for while_serving in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, other) = (open(folder.path()), other_process(folder.path()));
        ended(&store, "x", HOUR, 10);
        ended(&store, "y", HOUR, 10);
        if while_serving {
            wait_until("the index has them", || {
                store.gc(&GcRequest { dry_run: true, ..all() }).unwrap().evicted.len() == 2
            });
        } else {
            store.close().unwrap();
        }
        remove(folder.path(), "x");
        let mut writer = other.start(RunSpec::new(id("x"))).unwrap();
        writer.append(Stream::Stdout, b"new\n").unwrap();
        writer.flush().unwrap();
        if !while_serving {
            drop(store);
            store = open(folder.path());
        }
        for request in [GcRequest { dry_run: true, ..all() }, older_than(HOUR / 2), all()] {
            let report = store.gc(&request).unwrap();
            assert!(!evicted(&report).contains(&"x"), "{report:?}");
        }
        assert_eq!(left(&store), ["x"]);
        writer.append(Stream::Stdout, b"and more\n").unwrap();
        let later = writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(4)))).unwrap();
        wait_until("its end is known", || store.run(&id("x")).is_ok_and(|run| run == later));
        assert_eq!(evicted(&store.gc(&older_than(HOUR / 2)).unwrap()), [""; 0]);
        wait_until("it is the oldest that is over", || evicted(&store.gc(&all()).unwrap()) == ["x"]);
        assert_eq!(tombstone(&store, "x").lines, 2);
    }
}

/// Nothing that is locked is evicted, whatever the index says of it.
#[test]
fn what_somebody_has_locked_waits() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    ended(&store, "x", HOUR, 10);
    let journal = fs::File::open(folder.path().join("job_runs/x/journal")).unwrap();
    wait_until("its writer is done", || journal.try_lock().is_ok());
    let all_evicted = || evicted(&store.gc(&all()).unwrap()).join(" ");
    wait_until("the index has it", || {
        let report = store.gc(&all()).unwrap();
        assert!(report.evicted.is_empty(), "{report:?}");
        report.kept.iter().any(|kept| kept.why.contains("locked"))
    });
    // A process that is just being started may hold the file open for a moment longer.
    journal.unlock().unwrap();
    assert_eq!(all_evicted(), "x");
}

#[test]
fn neither_is_it_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let (store, other) = (open(folder.path()), other_process(folder.path()));
    ended(&store, "x", HOUR, 100);
    store.close().unwrap();
    drop(store);
    remove(folder.path(), "x");
    let mut writer = other.start(RunSpec::new(id("x"))).unwrap();
    writer.append(Stream::Stdout, b"new\n").unwrap();
    writer.flush().unwrap();
    let compress_after = Some(HOUR / 2);
    let store =
        FileLogStore::open(folder.path(), FileStoreOptions { compress_after, ..FileStoreOptions::default() })
            .unwrap();
    sleep(LATER * 4);
    assert!(matches!(store.compress(&id("x")), Err(LogError::Unfinished { .. })));
    let later = writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    wait_until("its end is known", || store.run(&id("x")).is_ok_and(|run| run == later));
    sleep(LATER * 5);
    assert!(folder.path().join("job_runs/x/journal").exists(), "it ended just now");
    assert!(store.compress(&id("x")).is_ok());
    assert_eq!(store.run(&id("x")).unwrap(), later);
}

/// A run of another process, which prints until there is a file.
fn printing(databuild: &Databuild, name: &str) -> Running {
    let gate = databuild.home.path().join("gate");
    let script =
        format!("seq 1001 1030; until [ -e {} ]; do sleep 0.02; done; echo end; exit 7", gate.display());
    databuild.start(&["run", "--quiet", "--id", name, "--", "sh", "-c", &script])
}

#[test]
fn a_nightly_run_whose_folder_was_removed_runs_again_under_a_service_that_evicts() {
    for off in [None, Some("to remove"), Some("to run")] {
        // Two seconds.
        let databuild = Databuild::new().with("DATABUILD_LOG_TTL_DAYS", "0.0000232");
        let logs = databuild.home.path().join("logs");
        let serve = || {
            let (service, url) = databuild.serve();
            (service, url)
        };
        let mut service = serve();
        let stop = |service: Running| {
            service.signal(rustix::process::Signal::TERM);
            service.done().code(0);
        };
        let asked = |url: &str, args: &[&str]| Databuild::asking(url).run(args);
        databuild.run(&["run", "--quiet", "--id", "nightly", "--", "seq", "1", "10"]).code(0);
        let is_over = |url: &str| asked(url, &["runs", "-o", "json"]).text().contains("succeeded");
        until(|| is_over(&service.1), || service.0.stderr());
        sleep(LATER);
        if off.is_some() {
            stop(service.0);
            remove(&logs, "nightly");
            if off == Some("to remove") {
                service = serve();
            }
        } else {
            remove(&logs, "nightly");
        }
        let run = printing(&databuild, "nightly");
        let stdout = logs.join("job_runs/nightly/stdout.log");
        until(|| fs::metadata(&stdout).is_ok_and(|log| log.len() == 150), || run.stderr());
        if off == Some("to run") {
            service = serve();
        }
        let follower = Databuild::asking(&service.1).start(&["logs", "-f", "nightly", "--exit-status"]);
        // A run that ends has the service look for what is too old.
        sleep(Duration::from_millis(2_500));
        databuild.run(&["run", "--quiet", "--", "true"]).code(0);
        sleep(LATER);
        assert_eq!(asked(&service.1, &["gc"]).code(0).text().matches("nightly").count(), 0);
        let all = asked(&service.1, &["logs", "nightly"]).code(0);
        assert_eq!(all.text().lines().count(), 30, "{off:?}: {all:?}");
        fs::write(databuild.home.path().join("gate"), "").unwrap();
        run.done().code(7);
        let followed = follower.done().code(7);
        let lines: Vec<_> = (1001..=1030).map(|n| n.to_string()).chain(["end".to_owned()]).collect();
        assert_eq!(followed.text().lines().collect::<Vec<_>>(), lines, "{off:?}");
        let store = other_process(&logs);
        let state = || store.run(&id("nightly")).map(|run| run.state.kind());
        assert!(matches!(state(), Ok(StateKind::Failed) | Err(LogError::NotFound { .. })), "{:?}", state());
    }
}
