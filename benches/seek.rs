//! From the call of `read` to the first 100 lines in hand: behind a line somewhere in the run, and at its end.
//!
//! The runs are over and in the page cache. `pread` reads the same 100 lines by somebody who knows where they are.

mod support;

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use databuild_logs::{JobRunId, LineNumber, LogStore, ReadEvent, ReadOptions, Start, Stream, View};
use futures_util::StreamExt;
use support::{finished_run, folder, store};
use tokio::runtime::Runtime;

const SIZES: [u64; 3] = [10_000, 1_000_000, 10_000_000];
const LINES: u64 = 100;
/// So many small runs are as large together as the large one: a single one is in the caches of the processor.
const SMALL: u64 = 1000;

fn seek(criterion: &mut Criterion) {
    let folder = folder();
    let store = store(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let runs = SIZES.map(|lines| (lines, finished_run(&store, &format!("lines-{lines}"), lines)));
    let small: Vec<_> =
        (0..SMALL).map(|run| finished_run(&store, &format!("small-{run}"), SIZES[0])).collect();
    wait_for_index(&store, SIZES.len() + small.len());

    let mut group = criterion.benchmark_group("seek");
    group.sample_size(50).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    for (lines, id) in &runs {
        let mut places = Places(1);
        group.bench_function(BenchmarkId::new("since", lines), |b| {
            b.iter(|| {
                let after = LineNumber(places.below(lines - LINES));
                first_lines(&runtime, &store, id, Start::After(after), Some(LINES))
            });
        });
    }
    let mut places = Places(1);
    group.bench_function("since/10000, one of 1000 such runs", |b| {
        b.iter(|| {
            let id = &small[places.below(SMALL) as usize];
            let after = LineNumber(places.below(SIZES[0] - LINES));
            first_lines(&runtime, &store, id, Start::After(after), Some(LINES))
        });
    });
    for (lines, id) in &runs {
        group.bench_function(BenchmarkId::new("tail", lines), |b| {
            let start = Start::LastLines { count: LINES, after: LineNumber::START };
            b.iter(|| first_lines(&runtime, &store, id, start, None));
        });
    }
    group.bench_function("pread", |b| {
        let path = folder.path().join("job_runs").join(runs[2].1.as_str()).join("stdout.log");
        let file = File::open(path).expect("the run has a log");
        let length = file.metadata().expect("the log has a length").len();
        let (mut places, mut buffer) = (Places(1), vec![0; 10_400]);
        b.iter(|| {
            let read = file.read_at(&mut buffer, places.below(length - 10_400));
            black_box(read.expect("the log can be read"))
        });
    });
    group.finish();
}

/// The last of the runs is over; the index tells of its end once it has all of it.
fn wait_for_index(store: &impl LogStore, runs: usize) {
    let query = databuild_logs::RunQuery { limit: Some(runs), ..databuild_logs::RunQuery::default() };
    while store.runs(&query).expect("runs can be listed").runs.len() < runs {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_secs(1));
}

/// Reads the first hundred lines, which may come as two batches.
fn first_lines(
    runtime: &Runtime,
    store: &impl LogStore,
    id: &JobRunId,
    start: Start,
    limit: Option<u64>,
) -> usize {
    let options = ReadOptions { start, limit, ..ReadOptions::new(View::One(Stream::Stdout)) };
    let mut events = store.read(id, options).expect("the run can be read");
    let (mut lines, mut bytes) = (0, 0);
    while lines < LINES {
        match runtime.block_on(events.next()) {
            Some(Ok(ReadEvent::Lines(batch))) => {
                lines += batch.lines;
                bytes += batch.bytes.len();
            }
            other => panic!("no lines, but {other:?}"),
        }
    }
    bytes
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
    support::main(seek);
}
