//! A finished run over HTTP to one client: our frames, axum's own `Sse`, and the raw bytes, from one process over the
//! same text. Ours comes from the store's files, in the page cache; axum's `Event`s are made of memory.

mod support;

use std::convert::Infallible;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::sse::{Event, Sse};
use axum::routing::get;
use bytes::Bytes;
use criterion::{Criterion, Throughput};
use futures_util::stream;
use support::service::fetch;
use support::{finished_run, folder, service, store, workload};
use tokio::runtime::Runtime;

const LINES: u64 = 1_000_000;

const FRAMES: &str = "/api/job_runs/r/logs/stdout";
const RAW: &str = "/api/job_runs/r/logs/stdout/raw";

fn sse(criterion: &mut Criterion) {
    let folder = folder();
    let runtime = Runtime::new().expect("a runtime");
    let store = Arc::new(store(folder.path()));
    finished_run(&*store, "r", LINES);
    let ours = service::serve_store(&runtime, store);
    let theirs = service::serve_router(&runtime, peer(workload::text(LINES).into()));
    let mut buffer = vec![0; 1 << 20];

    let mut group = criterion.benchmark_group("sse");
    group.throughput(Throughput::Elements(LINES)).sample_size(20);
    group.measurement_time(Duration::from_secs(4)).warm_up_time(Duration::from_millis(500));
    for (name, address, target) in [
        ("frames", ours, FRAMES),
        ("frames of json", ours, "/api/job_runs/r/logs/stdout?format=json"),
        ("raw bytes", ours, RAW),
        ("axum's Event a line", theirs, "/events"),
    ] {
        group.bench_function(name, |b| b.iter(|| black_box(fetch(address, target, &mut buffer))));
    }
    group.finish();
    let timed = |address, target| {
        let mut buffer = vec![0; 1 << 20];
        let begin = Instant::now();
        assert!(fetch(address, target, &mut buffer) as u64 > LINES, "all lines came");
        begin.elapsed()
    };
    support::side_by_side("frames to raw bytes", 15, || timed(ours, FRAMES), || timed(ours, RAW));
    support::side_by_side("frames to Events", 9, || timed(ours, FRAMES), || timed(theirs, "/events"));
}

/// What an axum service does that has nothing of ours: one `Event` a line.
fn peer(text: Bytes) -> Router {
    let events = get(async move || {
        let mut rest = text;
        let lines = (1_u64..).map_while(move |n| {
            let end = memchr::memchr(b'\n', &rest)?;
            let line = rest.split_to(end + 1);
            let line = std::str::from_utf8(&line[..end]).unwrap_or_default();
            Some(Ok::<_, Infallible>(Event::default().event("log").id(n.to_string()).data(line)))
        });
        Sse::new(stream::iter(lines))
    });
    Router::new().route("/events", events)
}

fn main() {
    support::main(sse);
}
