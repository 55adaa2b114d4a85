//! Appending to a run, against a bare `write(2)` of the same bytes into a new file.
//!
//! Only the appends are timed, not the start of the run and its end, which waits for the disk.

mod support;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Write;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use databuild_logs::{FileLogStore, JobRunId, LogStore, RunSpec, Stream};
use support::{BATCH_BYTES, folder, store, succeeded, workload};
use tempfile::TempDir;

const BULK_LINES: u64 = 640_000;
const SINGLE_LINES: usize = 200_000;
const LINE_BYTES: usize = 100;

struct Store {
    store: FileLogStore,
    folder: TempDir,
}

fn append(criterion: &mut Criterion) {
    let folder = folder();
    let store = Store { store: store(folder.path()), folder };
    let bulk = workload::text(BULK_LINES);
    let lines = [b'x'; LINE_BYTES - 1].iter().chain(b"\n").copied().cycle();
    let lines: Vec<u8> = lines.take(SINGLE_LINES * LINE_BYTES).collect();

    let mut group = criterion.benchmark_group("append");
    group.sample_size(20).measurement_time(Duration::from_secs(4)).warm_up_time(Duration::from_millis(200));
    group.throughput(Throughput::Bytes(bulk.len() as u64));
    pair(&mut group, "64 KiB", &store, &bulk, BATCH_BYTES);
    group.throughput(Throughput::Elements(SINGLE_LINES as u64));
    pair(&mut group, "100-byte lines", &store, &lines, LINE_BYTES);
    group.finish();
}

/// Both ways by turns in each sample, so that a machine that has other work to do slows down both.
fn pair(group: &mut BenchmarkGroup<'_, WallTime>, what: &str, store: &Store, text: &[u8], piece: usize) {
    group.bench_function(format!("{what}, write(2)"), |b| {
        b.iter_custom(|iterations| (0..iterations).map(|_| bare(text, piece)).sum());
    });
    group.bench_function(format!("{what}, library"), |b| {
        b.iter_custom(|iterations| (0..iterations).map(|_| ours(store, text, piece)).sum());
    });
    support::side_by_side(what, 15, || ours(store, text, piece), || bare(text, piece));
}

fn bare(text: &[u8], piece: usize) -> Duration {
    let folder = folder();
    let mut file = File::create(folder.path().join("log")).expect("a file can be made");
    let begin = Instant::now();
    for piece in text.chunks(piece) {
        file.write_all(black_box(piece)).expect("a file can be written");
    }
    begin.elapsed()
}

fn ours(store: &Store, text: &[u8], piece: usize) -> Duration {
    let id = JobRunId::generate();
    let mut writer = store.store.start(RunSpec::new(id.clone())).expect("a run can be started");
    let begin = Instant::now();
    for piece in text.chunks(piece) {
        writer.append(Stream::Stdout, black_box(piece)).expect("a run can be written");
    }
    let elapsed = begin.elapsed();
    writer.finish(succeeded()).expect("a run can be ended");
    fs::remove_dir_all(store.folder.path().join("job_runs").join(id.as_str())).expect("a run has a folder");
    elapsed
}

fn main() {
    support::main(append);
}
