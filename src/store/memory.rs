//! A store that keeps runs in memory, for the tests of those who embed us.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::LogError;
use crate::line::{ByteOffset, LineNumber, Stream, UnixMicros, View};
use crate::logfile::Io;
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::follow::{Source, Step, drive};
use crate::store::{
    Batch, CutLine, LineTime, LogStore, ReadEnd, ReadEvent, ReadOptions, ReadStream, RunCursor, RunEnd,
    RunPage, RunQuery, RunWriter, Start,
};

/// Keeps runs in memory: everything a [`LogStore`] does, and nothing that outlives it. Its memory grows with what
/// is logged, so it is for tests.
#[derive(Clone, Debug)]
pub struct MemoryLogStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts changes; followers wait on it.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    runs: BTreeMap<JobRunId, Run>,
    started: u64,
    closed: bool,
}

#[derive(Debug)]
struct Run {
    /// The order in which runs were started.
    number: u64,
    meta: JobMetadata,
    /// Whole lines of both streams in arrival order.
    entries: Vec<Entry>,
    /// For each stream, where its lines are in `entries`.
    of_stream: [Vec<usize>; 2],
    /// For each stream, the beginning of a line whose end has not come yet.
    unterminated: [Vec<u8>; 2],
    last_time: UnixMicros,
}

#[derive(Debug)]
struct Entry {
    stream: Stream,
    text: Bytes,
    time: UnixMicros,
}

impl Default for MemoryLogStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryLogStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared { state: Mutex::default(), changes: watch::Sender::new(0) };
        Self { shared: Arc::new(shared) }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T, LogError>) -> Result<T, LogError> {
        let result = change(&mut self.shared.lock());
        self.shared.changes.send_modify(|count| *count += 1);
        result
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn start(&mut self, spec: RunSpec) -> Result<&mut Run, LogError> {
        if self.runs.contains_key(&spec.id) {
            return Err(LogError::AlreadyExists { id: spec.id });
        }
        self.started += 1;
        let run = Run {
            number: self.started,
            meta: JobMetadata::started(spec.clone(), UnixMicros::now()),
            entries: Vec::new(),
            of_stream: Default::default(),
            unterminated: Default::default(),
            last_time: UnixMicros::default(),
        };
        Ok(self.runs.entry(spec.id).or_insert(run))
    }

    fn run(&self, id: &JobRunId) -> Result<&Run, LogError> {
        self.runs.get(id).ok_or_else(|| LogError::NotFound { id: id.clone() })
    }

    fn live(&mut self, id: &JobRunId) -> Result<&mut Run, LogError> {
        let run = self.runs.get_mut(id).ok_or_else(|| LogError::NotFound { id: id.clone() })?;
        if run.meta.state.is_over() { Err(LogError::Finished { id: id.clone() }) } else { Ok(run) }
    }
}

impl Run {
    fn append(&mut self, stream: Stream, mut bytes: &[u8]) {
        self.last_time = UnixMicros::now().max(UnixMicros(self.last_time.0 + 1));
        self.totals_mut(stream).bytes += bytes.len() as u64;
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at(end + 1);
            self.unterminated[stream.index()].extend_from_slice(line);
            self.end_line(stream);
            bytes = rest;
        }
        self.unterminated[stream.index()].extend_from_slice(bytes);
    }

    fn end_line(&mut self, stream: Stream) {
        let text = std::mem::take(&mut self.unterminated[stream.index()]);
        self.of_stream[stream.index()].push(self.entries.len());
        self.entries.push(Entry { stream, text: text.into(), time: self.last_time });
        self.totals_mut(stream).lines += 1;
    }

    fn finish(&mut self, end: RunEnd) -> JobMetadata {
        for stream in Stream::BOTH {
            if !self.unterminated[stream.index()].is_empty() {
                self.end_line(stream);
            }
        }
        end.apply_to(&mut self.meta);
        self.meta.clone()
    }

    fn totals_mut(&mut self, stream: Stream) -> &mut crate::run::StreamTotals {
        match stream {
            Stream::Stdout => &mut self.meta.stdout,
            Stream::Stderr => &mut self.meta.stderr,
        }
    }

    /// How many lines a view has.
    fn lines(&self, view: View) -> u64 {
        match view {
            View::One(stream) => self.of_stream[stream.index()].len() as u64,
            View::All => self.entries.len() as u64,
        }
    }

    /// The line at this index of a view.
    fn entry(&self, view: View, index: u64) -> &Entry {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        match view {
            View::One(stream) => &self.entries[self.of_stream[stream.index()][index]],
            View::All => &self.entries[index],
        }
    }

    /// The whole lines of a stream.
    fn texts(&self, stream: Stream) -> impl Iterator<Item = &[u8]> {
        self.of_stream[stream.index()].iter().map(|&entry| &self.entries[entry].text[..])
    }

    fn first_index(&self, view: View, start: Start) -> u64 {
        match start {
            Start::After(line) => line.0,
            Start::LastLines { count, after } => self.lines(view).saturating_sub(count).max(after.0),
            Start::Since(time) => {
                (0..self.lines(view)).find(|&i| self.entry(view, i).time >= time).unwrap_or(self.lines(view))
            }
        }
    }
}

