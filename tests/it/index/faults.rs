//! The disk refuses what is done to the index: every call of one life of it, and now and then under a service that goes
//! on. Needs `strace`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use databuild_logs::{CheckOptions, FileLogStore, FileStoreOptions, LogStore, RunQuery, check_index};
use rustix::process::Signal;

use super::{assert_numbered, index_file, lines, numbered, open, quarantined};
use crate::crash::databuild;
use crate::support::cli::{Databuild, until};
use crate::support::copy_folder;

pub(super) const LINES: u64 = 1_000;

pub(super) fn logs(databuild: &Databuild) -> PathBuf {
    databuild.home.path().join("logs")
}

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Whatever became of the index, every line of every run is there for whoever opens the folder next; and when that is
/// closed, nothing in it disagrees with anything else.
#[track_caller]
fn has_all(folder: &Path, what: &str) {
    let store = open(folder);
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), 3, "{what}");
    for run in ["a", "b", "new"] {
        block_on(assert_numbered(&store, run, LINES));
    }
    store.close().unwrap();
    drop(store);
    let report = check_index(folder, CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(report.findings, [], "{what}");
}

/// A folder of two runs that the index knows and one that it does not.
pub(super) fn make_folder(folder: &Path) {
    let store = open(folder);
    ["a", "b"].iter().for_each(|run| numbered(&store, run, LINES));
    store.close().unwrap();
    drop(store);
    let other = FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap();
    numbered(&other, "new", LINES);
}

/// What opens the index of a folder, takes up what it does not know, writes that, and closes it.
fn dry_run(folder: &Path) -> [&str; 4] {
    ["gc", "--dry-run", "--log-dir", folder.to_str().unwrap()]
}

/// Lets every such call of a life of the index fail, one after the other and with one error and the other, on copies of
/// these folders. Whatever fails: it is done all the same, or refused in words that name the folder or the file. Gives
/// how often each was so.
fn fail_every(call: &str, templates: &[PathBuf]) -> (u32, u32) {
    let (mut refused, mut done) = (0, 0);
    for (number, template) in templates.iter().enumerate() {
        for n in 1.. {
            assert!(n < 200, "{call} has no end");
            let databuild = databuild();
            let folder = logs(&databuild);
            copy_folder(template, &folder);
            let error = if (n + number) % 2 == 0 { "EIO" } else { "ENOSPC" };
            let what = format!("{call} number {n} with {error} of {}", template.display());
            let files = [index_file(&folder), folder.join("LOCK"), folder.clone(), folder.join("job_runs")];
            let inject = format!("{call}:error={error}:when={n}");
            let (outcome, injected) = databuild.run_injected(&inject, &files, &dry_run(&folder));
            match outcome.code {
                Some(0) => done += 1,
                Some(1) => {
                    assert!(injected, "{what}: {outcome:?}");
                    let names = outcome.stderr.contains(folder.to_str().unwrap());
                    assert!(outcome.stderr.contains("databuild: ") && names, "{what}: {outcome:?}");
                    refused += 1;
                }
                _ => panic!("{what}: {outcome:?}"),
            }
            has_all(&folder, &what);
            if !injected {
                break;
            }
        }
    }
    (refused, done)
}

#[test]
fn whatever_call_on_the_index_fails_nothing_is_lost_and_a_refusal_names_the_file() {
    let home = tempfile::tempdir().unwrap();
    let templates = ["with-an-index", "without"].map(|name| home.path().join(name));
    templates.iter().for_each(|folder| make_folder(folder));
    fs::remove_file(index_file(&templates[1])).unwrap();
    let calls = ["pwrite64", "pread64", "fdatasync", "ftruncate", "openat", "flock"];
    let counts = thread::scope(|scope| {
        let sweeps = calls.map(|call| scope.spawn(|| fail_every(call, &templates)));
        sweeps.map(|sweep| sweep.join().unwrap())
    });
    assert!(counts.iter().all(|(refused, done)| *refused > 0 && *done >= 2), "{counts:?}");
}

/// The same, and who writes the index is killed where it enters the call. It makes the index there, writes it in several
/// commits, and closes it.
#[test]
fn killed_at_any_call_on_the_index_it_is_opened_again_or_made_anew() {
    let home = tempfile::tempdir().unwrap();
    let template = home.path().join("without-an-index");
    make_folder(&template);
    fs::remove_file(index_file(&template)).unwrap();
    let kill_at_every = |call: &str| {
        for n in 1.. {
            assert!(n < 200, "{call} has no end");
            let databuild = databuild();
            let folder = logs(&databuild);
            copy_folder(&template, &folder);
            let point = format!("{call}:when={n}");
            let outcome = databuild.run_killed_at(&point, &[index_file(&folder)], &dry_run(&folder));
            has_all(&folder, &point);
            match outcome.code {
                Some(0) => return n - 1,
                Some(137) | None => {}
                _ => panic!("{point}: {outcome:?}"),
            }
        }
        unreachable!()
    };
    let kills = thread::scope(|scope| {
        let sweeps =
            ["pwrite64", "fdatasync", "ftruncate"].map(|call| scope.spawn(move || kill_at_every(call)));
        sweeps.map(|sweep| sweep.join().unwrap())
    });
    assert!(kills.iter().all(|&kills| kills >= 3), "{kills:?}");
}

