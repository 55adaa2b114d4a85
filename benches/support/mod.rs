//! What the benches share: the text that they log, a folder to log it in, a service, and jobs.

#![allow(dead_code, reason = "each bench uses a part of this")]

pub(crate) mod drip;
pub(crate) mod service;
pub(crate) mod workload;

use std::path::Path;
use std::time::Duration;

use criterion::Criterion;
use databuild_logs::{
    Exit, FileLogStore, FileStoreOptions, JobRunId, LogStore, Outcome, RunEnd, RunSpec, Stream,
};
use tempfile::TempDir;

/// What a pipe gives a runner that reads from a job in a hurry, and so the usual size of an append.
pub(crate) const BATCH_BYTES: usize = 64 * 1024;

/// A folder that is gone with the bench. It is on the disk that the build is on, unless `BENCH_DIR` names another.
pub(crate) fn folder() -> TempDir {
    let parent = std::env::var_os("BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    tempfile::tempdir_in(parent).expect("a folder can be made")
}

/// The store of a service, with its index.
pub(crate) fn store(folder: &Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions::default()).expect("the store can be opened")
}

/// Logs so many lines of the workload as a run that is over.
pub(crate) fn finished_run(store: &dyn LogStore, id: &str, lines: u64) -> JobRunId {
    let id: JobRunId = id.parse().expect("a valid id");
    let mut writer = store.start(RunSpec::new(id.clone())).expect("a run can be started");
    workload::batches(lines, BATCH_BYTES, |batch| {
        writer.append(Stream::Stdout, batch).expect("a batch can be appended");
    });
    writer.finish(succeeded()).expect("a run can be ended");
    id
}

/// The end of a run that went well.
pub(crate) fn succeeded() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

/// Runs benches as `criterion_main!` does, unless this process is started as a job of one.
pub(crate) fn main(benches: fn(&mut Criterion)) {
    if !drip::is_asked_for() {
        let mut criterion = Criterion::default().configure_from_args();
        benches(&mut criterion);
        criterion.final_summary();
    }
}

/// Measures two ways of doing the same by turns, and prints how many times as fast ours is, the median. On
/// a machine that has other work to do this says more than two measurements one after the other.
pub(crate) fn side_by_side(
    what: &str,
    rounds: usize,
    mut ours: impl FnMut() -> Duration,
    mut theirs: impl FnMut() -> Duration,
) {
    if std::env::args().any(|argument| ["--list", "--test"].contains(&&*argument)) {
        return;
    }
    let mut rounds: Vec<(Duration, Duration)> = (0..rounds)
        .map(|_| {
            let theirs = theirs();
            (ours(), theirs)
        })
        .collect();
    let mut median = |key: fn(&(Duration, Duration)) -> f64| {
        rounds.sort_by(|a, b| key(a).total_cmp(&key(b)));
        key(&rounds[rounds.len() / 2])
    };
    let ratio = median(|(ours, theirs)| theirs.as_secs_f64() / ours.as_secs_f64());
    let ours = Duration::from_secs_f64(median(|(ours, _)| ours.as_secs_f64()));
    let theirs = Duration::from_secs_f64(median(|(_, theirs)| theirs.as_secs_f64()));
    let rounds = rounds.len();
    println!(
        "{what}: {ratio:.2} times the speed, {ours:.2?} by {theirs:.2?}, medians of {rounds} rounds by turns"
    );
}
