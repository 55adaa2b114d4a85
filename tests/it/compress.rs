//! Runs that are over are compressed, and everything that reads them gives what it gave before.

mod background;
mod crash;
mod damage;
mod retention;
mod service;
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use databuild_logs::{
    ByteOffset, CheckOptions, Compression, Exit, FileLogStore, FileStoreOptions, JobMetadata, JobRunId,
    LineNumber, LogError, LogStore, Outcome, ReadEvent, ReadOptions, ReadStream, RunEnd, RunPage, RunQuery,
    RunSpec, RunWriter, Start, StateKind, Stream, UnixMicros, View, check_index, conformance, dump_index,
    rebuild_index,
};
use futures_util::StreamExt;

use crate::support::cli::Databuild;
use crate::support::disk::SmallDisk;
use crate::support::wait_until;

const VIEWS: [View; 3] = [View::STDOUT, View::STDERR, View::All];
const PARTS: [&str; 3] = ["stdout.log", "stderr.log", "journal"];

fn open(folder: &Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions::default()).unwrap()
}

fn open_folder(folder: &Path) -> FileLogStore {
    FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap()
}

fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

fn of_run(folder: &Path, run: &str, file: &str) -> PathBuf {
    folder.join("job_runs").join(run).join(file)
}

/// The names in a run's folder, in order.
fn names(folder: &Path, run: &str) -> Vec<String> {
    let entries = fs::read_dir(folder.join("job_runs").join(run)).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// A line of output: long or short, blank, or with bytes that are no text.
fn line(number: u64) -> Vec<u8> {
    match number % 50 {
        7 => b"\n".to_vec(),
        11 => b"bad \xff\0 bytes\r\n".to_vec(),
        23 => [b"long ".repeat(1_000 + (number % 1_000) as usize), b"\n".to_vec()].concat(),
        _ => format!("{number} {:x} output of a job that says much\n", number.wrapping_mul(0x9e37_79b9_7f4a))
            .into_bytes(),
    }
}

/// A run of several frames: both streams in turns, lines of all kinds, the last one without its end.
fn write_run(store: &dyn LogStore, run: &str) {
    let mut writer = store.start(RunSpec::new(id(run)).command(["make"])).unwrap();
    for number in 0..12_000 {
        let stream = if number % 97 < 9 { Stream::Stderr } else { Stream::Stdout };
        writer.append(stream, &line(number)).unwrap();
        if number % 500 == 0 {
            writer.flush().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    writer.append(Stream::Stdout, b"no end").unwrap();
    writer.finish(success()).unwrap();
}

/// A line, or a hole.
#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Line { position: u64, stream: Stream, number: u64, time: Option<UnixMicros>, text: Vec<u8> },
    Gap { next: u64, gap: databuild_logs::Gap },
}

async fn read(store: &dyn LogStore, run: &str, options: ReadOptions) -> Vec<Seen> {
    drain(store.read(&id(run), options).unwrap()).await
}

async fn drain(mut events: ReadStream) -> Vec<Seen> {
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => seen.extend(batch.lines().map(|line| Seen::Line {
                position: line.position.0,
                stream: batch.stream,
                number: line.number.0,
                time: line.time,
                text: line.text.to_vec(),
            })),
            ReadEvent::Gap { gap, next } => seen.push(Seen::Gap { next: next.0, gap }),
            ReadEvent::End(_) => return seen,
        }
    }
    panic!("the stream ended without an end");
}