/// Serves while the disk refuses one call of the thread that writes the index. Jobs run on all the while, and are
/// followed.
fn serve_through(call: &str, error: &str, when: &str) {
    let what = format!("{call} {error} {when}");
    let databuild = databuild();
    let folder = logs(&databuild);
    make_folder(&folder);
    databuild.run(&dry_run(&folder)).code(0);
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={error}:when={when}"));
    let index = index_file(&folder);
    let options = ["-D", "-e", &trace, "-e", &inject, "-P", index.to_str().unwrap()];
    let service = databuild.start_traced(
        &databuild.home.path().join("trace"),
        &options,
        &["serve", "--listen", "127.0.0.1:0"],
    );
    let url = service.address().unwrap();
    let asking = Databuild::asking(url);
    let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "live", "--", "cat"]);
    let mut follower = asking.start(&["logs", "-f", "live"]);
    let mut rounds = 0;
    let mut round = || {
        rounds += 1;
        writeln!(input, "line {rounds}").unwrap();
        assert_eq!(follower.line(), format!("line {rounds}"), "{what}");
        let id = format!("job-{rounds}");
        databuild.run(&["run", "--quiet", "--id", &id, "--", "echo", &id]).code(0);
        // It is known at once, and read, whatever becomes of the index.
        let read = asking.run(&["logs", "-f", &id]).code(0);
        assert_eq!(read.text(), format!("{id}\n"), "{what}");
        thread::sleep(Duration::from_millis(20));
    };
    // The tracer counts the calls of each thread by itself: the one that opens the index again need not be the one that is
    // refused the next write.
    let is_open_again = || {
        let said = service.stderr();
        let at = said.rfind("is opened again after an error of the disk");
        at.is_some() && at > said.rfind("the index can't be written")
    };
    until(
        || {
            round();
            is_open_again() && {
                thread::sleep(Duration::from_millis(1_200));
                round();
                thread::sleep(Duration::from_millis(200));
                is_open_again()
            }
        },
        || format!("{what}: it is not opened again: {}", service.stderr()),
    );
    assert!(service.stderr().contains("the index can't be written"), "{what}: {}", service.stderr());
    round();
    drop(input);
    job.done().code(0);
    follower.done().code(0);
    for run in ["a", "new"] {
        assert_eq!(asking.run(&["logs", run, "-n", "1"]).code(0).text(), format!("{LINES:079}\n"), "{what}");
    }
    let listed = asking.run(&["runs", "--limit", "1000", "-o", "json"]).code(0).text().lines().count();
    assert_eq!(listed, 4 + rounds, "{what}");
    service.signal(Signal::TERM);
    service.done();
    assert_eq!(quarantined(&folder), 0, "{what}: what is in the index is kept");
    databuild.run(&["index", "check", "--deep"]).code(0);
    let store = open(&folder);
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), 4 + rounds, "{what}");
    let followed = block_on(lines(&store, "live", 0, 1_000)).unwrap();
    assert_eq!(followed, (1..=rounds).map(|n| format!("line {n}")).collect::<Vec<_>>(), "{what}");
}

/// redb refuses every write after one that the disk refused, until the file is opened again.
#[test]
fn a_service_opens_its_index_again_after_an_error_of_the_disk_and_loses_nothing() {
    let failures = [
        ("pwrite64", "EIO", "6"),
        ("pwrite64", "ENOSPC", "9..11"),
        ("fdatasync", "EIO", "4"),
        ("fdatasync", "ENOSPC", "5"),
    ];
    thread::scope(|scope| {
        for (call, error, when) in failures {
            scope.spawn(move || serve_through(call, error, when));
        }
    });
}

/// What is known of evicted runs is in no folder: it is kept until another index has it.
#[test]
fn an_index_that_can_not_be_replaced_at_once_forgets_no_evicted_run() {
    for (call, error, when) in [("rename", "EIO", "1..2"), ("pwrite64", "ENOSPC", "8..9")] {
        let databuild = databuild();
        let folder = logs(&databuild);
        make_folder(&folder);
        let gc = ["gc", "--max-size", "1", "--keep-last", "1", "--log-dir", folder.to_str().unwrap()];
        databuild.run(&gc).code(0);
        let index = index_file(&folder);
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={error}:when={when}"));
        let options = ["-D", "-e", &trace, "-e", &inject, "-P", index.to_str().unwrap()];
        let at = databuild.home.path().join("trace");
        let service = databuild.start_traced(&at, &options, &["serve", "--listen", "127.0.0.1:0"]);
        let asking = Databuild::asking(service.address().unwrap());
        let is_evicted = || {
            for run in ["a", "b"] {
                asking.run(&["logs", run]).code(3).says("was evicted at");
            }
        };
        is_evicted();
        let zeros = folder.join("zeros");
        fs::write(&zeros, [0; 8192]).unwrap();
        fs::rename(zeros, &index).unwrap();
        let mut jobs = 0;
        until(
            || {
                jobs += 1;
                databuild.run(&["run", "--quiet", "--id", &format!("job-{jobs}"), "--", "true"]).code(0);
                is_evicted();
                let listed = asking.run(&["runs", "-o", "json"]);
                listed.code == Some(0) && quarantined(&folder) == 1 && index.exists()
            },
            || format!("{call}: there is no index: {}", service.stderr()),
        );
        assert!(fs::read_to_string(&at).unwrap().contains("(INJECTED)"), "{call}");
        is_evicted();
        service.signal(Signal::TERM);
        service.done();
        let store = open(&folder);
        for run in ["a", "b"] {
            let found = store.run(&run.parse().unwrap());
            assert!(matches!(found, Err(databuild_logs::LogError::Evicted(_))), "{call}: {found:?}");
        }
    }
}
