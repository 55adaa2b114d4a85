//! Somebody copies run folders to where a service looks for them.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use databuild_logs::{
    CheckOptions, FileLogStore, FileStoreOptions, JobMetadata, JobRunId, LineNumber, LogStore, ReadEnd,
    ReadEvent, ReadOptions, RunQuery, RunSpec, Start, StateKind, Stream, View, check_index,
};
use futures_util::StreamExt;

use crate::http::{exited, id};
use crate::support::cli::until;
use crate::support::wait_until;

const FILES: [&str; 4] = ["journal", "metadata.json", "stderr.log", "stdout.log"];
const LINES: u64 = 9_000;

fn open(folder: &Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() }).unwrap()
}

/// A run that was recorded elsewhere.
fn recorded(folder: &Path, run: &str, ends: bool) -> (PathBuf, JobMetadata) {
    let store = FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap();
    let mut writer = store.start(RunSpec::new(id(run))).unwrap();
    let text: String = (1..=LINES).map(|n| format!("line {n} of {run}\n")).collect();
    writer.append(Stream::Stdout, text.as_bytes()).unwrap();
    writer.append(Stream::Stderr, b"a warning\n").unwrap();
    writer.flush().unwrap();
    let path = folder.join("job_runs").join(run);
    match ends {
        true => (path, writer.finish(exited(0)).unwrap()),
        false => {
            let run = store.run(&id(run)).unwrap();
            std::mem::forget(writer);
            (path, run)
        }
    }
}

/// All orders of the files.
fn orders() -> Vec<[&'static str; 4]> {
    let mut orders = vec![FILES];
    for at in 0..3 {
        for order in orders.clone() {
            for other in at + 1..4 {
                let mut swapped = order;
                swapped.swap(at, other);
                orders.push(swapped);
            }
        }
    }
    orders
}