/// What every way of reading gives: all views, from many places, with times and without, and the bytes.
async fn everything(store: &dyn LogStore, run: &str) -> (Vec<Vec<Seen>>, Vec<Bytes>, Vec<ByteOffset>) {
    let (mut lines, mut bytes, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    let found = store.run(&id(run)).unwrap();
    let middle = UnixMicros((found.started_at.0 + found.state.ended().unwrap().0) / 2);
    let count = found.stdout.lines + found.stderr.lines;
    let mut starts = vec![Start::Since(middle), Start::LastLines { count: 5, after: LineNumber::START }];
    starts
        .extend([0, 1, count / 5, count / 2, count - count / 9, count].map(|n| Start::After(LineNumber(n))));
    for view in VIEWS {
        for &start in &starts {
            let position = store.position(&id(run), view, start).unwrap();
            lines.push(vec![Seen::Line {
                position: position.0,
                stream: Stream::Stdout,
                number: 0,
                time: None,
                text: Vec::new(),
            }]);
            for times in [false, true] {
                let options = ReadOptions { start, limit: Some(3_000), times, ..ReadOptions::new(view) };
                lines.push(read(store, run, options).await);
            }
        }
        lines.push(read(store, run, ReadOptions { times: true, ..ReadOptions::new(view) }).await);
    }
    for stream in Stream::BOTH {
        let length = found.totals(stream).bytes;
        offsets.extend(starts.iter().map(|&start| store.byte_offset(&id(run), stream, start).unwrap()));
        for (offset, length) in
            [(0, length), (1, 300_000), (length / 3, 100), (length / 2, length), (length, 10)]
        {
            bytes.push(store.read_bytes(&id(run), stream, ByteOffset(offset), length as usize).unwrap());
        }
    }
    (lines, bytes, offsets)
}

/// The rows of an index, without what compressing changes.
fn rows(folder: &Path) -> Vec<serde_json::Value> {
    let mut rows = Vec::new();
    dump_index(folder, |mut row| {
        for changes in ["disk_bytes", "compressed", "bytes", "finished_bytes"] {
            row.as_object_mut().unwrap().remove(changes);
        }
        rows.push(row);
        Ok(())
    })
    .unwrap();
    rows
}

fn is_clean(folder: &Path) {
    let report = check_index(folder, CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(report.findings, [], "of {}", folder.display());
}

#[tokio::test]
async fn every_way_of_reading_gives_what_it_gave_before() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let plain = PARTS.map(|part| fs::read(of_run(folder.path(), "x", part)).unwrap());
    let before = everything(&store, "x").await;
    let metadata = fs::read(of_run(folder.path(), "x", "metadata.json")).unwrap();
    store.close().unwrap();
    let rows_before = rows(folder.path());

    let store = open(folder.path());
    let Compression { bytes_before, bytes_after } = store.compress(&id("x")).unwrap();
    assert!(bytes_after * 3 < bytes_before, "{bytes_before} bytes became {bytes_after}");
    let now = ["journal.zst", "metadata.json", "stderr.log.zst", "stdout.log.zst"];
    assert_eq!(names(folder.path(), "x"), now);
    assert_eq!(fs::read(of_run(folder.path(), "x", "metadata.json")).unwrap(), metadata, "written once");
    assert!(everything(&store, "x").await == before, "by the store that compressed it");
    assert_eq!(store.compress(&id("x")).unwrap().bytes_after, bytes_after, "again: nothing to do");
    store.close().unwrap();
    assert_eq!(rows(folder.path()), rows_before);
    is_clean(folder.path());

    assert!(everything(&open_folder(folder.path()), "x").await == before, "without the index");
    rebuild_index(folder.path(), |_| ()).unwrap();
    assert_eq!(rows(folder.path()), rows_before, "rebuilt from the compressed journal");
    is_clean(folder.path());
    let store = open(folder.path());
    assert!(everything(&store, "x").await == before, "with the rebuilt index");
    store.close().unwrap();
    fs::remove_file(of_run(folder.path(), "x", "journal.zst")).unwrap();
    rebuild_index(folder.path(), |_| ()).unwrap();
    let scanned = read(&open(folder.path()), "x", ReadOptions::new(View::STDOUT)).await;
    assert!(scanned == read(&open_folder(folder.path()), "x", ReadOptions::new(View::STDOUT)).await);
    let texts = |seen: &[Seen]| -> Vec<Vec<u8>> {
        seen.iter()
            .filter_map(|seen| if let Seen::Line { text, .. } = seen { Some(text.clone()) } else { None })
            .collect()
    };
    assert!(texts(&scanned) == texts(&before.0[before.0.len() / 3 - 1]), "lines counted in a compressed log");
    for (part, plain) in PARTS.iter().zip(&plain).take(2) {
        let path = of_run(folder.path(), "x", &format!("{part}.zst"));
        for program in [&["zstdcat"][..], &["zstd", "-dc"]] {
            let done = Command::new(program[0]).args(&program[1..]).arg(&path).output().unwrap();
            assert!(done.status.success() && done.stdout == *plain, "{program:?} reads {part}");
        }
    }
}

#[tokio::test]
async fn holes_stay_where_they_are() {
    let databuild = Databuild::new();
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 8);
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    let store = FileLogStore::open(&disk.at, options).unwrap();
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    for round in 0..3 {
        for number in 0..2_000 {
            writer.append(Stream::Stdout, format!("{round} {number} kept\n").as_bytes()).unwrap();
        }
        disk.fill();
        for number in 0..5_000 {
            // What the disk refuses is counted.
            let _ = writer.append(Stream::Stdout, format!("{round} {number} perhaps lost\n").as_bytes());
        }
        disk.make_room();
        // Whether there is room again is looked at now and then.
        std::thread::sleep(std::time::Duration::from_millis(1_200));
        writer.append(Stream::Stdout, b"behind the hole\n").unwrap();
    }
    writer.finish(success()).unwrap();
    let before = everything(&store, "x").await;
    let gaps = before.0.last().unwrap().iter().filter(|seen| matches!(seen, Seen::Gap { .. })).count();
    assert!(gaps >= 3, "there are holes: {gaps}");
    store.compress(&id("x")).unwrap();
    assert!(everything(&store, "x").await == before);
    store.close().unwrap();
    is_clean(&disk.at);
}