impl LogStore for MemoryLogStore {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        let id = spec.id.clone();
        self.change(|state| state.start(spec).map(drop))?;
        Ok(Box::new(Writer { store: self.clone(), id, finished: false }))
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.change(|state| {
            if !state.runs.contains_key(id) {
                state.start(RunSpec::new(id.clone()))?;
            }
            state.live(id)?.append(stream, bytes);
            Ok(())
        })
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.change(|state| Ok(state.live(id)?.finish(end)))
    }

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        if !options.follow {
            self.shared.lock().run(id)?;
        }
        let signal = self.shared.changes.subscribe();
        let left = options.limit.unwrap_or(u64::MAX);
        let shared = Arc::clone(&self.shared);
        Ok(drive(Box::new(MemorySource { shared, id: id.clone(), options, next: None, left }), signal))
    }

    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
        Ok(LineNumber(self.shared.lock().run(id)?.first_index(view, start)))
    }

    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        let state = self.shared.lock();
        let run = state.run(id)?;
        let lines = run.first_index(View::One(stream), start);
        Ok(ByteOffset(
            run.texts(stream)
                .take(usize::try_from(lines).unwrap_or(usize::MAX))
                .map(<[u8]>::len)
                .sum::<usize>() as u64,
        ))
    }

    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError> {
        let state = self.shared.lock();
        let run = state.run(id)?;
        let rest = run.unterminated[stream.index()].as_slice();
        let all = run.texts(stream).chain([rest]).flatten().copied();
        Ok(all.skip(usize::try_from(offset.0).unwrap_or(usize::MAX)).take(length).collect())
    }

    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        Ok(self.shared.lock().run(id)?.meta.clone())
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        let state = self.shared.lock();
        let below = query.cursor.map_or(u64::MAX, |cursor| cursor.0);
        let mut found: Vec<&Run> =
            state.runs.values().filter(|run| run.number < below && query.matches(&run.meta)).collect();
        found.sort_by_key(|run| std::cmp::Reverse(run.number));
        let more = found.len() > query.page_size();
        found.truncate(query.page_size());
        let next = found.last().filter(|_| more).map(|run| RunCursor(run.number));
        let runs = found.into_iter().map(|run| run.meta.clone()).collect();
        Ok(RunPage { runs, next, pinned: Vec::new() })
    }

    fn close(&self) -> Result<(), LogError> {
        self.change(|state| {
            state.closed = true;
            Ok(())
        })
    }
}

struct Writer {
    store: MemoryLogStore,
    id: JobRunId,
    finished: bool,
}

impl RunWriter for Writer {
    fn id(&self) -> &JobRunId {
        &self.id
    }

    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.store.append(&self.id, stream, bytes)
    }

    fn flush(&mut self) -> Result<(), LogError> {
        Ok(())
    }

    fn finish(mut self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.finished = true;
        self.store.finish(&self.id, end)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            // The run may have been finished through the store; then there is nothing to lose.
            drop(self.store.finish(&self.id, RunEnd::now(super::Outcome::Lost)));
        }
    }
}

struct MemorySource {
    shared: Arc<Shared>,
    id: JobRunId,
    options: ReadOptions,
    /// The index of the next line of the view; `None` until the run is there.
    next: Option<u64>,
    left: u64,
}

impl Source for MemorySource {
    fn next(&mut self, _: Io) -> Result<Step, LogError> {
        let state = self.shared.lock();
        let Some(run) = state.runs.get(&self.id) else {
            return Ok(if state.closed { end(ReadEnd::Shutdown) } else { Step::CaughtUp });
        };
        let view = self.options.view;
        let next = *self.next.get_or_insert_with(|| run.first_index(view, self.options.start));
        if self.left > 0 && next < run.lines(view) {
            let batch = gather(run, &self.options, next, self.left);
            self.left -= batch.lines;
            self.next = Some(next + batch.lines);
            return Ok(Step::Event(ReadEvent::Lines(batch)));
        }
        Ok(if run.meta.state.is_over() {
            end(ReadEnd::Complete(Box::new(run.meta.clone())))
        } else if !self.options.follow || self.left == 0 {
            end(ReadEnd::Running { next: LineNumber(next) })
        } else if state.closed {
            end(ReadEnd::Shutdown)
        } else {
            Step::CaughtUp
        })
    }
}

fn end(end: ReadEnd) -> Step {
    Step::Event(ReadEvent::End(end))
}

/// Lines of one stream from index `next` of the view on.
fn gather(run: &Run, options: &ReadOptions, next: u64, left: u64) -> Batch {
    let view = options.view;
    let stream = run.entry(view, next).stream;
    let in_stream = match view {
        View::One(_) => next,
        View::All => {
            let index = usize::try_from(next).unwrap_or(usize::MAX);
            run.of_stream[stream.index()].partition_point(|&entry| entry < index) as u64
        }
    };
    let mut batch = Batch {
        stream,
        first_line: LineNumber(in_stream + 1),
        first_position: LineNumber(next + 1),
        lines: 0,
        bytes: Bytes::new(),
        times: Vec::new(),
        cut: None,
    };
    let mut text = Vec::new();
    while batch.lines < left && next + batch.lines < run.lines(view) {
        let entry = run.entry(view, next + batch.lines);
        let too_long = line_length(&entry.text) > Batch::MAX_LINE_BYTES;
        let full = !text.is_empty() && text.len() + entry.text.len() > options.batch_bytes;
        if entry.stream != stream || full || (too_long && batch.lines > 0) {
            break;
        }
        if options.times || view == View::All {
            batch.times.push(LineTime { from: batch.first_line.plus(batch.lines), time: entry.time });
        }
        batch.lines += 1;
        if too_long {
            text.extend_from_slice(&entry.text[..Batch::MAX_LINE_BYTES]);
            batch.cut = Some(CutLine { full_bytes: line_length(&entry.text) as u64 });
            break;
        }
        text.extend_from_slice(&entry.text);
    }
    batch.bytes = text.into();
    batch
}

fn line_length(text: &[u8]) -> usize {
    text.strip_suffix(b"\n").unwrap_or(text).len()
}
