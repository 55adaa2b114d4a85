//! A finished run over HTTP to one client: our frames, axum's own `Sse`, and the raw bytes, from one process over the
//! same text.

use std::convert::Infallible;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use axum::Router;
use axum::response::sse::{Event, Sse};
use axum::routing::get;
use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use databuild_logs::{
    Batch, ByteOffset, JobMetadata, JobRunId, LineNumber, LineTime, LogError, LogStore, ReadEnd, ReadEvent,
    ReadOptions, ReadStream, RunEnd, RunPage, RunQuery, RunSpec, RunWriter, ServerOptions, Start, Stream,
    StreamTotals, UnixMicros, View,
};
use futures_util::StreamExt;
use futures_util::stream;

const LINES: u64 = 1_000_000;
const BATCH_BYTES: usize = 128 * 1024;

/// Text of 104 bytes a line on average.
fn text() -> Bytes {
    let mut text = Vec::new();
    for n in 0..LINES {
        let pad = usize::try_from(n * 7919 % 97).unwrap_or_default();
        writeln!(text, "[INFO] {n:08} compiling src/module_{:04}/file.rs {:=<pad$}", n % 5000, "")
            .unwrap_or_default();
    }
    text.into()
}

/// A run that is in memory and costs nothing to read, so that what is measured is HTTP.
struct Prepared {
    text: Bytes,
    batches: Arc<[Batch]>,
    run: JobMetadata,
}

impl Prepared {
    fn new(id: &JobRunId, text: Bytes) -> Self {
        let mut run = JobMetadata::started(RunSpec::new(id.clone()), UnixMicros(0));
        run.state = databuild_logs::RunState::Succeeded { ended: UnixMicros(1) };
        run.stdout = StreamTotals { bytes: text.len() as u64, lines: LINES, ..StreamTotals::default() };
        let (mut batches, mut start, mut first) = (Vec::new(), 0, LineNumber(1));
        while start < text.len() {
            let most = text.len().min(start + BATCH_BYTES);
            let end = memchr::memrchr(b'\n', &text[start..most]).map_or(most, |end| start + end + 1);
            let bytes = text.slice(start..end);
            let lines = memchr::memchr_iter(b'\n', &bytes).count() as u64;
            let times = vec![LineTime { from: first, time: UnixMicros(1_790_000_000_000_000) }];
            let stream = Stream::Stdout;
            batches.push(Batch {
                stream,
                first_line: first,
                first_position: first,
                lines,
                bytes,
                times,
                cut: None,
            });
            (start, first) = (end, first.plus(lines));
        }
        Self { text, batches: batches.into(), run }
    }
}

impl LogStore for Prepared {
    fn start(&self, _: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        Err(LogError::Closed)
    }
    fn append(&self, _: &JobRunId, _: Stream, _: &[u8]) -> Result<(), LogError> {
        Err(LogError::Closed)
    }
    fn finish(&self, _: &JobRunId, _: RunEnd) -> Result<JobMetadata, LogError> {
        Err(LogError::Closed)
    }
    fn read(&self, _: &JobRunId, _: ReadOptions) -> Result<ReadStream, LogError> {
        let (batches, run) = (Arc::clone(&self.batches), Box::new(self.run.clone()));
        let lines = (0..batches.len()).map(move |index| Ok(ReadEvent::Lines(batches[index].clone())));
        Ok(stream::iter(lines.chain([Ok(ReadEvent::End(ReadEnd::Complete(run)))])).boxed())
    }
    fn position(&self, _: &JobRunId, _: View, start: Start) -> Result<LineNumber, LogError> {
        Ok(if let Start::After(line) = start { line } else { LineNumber::START })
    }

    fn byte_offset(&self, _: &JobRunId, _: Stream, _: Start) -> Result<ByteOffset, LogError> {
        Ok(ByteOffset(0))
    }
    fn read_bytes(&self, _: &JobRunId, _: Stream, at: ByteOffset, length: usize) -> Result<Bytes, LogError> {
        let start = usize::try_from(at.0).unwrap_or(usize::MAX).min(self.text.len());
        Ok(self.text.slice(start..self.text.len().min(start + length)))
    }
    fn run(&self, _: &JobRunId) -> Result<JobMetadata, LogError> {
        Ok(self.run.clone())
    }
    fn runs(&self, _: &RunQuery) -> Result<RunPage, LogError> {
        Ok(RunPage::default())
    }
    fn close(&self) -> Result<(), LogError> {
        Ok(())
    }
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

/// Reads a whole answer; gives its length.
fn fetch(address: SocketAddr, target: &str, buffer: &mut [u8]) -> usize {
    let mut socket = TcpStream::connect(address).expect("the server listens");
    let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).expect("the request is sent");
    let mut received = 0;
    loop {
        match socket.read(buffer).expect("the answer goes on") {
            0 => return received,
            length => received += length,
        }
    }
}

fn finished_run(c: &mut Criterion) {
    let text = text();
    let id: JobRunId = "r".parse().expect("a valid id");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (ours, theirs) = runtime.block_on(async {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let ours = databuild_logs::listen(any_port).expect("a port");
        let theirs = databuild_logs::listen(any_port).expect("a port");
        let addresses = (ours.local_addr().expect("bound"), theirs.local_addr().expect("bound"));
        let store = Arc::new(Prepared::new(&id, text.clone()));
        tokio::spawn(databuild_logs::serve(ours, store, ServerOptions::default(), std::future::pending()));
        tokio::spawn(axum::serve(theirs, peer(text)).into_future());
        addresses
    });
    let mut buffer = vec![0; 1 << 20];
    let mut group = c.benchmark_group("http_sse");
    group.throughput(Throughput::Elements(LINES)).sample_size(10);
    for (name, address, target) in [
        ("frames", ours, "/api/job_runs/r/logs/stdout"),
        ("frames of json", ours, "/api/job_runs/r/logs/stdout?format=json"),
        ("raw bytes", ours, "/api/job_runs/r/logs/stdout/raw"),
        ("axum's Event a line", theirs, "/events"),
    ] {
        group.bench_function(name, |b| b.iter(|| black_box(fetch(address, target, &mut buffer))));
    }
    group.finish();
}

criterion_group!(benches, finished_run);
criterion_main!(benches);