#[tokio::test]
async fn logs_of_odd_lengths_are_compressed_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let logs: [(&str, &[u8]); 5] =
        [("none", b""), ("newline", b"\n"), ("open", b"no end"), ("one", b"one\n"), ("zeros", &[0; 70_000])];
    for (run, text) in logs {
        let mut writer = store.start(RunSpec::new(id(run))).unwrap();
        writer.append(Stream::Stderr, text).unwrap();
        writer.finish(success()).unwrap();
        let before = everything(&store, run).await;
        store.compress(&id(run)).unwrap();
        assert!(everything(&store, run).await == before, "{run}");
        let names = names(folder.path(), run);
        assert!(names.contains(&"stdout.log".to_owned()), "an empty file stays as it is: {names:?}");
        assert_eq!(names.contains(&"stderr.log.zst".to_owned()), !text.is_empty(), "{names:?}");
    }
    store.close().unwrap();
    is_clean(folder.path());
    rebuild_index(folder.path(), |_| ()).unwrap();
    is_clean(folder.path());
}

#[tokio::test]
async fn a_folder_by_another_tool_keeps_its_lines_and_its_times() {
    let folder = tempfile::tempdir().unwrap();
    let of_folder = folder.path().join("job_runs/x");
    fs::create_dir_all(&of_folder).unwrap();
    let text: Vec<u8> = (0..9_000).flat_map(line).collect();
    fs::write(of_folder.join("stdout.log"), &text).unwrap();
    fs::write(of_folder.join("stderr.log"), "err\n").unwrap();
    fs::write(of_folder.join("metadata.json"), r#"{"job_run_id":"x","exit_code":0}"#).unwrap();
    let store = open(folder.path());
    wait_until("the run is known", || store.run(&id("x")).is_ok_and(|run| run.state.is_over()));
    let (run, before) = (store.run(&id("x")).unwrap(), everything(&store, "x").await);
    store.compress(&id("x")).unwrap();
    assert_eq!(names(folder.path(), "x"), ["metadata.json", "stderr.log.zst", "stdout.log.zst"]);
    assert!(everything(&store, "x").await == before);
    store.close().unwrap();
    rebuild_index(folder.path(), |_| ()).unwrap();
    let store = open(folder.path());
    assert_eq!(store.run(&id("x")).unwrap(), run, "its end is the time of its files");
    assert!(everything(&store, "x").await == before);
    store.close().unwrap();
    is_clean(folder.path());
}

#[tokio::test]
async fn who_may_still_write_to_a_folder_is_not_taken_its_files_away() {
    let folder = tempfile::tempdir().unwrap();
    let of_folder = folder.path().join("job_runs/x");
    fs::create_dir_all(&of_folder).unwrap();
    fs::write(of_folder.join("stdout.log"), "text\n").unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(100_000);
    for path in [of_folder.join("stdout.log"), of_folder.clone()] {
        fs::File::open(path).unwrap().set_modified(long_ago).unwrap();
    }
    let store = open(folder.path());
    // Silence alone makes it lost.
    wait_until("the run is lost", || {
        store.run(&id("x")).is_ok_and(|run| run.state.kind() == StateKind::Lost)
    });
    assert!(matches!(store.compress(&id("x")), Err(LogError::Unfinished { .. })));
    assert_eq!(names(folder.path(), "x"), ["stdout.log"]);
}

#[tokio::test]
async fn a_line_of_100_mb_is_compressed_in_pieces() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    writer.append(Stream::Stdout, b"before\n").unwrap();
    let piece: Vec<u8> = (0..1_000_000u32).map(|n| b'a' + (n.wrapping_mul(n) % 26) as u8).collect();
    for _ in 0..100 {
        writer.append(Stream::Stdout, &piece).unwrap();
    }
    writer.append(Stream::Stdout, b"\nafter\n").unwrap();
    writer.finish(success()).unwrap();
    let before = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
    assert_eq!(before.len(), 3);
    store.compress(&id("x")).unwrap();
    assert!(read(&store, "x", ReadOptions::new(View::STDOUT)).await == before);
    let start = Start::After(LineNumber(2));
    let last = read(&store, "x", ReadOptions { start, ..ReadOptions::new(View::STDOUT) }).await;
    assert!(matches!(&last[..], [Seen::Line { number: 3, text, .. }] if text == b"after"), "{last:?}");
}

