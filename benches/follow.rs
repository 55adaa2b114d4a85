//! From the moment at which a job writes a line to the moment at which a connected client has read it.
//!
//! A line is the time of its writing, and a client on a thread of its own reads all the time; a line comes every
//! 2 ms, so everybody on the way has gone to sleep. The loop that axum makes of a channel is what the others are
//! measured by. Medians and 99th percentiles are printed beside what criterion says, which are means.

mod support;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::response::sse::{Event, Sse};
use axum::routing::get;
use criterion::{Criterion, SamplingMode};
use databuild_logs::{JobCommand, JobRunId, LogStore, RunSpec, Stream, SubProcessBackend};
use futures_util::stream;
use support::{drip, folder, service, store};
use tokio::runtime::Runtime;

fn follow(criterion: &mut Criterion) {
    let folder = folder();
    let runtime = Runtime::new().expect("a runtime");
    let store = Arc::new(store(folder.path()));
    let address = service::serve_store(&runtime, Arc::clone(&store) as Arc<dyn LogStore>);

    let mut group = criterion.benchmark_group("follow");
    // Time here is the sum of latencies: for each millisecond of it the bench waits for about fifteen lines.
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.warm_up_time(Duration::from_millis(10)).measurement_time(Duration::from_millis(150));
    let mut bare = None;
    let mut measure = |name: &str, client: Client| {
        group.bench_function(name, |b| b.iter_custom(|lines| client.sum_of(lines)));
        client.report(name, &mut bare);
    };

    measure("bare axum loop", bare_loop(&runtime));

    let client = Client::connect(address, "appended");
    let mut writer = store.start(RunSpec::new(id("appended"))).expect("a run can be started");
    thread::spawn(move || drip::drip(|line| writer.append(Stream::Stdout, line.as_bytes()).is_ok()));
    measure("own process, appended", client);

    let client = Client::connect(address, "piped");
    let backend = SubProcessBackend::new(Arc::clone(&store) as Arc<dyn LogStore>);
    let job = JobCommand::new(RunSpec::new(id("piped")), drip::printing());
    let job = backend.start(job).expect("the job can be started");
    measure("own process, a job's pipe", client);
    job.cancel();

    let client = Client::connect(address, "elsewhere");
    let writer = drip::start_logging(folder.path(), "elsewhere");
    measure("another process, appended", client);
    drop(writer);

    let client = Client::connect(address, "recorded");
    let recorder = start_recording(folder.path(), "recorded");
    measure("databuild run, a job's pipe", client);
    drop(recorder);
    group.finish();
    store.close().expect("the store can be closed");
}

fn id(id: &str) -> JobRunId {
    id.parse().expect("a valid id")
}

/// What an axum service does that has nothing of ours: a channel, and one `Event` a line.
fn bare_loop(runtime: &Runtime) -> Client {
    let (sender, receiver) = tokio::sync::mpsc::channel::<String>(16);
    let receiver = Arc::new(Mutex::new(Some(receiver)));
    let events = get(async move || {
        let receiver = receiver.lock().expect("nobody panicked").take().expect("one client");
        let events = stream::unfold((receiver, 1_u64), async |(mut receiver, number)| {
            let line = receiver.recv().await?;
            let event = Event::default().event("log").id(number.to_string()).data(line.trim_end());
            Some((Ok::<_, Infallible>(event), (receiver, number + 1)))
        });
        Sse::new(events)
    });
    let address = service::serve_router(runtime, Router::new().route("/events", events));
    let client = Client::reading(address, "/events".to_owned());
    thread::spawn(move || drip::drip(|line| sender.blocking_send(line.to_owned()).is_ok()));
    client
}

/// Starts `databuild run` with a job that prints.
fn start_recording(folder: &Path, id: &str) -> drip::Killed {
    let mut command = Command::new(env!("CARGO_BIN_EXE_databuild"));
    command.arg("--log-dir").arg(folder).args(["run", "--quiet", "--id", id, "--"]).args(drip::printing());
    drip::Killed::start(&mut command)
}

/// A client that follows, and the latency of each line that it read.
struct Client {
    latencies: Receiver<Duration>,
    seen: Mutex<Vec<Duration>>,
}

impl Client {
    fn connect(address: SocketAddr, id: &str) -> Self {
        Self::reading(address, format!("/api/job_runs/{id}/logs/stdout?follow=true"))
    }

    fn reading(address: SocketAddr, target: String) -> Self {
        let (sender, latencies) = channel();
        thread::spawn(move || {
            let mut rest = Vec::new();
            service::follow(address, &target, |bytes| {
                let now = drip::now();
                rest.extend_from_slice(bytes);
                let mut wanted = true;
                while let Some(end) = memchr::memchr(b'\n', &rest) {
                    if let Some(written) = written_at(&rest[..end]) {
                        wanted &= sender.send(Duration::from_nanos(now.saturating_sub(written))).is_ok();
                    }
                    rest.drain(..=end);
                }
                wanted
            });
        });
        Self { latencies, seen: Mutex::default() }
    }

    fn sum_of(&self, lines: u64) -> Duration {
        let next = || self.latencies.recv_timeout(Duration::from_secs(10)).expect("lines keep coming");
        let latencies: Vec<Duration> = (0..lines).map(|_| next()).collect();
        let mut seen = self.seen.lock().expect("nobody panicked");
        seen.extend(&latencies);
        latencies.iter().sum()
    }

    fn report(&self, name: &str, bare: &mut Option<Duration>) {
        let mut seen = self.seen.lock().expect("nobody panicked");
        seen.sort_unstable();
        let (Some(median), Some(slow)) = (seen.get(seen.len() / 2), seen.get(seen.len() * 99 / 100)) else {
            return;
        };
        let bare = bare.get_or_insert(*median);
        let ratio = median.as_secs_f64() / bare.as_secs_f64();
        println!("{name}: p50 {median:.1?}, p99 {slow:.1?}, {} lines, {ratio:.2} × bare", seen.len());
    }
}

/// The time that a `data:` line begins with.
fn written_at(line: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(line.strip_prefix(b"data: ")?).ok()?;
    text.split(' ').next()?.parse().ok()
}

fn main() {
    support::main(follow);
}
