//! What it costs to keep a run compressed: how small it gets beside `zstd -3` of the whole file, how long a seek takes
//! beside the same in the plain file, and what writers notice while a run of 1 GB is being compressed.

mod support;

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use databuild_logs::{
    FileLogStore, FileStoreOptions, JobRunId, LineNumber, LogStore, ReadEvent, ReadOptions, RunSpec, Start,
    Stream, View,
};
use futures_util::StreamExt;
use support::{BATCH_BYTES, finished_run, folder, store, succeeded, workload};
use tokio::runtime::Runtime;

const LINES: u64 = 100;
/// What one writer writes while it is timed: 52 MB.
const WRITER_LINES: u64 = 500_000;
const ROUNDS: usize = 3;

fn compress(criterion: &mut Criterion) {
    // A measurement of its own takes minutes: `cargo bench --bench compress -- writers` makes it alone.
    if std::env::args().any(|argument| argument == "writers") {
        for writers in [1, 2] {
            writers_beside(writers);
        }
        return;
    }
    let folder = folder();
    let store = store(folder.path());
    let plain = finished_run(&store, "plain", workload::ALL_LINES);
    let compressed = finished_run(&store, "compressed", workload::ALL_LINES);
    ratio(folder.path(), &store, &compressed);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mut group = criterion.benchmark_group("compress");
    group.sample_size(50).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    for (name, id) in [("plain", &plain), ("compressed", &compressed)] {
        let mut places = Places(1);
        group.bench_function(BenchmarkId::new("since", name), |b| {
            b.iter(|| {
                let after = LineNumber(places.below(workload::ALL_LINES - LINES));
                lines_behind(&runtime, &store, id, Start::After(after), LINES)
            });
        });
        group.bench_function(BenchmarkId::new("tail", name), |b| {
            let start = Start::LastLines { count: LINES, after: LineNumber::START };
            b.iter(|| lines_behind(&runtime, &store, id, start, LINES));
        });
    }
    group.sample_size(10);
    for (name, id) in [("plain", &plain), ("compressed", &compressed)] {
        group.bench_function(BenchmarkId::new("all 1 GB", name), |b| {
            b.iter(|| {
                lines_behind(&runtime, &store, id, Start::After(LineNumber::START), workload::ALL_LINES)
            });
        });
    }
    group.finish();
    store.close().expect("the store can be closed");
}

/// Compresses a run and says how large it is, and how large `zstd -3` makes its log.
fn ratio(folder: &Path, store: &FileLogStore, id: &JobRunId) {
    let of_run = folder.join("job_runs").join(id.as_str());
    let log = of_run.join("stdout.log");
    let length = log.metadata().expect("the run has a log").len();
    let zstd = Command::new("zstd").args(["-3", "-T1", "-q", "-c"]).arg(&log).stdout(Stdio::piped()).spawn();
    let whole = match zstd {
        Ok(mut child) => {
            let mut out = child.stdout.take().expect("its output is a pipe");
            std::io::copy(&mut out, &mut std::io::sink()).expect("it can be read")
        }
        Err(_) => 0,
    };
    let begin = Instant::now();
    store.compress(id).expect("the run can be compressed");
    let took = begin.elapsed().as_secs_f64();
    let ours = of_run.join("stdout.log.zst").metadata().expect("it is compressed").len();
    println!(
        "compress/ratio: {length} bytes are {ours} in frames, {whole} by `zstd -3` of the whole: {:.4} of it; {:.0} MB/s, read back and synced",
        ours as f64 / whole as f64,
        length as f64 / took / 1e6,
    );
}

/// How fast writers are while a run of 1 GB is being compressed, and while none is, by turns.
fn writers_beside(writers: usize) {
    let batches: Vec<Vec<u8>> = {
        let mut batches = Vec::new();
        workload::batches(WRITER_LINES, BATCH_BYTES, |batch| batches.push(batch.to_vec()));
        batches
    };
    let mut ratios = Vec::new();
    let mut slowest: f64 = f64::MAX;
    for _ in 0..ROUNDS {
        let folder = folder();
        let offline = store(folder.path());
        finished_run(&offline, "big", workload::ALL_LINES);
        offline.close().expect("the store can be closed");
        let big = folder.path().join("job_runs/big/stdout.log");
        let speed = |options: FileStoreOptions| {
            let compresses = options.compress_after.is_some();
            // What was written before is not to be written meanwhile.
            rustix::fs::sync();
            let store = FileLogStore::open(folder.path(), options).expect("the store can be opened");
            let begin = Instant::now();
            let mut written = 0;
            while begin.elapsed() < Duration::from_secs(3) && (!compresses || big.exists()) {
                thread::scope(|scope| {
                    for writer in 0..writers {
                        let (store, batches) = (&store, &batches);
                        let id = format!("{:x}-{written}-{writer}", databuild_logs::UnixMicros::now().0);
                        scope.spawn(move || write(store, &id, batches));
                    }
                });
                written += 1;
            }
            let speed = f64::from(written) / begin.elapsed().as_secs_f64();
            assert!(written > 0, "it was compressed before anything was written");
            store.close().expect("the store can be closed");
            for entry in fs::read_dir(folder.path().join("job_runs")).expect("there are runs") {
                let entry = entry.expect("runs can be listed");
                if entry.file_name() != "big" {
                    fs::remove_dir_all(entry.path()).expect("a run can be removed");
                }
            }
            speed
        };
        let compressing =
            FileStoreOptions { compress_after: Some(Duration::ZERO), ..FileStoreOptions::default() };
        let before = speed(FileStoreOptions::default());
        let with = speed(compressing);
        let without = f64::midpoint(before, speed(FileStoreOptions::default()));
        println!(
            "compress/writers: runs a second: {before:.1} before, {with:.1} while, {without:.1} without"
        );
        ratios.push(with / without);
        slowest = slowest.min(with / without);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "compress/writers: {writers} at once have {:.2} of their speed while a run is compressed, median of {ROUNDS} rounds by turns; {slowest:.2} in the slowest",
        ratios[ROUNDS / 2]
    );
}

fn write(store: &FileLogStore, id: &str, batches: &[Vec<u8>]) {
    let mut writer =
        store.start(RunSpec::new(id.parse().expect("a valid id"))).expect("a run can be started");
    for batch in batches {
        writer.append(Stream::Stdout, batch).expect("a batch can be appended");
    }
    writer.finish(succeeded()).expect("a run can be ended");
}

/// Reads so many lines, which may come as several batches.
fn lines_behind(runtime: &Runtime, store: &FileLogStore, id: &JobRunId, start: Start, lines: u64) -> u64 {
    let options = ReadOptions { start, limit: Some(lines), ..ReadOptions::new(View::One(Stream::Stdout)) };
    let mut events = store.read(id, options).expect("the run can be read");
    let (mut found, mut bytes) = (0, 0);
    runtime.block_on(async {
        while found < lines {
            match events.next().await {
                Some(Ok(ReadEvent::Lines(batch))) => {
                    found += batch.lines;
                    bytes += batch.bytes.len() as u64;
                }
                other => panic!("no lines, but {other:?}"),
            }
        }
    });
    black_box(bytes)
}

/// Places all over a run.
struct Places(u64);

impl Places {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) * bound) >> 31
    }
}

fn main() {
    support::main(compress);
}