#[tokio::test]
async fn who_reads_while_a_run_is_compressed_notices_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let options =
        |view, follow| ReadOptions { follow, batch_bytes: 10_000, times: true, ..ReadOptions::new(view) };
    let mut before = Vec::new();
    for view in VIEWS {
        before.push(read(&store, "x", options(view, false)).await);
    }
    // Some have begun, and have the plain files open or none yet; others come in between.
    let mut open_reads = Vec::new();
    for (index, view) in VIEWS.into_iter().enumerate() {
        for pulled in [0, 1, 5] {
            let mut events = store.read(&id("x"), options(view, pulled == 1)).unwrap();
            let mut first = Vec::new();
            for _ in 0..pulled {
                let event = events.next().await.unwrap();
                let of_one = futures_util::stream::iter([event, Ok(end_of(&store))]).boxed();
                first.extend(drain(of_one).await);
            }
            open_reads.push((index, first, events));
        }
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (index, view) in VIEWS.into_iter().enumerate() {
            let (done, store, before) = (&done, &store, &before);
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) || rounds < 3 {
                    assert!(runtime.block_on(read(store, "x", options(view, false))) == before[index]);
                    rounds += 1;
                }
            });
        }
        store.compress(&id("x")).unwrap();
        done.store(true, Ordering::Relaxed);
    });
    assert!(names(folder.path(), "x").contains(&"stdout.log.zst".to_owned()));
    for (index, mut seen, events) in open_reads {
        seen.extend(drain(events).await);
        assert!(seen == before[index], "a read that was open goes on");
    }
}

fn end_of(store: &dyn LogStore) -> ReadEvent {
    ReadEvent::End(databuild_logs::ReadEnd::Complete(Box::new(store.run(&id("x")).unwrap())))
}

#[tokio::test]
async fn what_can_not_be_compressed_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert!(matches!(store.compress(&id("nobody")), Err(LogError::NotFound { .. })));
    let writer = store.start(RunSpec::new(id("live"))).unwrap();
    assert!(matches!(store.compress(&id("live")), Err(LogError::Unfinished { .. })));
    writer.finish(success()).unwrap();
    store.compress(&id("live")).unwrap();
    let memory = databuild_logs::MemoryLogStore::new();
    assert!(matches!(memory.compress(&id("nobody")), Err(LogError::NotFound { .. })));
    memory.start(RunSpec::new(id("x"))).unwrap().finish(success()).unwrap();
    assert!(matches!(memory.compress(&id("x")), Err(LogError::Unsupported { .. })));
}

/// A store that compresses every run as soon as it is over.
struct Compressing(Arc<dyn LogStore>);

impl Compressing {
    fn compress_what_is_over(&self, id: &JobRunId) {
        match self.0.compress(id) {
            Ok(_) | Err(LogError::Unfinished { .. } | LogError::NotFound { .. } | LogError::Closed) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

impl LogStore for Compressing {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        let id = spec.id.clone();
        let inner = Some(self.0.start(spec)?);
        Ok(Box::new(CompressingWriter { store: Self(Arc::clone(&self.0)), id, inner }))
    }
    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.0.append(id, stream, bytes)
    }
    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        let run = self.0.finish(id, end)?;
        self.compress_what_is_over(id);
        Ok(run)
    }
    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        self.0.read(id, options)
    }
    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
        self.0.position(id, view, start)
    }
    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        self.0.byte_offset(id, stream, start)
    }
    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError> {
        self.0.read_bytes(id, stream, offset, length)
    }
    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        self.0.run(id)
    }
    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        self.0.runs(query)
    }
    fn close(&self) -> Result<(), LogError> {
        self.0.close()
    }
}

struct CompressingWriter {
    store: Compressing,
    id: JobRunId,
    inner: Option<Box<dyn RunWriter>>,
}

impl RunWriter for CompressingWriter {
    fn id(&self) -> &JobRunId {
        &self.id
    }
    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.inner.as_mut().unwrap().append(stream, bytes)
    }
    fn flush(&mut self) -> Result<(), LogError> {
        self.inner.as_mut().unwrap().flush()
    }
    fn finish(mut self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        let run = self.inner.take().unwrap().finish(end)?;
        self.store.compress_what_is_over(&self.id);
        Ok(run)
    }
}

#[tokio::test]
async fn a_store_of_compressed_runs_does_what_every_store_has_to() {
    for open in [open, open_folder] {
        let parent = tempfile::tempdir().unwrap();
        let count = std::sync::atomic::AtomicUsize::new(0);
        conformance::run_all(|| {
            let number = count.fetch_add(1, Ordering::Relaxed);
            Arc::new(Compressing(Arc::new(open(&parent.path().join(number.to_string())))))
        })
        .await;
    }
}