/// Follows standard output to the run's end; a reader that is told to come again does so.
async fn follow(store: FileLogStore, run: JobRunId) -> u64 {
    let mut seen = 0;
    loop {
        let start = Start::After(LineNumber(seen));
        let options = ReadOptions { follow: true, start, times: true, ..ReadOptions::new(View::STDOUT) };
        let mut events = store.read(&run, options).unwrap();
        while let Some(event) = events.next().await {
            match event.unwrap() {
                ReadEvent::Lines(batch) => {
                    for line in batch.lines() {
                        seen += 1;
                        assert_eq!(line.number, LineNumber(seen));
                        assert_eq!(line.text, format!("line {seen} of {run}").as_bytes());
                    }
                }
                ReadEvent::Gap { gap, .. } => panic!("{run} has no hole: {gap:?}"),
                ReadEvent::End(ReadEnd::Complete(_)) => return seen,
                ReadEvent::End(_) => {}
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_copied_file_by_file_goes_on_until_it_is_whole() {
    let (elsewhere, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let orders = orders();
    let originals: Vec<_> =
        (0..orders.len()).map(|n| recorded(elsewhere.path(), &format!("r{n}"), true)).collect();
    thread::sleep(Duration::from_millis(600));
    let store = open(folder.path());
    let target = |run: &JobMetadata| folder.path().join("job_runs").join(run.id().as_str());
    let mut followers = Vec::new();
    for (_, run) in &originals {
        fs::create_dir(target(run)).unwrap();
        wait_until("a folder is seen", || store.run(run.id()).is_ok());
        followers.push(tokio::spawn(follow(store.clone(), run.id().clone())));
    }
    let mut open_files: Vec<Option<File>> = originals.iter().map(|_| None).collect();
    for step in 0..FILES.len() * 2 {
        for ((order, (original, run)), file) in orders.iter().zip(&originals).zip(&mut open_files) {
            let name = order[step / 2];
            let bytes = fs::read(original.join(name)).unwrap();
            let (first, second) = bytes.split_at(bytes.len() / 2);
            if step % 2 == 0 {
                // As `cp` does it: what is there already is in its way.
                let made = File::create_new(target(run).join(name));
                made.unwrap_or_else(|error| panic!("{run:?}: {name}: {error}")).write_all(first).unwrap();
                *file = Some(File::options().append(true).open(target(run).join(name)).unwrap());
            } else if let Some(file) = file {
                file.write_all(second).unwrap();
            }
        }
        // Longer than the service waits before it asks whether writers live.
        tokio::time::sleep(Duration::from_millis(if step % 2 == 0 { 1_200 } else { 300 })).await;
        for (order, (_, run)) in orders.iter().zip(&originals) {
            let shown = store.run(run.id()).unwrap();
            if shown.state.is_over() {
                assert_eq!((&shown, step >= 5), (run, true), "{order:?} after step {step}");
            }
            let there = fs::read_dir(target(run)).unwrap().count();
            assert_eq!(there, step / 2 + 1, "{order:?} after step {step}: only copied files are there");
        }
    }
    for ((order, (original, run)), follower) in orders.iter().zip(&originals).zip(followers) {
        wait_until("a copy is whole", || store.run(run.id()).unwrap().state.is_over());
        assert_eq!(store.run(run.id()).unwrap(), *run, "{order:?}");
        assert_eq!(follower.await.unwrap(), LINES, "{order:?}");
        for name in FILES {
            let is_same = fs::read(target(run).join(name)).unwrap() == fs::read(original.join(name)).unwrap();
            assert!(is_same, "{order:?}: {name}");
        }
    }
    store.close().unwrap();
    let checked = check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!((checked.runs, checked.findings), (orders.len() as u64, vec![]));
}

#[test]
fn cp_of_finished_runs_succeeds_and_shows_them_as_they_were() {
    let (elsewhere, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let originals: Vec<_> = (0..20).map(|n| recorded(elsewhere.path(), &format!("r{n}"), true)).collect();
    thread::sleep(Duration::from_millis(600));
    let of_originals = open(elsewhere.path());
    for (_, run) in &originals[10..] {
        of_originals.compress(run.id()).unwrap();
    }
    of_originals.close().unwrap();
    let store = open(folder.path());
    for (original, _) in &originals {
        let target = folder.path().join("job_runs");
        assert!(Command::new("cp").arg("-r").arg(original).arg(target).status().unwrap().success());
    }
    for (original, run) in &originals {
        wait_until("a copy is seen", || store.run(run.id()).is_ok_and(|run| run.state.is_over()));
        assert_eq!(store.run(run.id()).unwrap(), *run);
        let copy = folder.path().join("job_runs").join(run.id().as_str());
        for entry in fs::read_dir(original).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(
                fs::read(copy.join(&name)).unwrap() == fs::read(original.join(&name)).unwrap(),
                "{name:?}"
            );
        }
    }
    // Of some the journal came last, and the service looks for it once a second. Closed before that, it leaves them to
    // whoever opens the store next.
    store.close().unwrap();
    let store = open(folder.path());
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), originals.len());
    store.close().unwrap();
    let checked = check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(checked.findings, []);
}

/// Nobody writes the copy, and nobody says so either: it is lost when nothing has come for a while.
#[test]
fn a_copy_of_a_run_that_goes_on_is_lost_when_nobody_copies_any_more() {
    let (elsewhere, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (original, run) = recorded(elsewhere.path(), "r", false);
    thread::sleep(Duration::from_millis(600));
    let store = open(folder.path());
    let target = folder.path().join("job_runs");
    let begun = Instant::now();
    assert!(Command::new("cp").arg("-r").arg(&original).arg(&target).status().unwrap().success());
    wait_until("the copy is seen", || store.run(run.id()).is_ok_and(|run| run.stdout.lines == LINES));
    let is_written = || target.join("r/metadata.json").exists();
    let is_lost = || is_written() || store.run(run.id()).unwrap().state.kind() == StateKind::Lost;
    until(is_lost, || "the copy is never lost".to_owned());
    let after = begun.elapsed();
    assert!(after > Duration::from_millis(4_900), "it is lost after {after:?}");
    wait_until("it is written", is_written);
    assert_eq!(store.run(run.id()).unwrap().stdout.lines, LINES);
}
