//! Opening a store whose `index.redb` was deleted, until its runs can be listed: one run of the whole workload, the
//! same without a journal, so that its lines have to be counted, and many small runs. `wc -l` is what counting the
//! lines of the same file takes somebody who does nothing else. And what `databuild index rebuild` does, by turns with
//! reading the bytes of the log: of files that are in the page cache, and of files that are on the disk alone, as after a
//! restart of the machine.

mod support;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use databuild_logs::{LogStore, RunQuery, rebuild_index};
use rustix::fs::{Advice, fadvise};
use support::{finished_run, folder, store, workload};

const SMALL_RUNS: usize = 1_000;
const SMALL_LINES: u64 = 100;
const SCAN_BYTES: usize = 256 * 1024;

fn rebuild(criterion: &mut Criterion) {
    let folder = folder();
    let big = folder.path().join("big");
    let log = big.join("job_runs/big/stdout.log");
    finished_run(&store(&big), "big", workload::ALL_LINES);
    let small = folder.path().join("small");
    make_small_runs(&small);

    let mut group = criterion.benchmark_group("rebuild");
    group.sample_size(10).measurement_time(Duration::from_secs(4)).warm_up_time(Duration::from_millis(200));
    let bytes = log.metadata().expect("the run has a log").len();
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("wc -l", |b| b.iter(|| assert_eq!(count_lines(&log), workload::ALL_LINES)));
    group.bench_function("1 GB by its journal", |b| {
        b.iter_custom(|times| (0..times).map(|_| open_anew(&big, 1)).sum());
    });
    let rebuild = || timed(|| assert_eq!(rebuild_index(&big, |_| ()).map(|made| made.scanned).ok(), Some(0)));
    let read = || timed(|| assert_eq!(read_all(&log), bytes));
    let from_disk = |action: &dyn Fn() -> Duration| {
        leave_page_cache(&big);
        action()
    };
    support::side_by_side("offline by the journal, against reading the log", 15, rebuild, read);
    support::side_by_side(
        "the same, nothing in the page cache",
        15,
        || from_disk(&rebuild),
        || from_disk(&read),
    );
    fs::remove_file(big.join("job_runs/big/journal")).expect("the run has a journal");
    group.bench_function("1 GB by its lines", |b| {
        b.iter_custom(|times| (0..times).map(|_| open_anew(&big, 1)).sum());
    });
    group.throughput(Throughput::Elements(SMALL_RUNS as u64));
    group.bench_function(format!("{SMALL_RUNS} small runs"), |b| {
        b.iter_custom(|times| (0..times).map(|_| open_anew(&small, SMALL_RUNS)).sum());
    });
    group.finish();
}

fn make_small_runs(folder: &Path) {
    let store = store(folder);
    thread::scope(|scope| {
        for part in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for run in (part..SMALL_RUNS).step_by(8) {
                    finished_run(store, &format!("small-{run}"), SMALL_LINES);
                }
            });
        }
    });
}

/// From a folder without its index to the list of its runs.
fn open_anew(folder: &Path, runs: usize) -> Duration {
    fs::remove_file(folder.join("index.redb")).expect("the store has an index");
    let begin = Instant::now();
    let store = store(folder);
    let query = RunQuery { limit: Some(runs), ..RunQuery::default() };
    // What is known of a run is listed once its thread has written it.
    let listed = loop {
        let page = store.runs(&query).expect("runs can be listed");
        if page.runs.len() == runs {
            break page;
        }
        thread::sleep(Duration::from_micros(200));
    };
    let elapsed = begin.elapsed();
    let lines: u64 = listed.runs.iter().map(|run| run.stdout.lines).sum();
    let expected = if runs == 1 { workload::ALL_LINES } else { runs as u64 * SMALL_LINES };
    assert_eq!(lines, expected, "in the runs that are listed");
    elapsed
}

fn count_lines(log: &PathBuf) -> u64 {
    let mut file = File::open(log).expect("the run has a log");
    let (mut buffer, mut lines) = (vec![0; SCAN_BYTES], 0);
    loop {
        match file.read(&mut buffer).expect("the log can be read") {
            0 => return black_box(lines),
            length => lines += memchr::memchr_iter(b'\n', &buffer[..length]).count() as u64,
        }
    }
}

/// Reads a log and does nothing with it. Gives its length.
fn read_all(log: &PathBuf) -> u64 {
    let mut file = File::open(log).expect("the run has a log");
    let (mut buffer, mut bytes) = (vec![0; SCAN_BYTES], 0);
    loop {
        match file.read(black_box(&mut buffer)).expect("the log can be read") {
            0 => return bytes,
            length => bytes += length as u64,
        }
    }
}

/// Lets the page cache forget all files in a folder.
fn leave_page_cache(folder: &Path) {
    for entry in folder.read_dir().expect("the folder can be listed") {
        let path = entry.expect("the folder can be listed").path();
        if path.is_dir() {
            leave_page_cache(&path);
        } else {
            let file = File::open(path).expect("the file can be opened");
            file.sync_all().expect("the file can be synced");
            fadvise(&file, 0, None, Advice::DontNeed).expect("the system takes advice");
        }
    }
}

fn timed(action: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    action();
    begin.elapsed()
}

fn main() {
    support::main(rebuild);
}
