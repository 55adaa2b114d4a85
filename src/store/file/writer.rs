//! Writing a run: bytes to its log, then what arrived to its journal, then the news to its readers.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memchr::memchr;

use crate::error::LogError;
use crate::index::progress::{Checkpointer, Checkpoints, GapAt, Progress};
use crate::journal::{Arrival, JournalWriter, Record, What};
use crate::layout::{Layout, RunFolder};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::logfile::{AppendFile, count_lines, whole_lines};
use crate::run::{Gap, GapReason, JobMetadata, RunSpec};
use crate::store::RunEnd;
use crate::store::file::live::{LiveRun, finished};

/// Batches of a stream that arrive within this many microseconds share a mark.
const MERGE_MICROS: u64 = 1_000;
/// The most records that wait for a journal which can't be written; beyond that, marks of a stream are merged.
const MAX_UNWRITTEN: usize = 4_096;

/// A run that this process writes.
#[derive(Debug)]
pub(crate) struct OwnRun {
    pub(crate) run: Arc<LiveRun>,
    half: Mutex<WriterHalf>,
}

#[derive(Debug)]
struct WriterHalf {
    /// `None` once the run is over.
    files: Option<Files>,
    /// Everything that arrived, whether the journal has it or not.
    progress: Progress,
    /// What the journal has.
    written: Progress,
    checkpointer: Checkpointer,
    /// Where marks end next, by stream: just before the first line that starts there or behind.
    next_split: [u64; 2],
    /// The last mark, while it can still grow.
    open: Option<OpenMark>,
    unwritten: VecDeque<Arrival>,
    last_write: UnixMicros,
    holes: [Option<Hole>; 2],
    /// Holes that were closed and not published yet.
    gaps: Vec<GapAt>,
    found: Vec<Checkpoints>,
    /// Whether to keep checkpoints for an index.
    indexed: bool,
}

#[derive(Debug)]
struct Files {
    logs: [AppendFile; 2],
    journal: JournalWriter,
}

#[derive(Clone, Copy, Debug)]
struct OpenMark {
    arrival: Arrival,
    began: UnixMicros,
}

/// A part of a stream that is being lost.
#[derive(Clone, Copy, Debug)]
struct Hole {
    lines: u64,
    bytes: u64,
    /// Whether the last byte lost was not a `\n`: the rest of that line is lost too.
    within_line: bool,
    reason: GapReason,
}

impl Hole {
    fn swallow(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.lines += count_lines(bytes);
        self.bytes += bytes.len() as u64;
        self.within_line = *last != b'\n';
    }
}

impl OwnRun {
    /// Creates a run's folder and gives the run. It appears under its id all at once, with its journal locked.
    pub(crate) fn create(layout: &Layout, spec: RunSpec, number: Option<u64>) -> Result<Self, LogError> {
        layout.create()?;
        let id = spec.id.clone();
        let started = UnixMicros::now();
        let run = JobMetadata::started(spec, started);
        let prepared = layout.prepare_run(&id)?;
        let made = Files::create(&prepared, &run).and_then(|files| {
            let folder = layout.publish_run(&prepared, &id)?;
            Ok((files.moved_to(&folder), folder))
        });
        let (files, folder) = made.inspect_err(|_| prepared.discard())?;
        let progress = Progress::start(started, files.journal.len());
        let half = WriterHalf::new(files, progress, Checkpointer::new(), number.is_some());
        Ok(Self { run: Arc::new(LiveRun::new(folder, number, run, progress, true)), half: Mutex::new(half) })
    }

    /// Takes over a run whose writer is gone, at the place where its journal ends. `journal` is locked.
    pub(crate) fn take_over(
        run: Arc<LiveRun>,
        journal: AppendFile,
        checkpointer: Checkpointer,
    ) -> Result<Self, LogError> {
        let progress = run.state().progress;
        let log = |stream: Stream| AppendFile::open(run.folder.log(stream));
        let logs = [log(Stream::Stdout)?, log(Stream::Stderr)?];
        let files = Files { logs, journal: JournalWriter::resume(journal) };
        let half = WriterHalf::new(files, progress, checkpointer, run.number.is_some());
        Ok(Self { run, half: Mutex::new(half) })
    }

    fn half(&self) -> MutexGuard<'_, WriterHalf> {
        self.half.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends bytes to a stream.
    pub(crate) fn append(&self, stream: Stream, bytes: &[u8]) -> Result<Appended, LogError> {
        let mut half = self.half();
        if half.files.is_none() {
            return Err(finished(&self.run.id));
        }
        let now = UnixMicros::now();
        let result = half.append(stream, bytes, now);
        half.write_marks_if_due(now);
        let rows_wait = self.publish(&mut half);
        result.map(|()| Appended { mark_waits: half.mark_waits(), rows_wait })
    }

    /// Notes bytes that are in the log already but not in the journal: what a dead writer left behind.
    pub(crate) fn adopt_bytes(&self, stream: Stream, bytes: &[u8], time: UnixMicros) {
        let mut half = self.half();
        half.arrived(stream, bytes, time);
        half.write_marks();
        self.publish(&mut half);
    }

    /// Writes marks that wait for more to the journal.
    pub(crate) fn flush(&self) {
        let mut half = self.half();
        half.write_marks();
        self.publish(&mut half);
    }

    /// The same, unless an append is under way.
    pub(crate) fn try_flush(&self) {
        if let Ok(mut half) = self.half.try_lock() {
            half.write_marks();
            self.publish(&mut half);
        }
    }

    /// Ends the run: syncs its logs, writes the journal's end and `metadata.json`, and tells the readers.
    pub(crate) fn finish(&self, end: RunEnd) -> Result<JobMetadata, LogError> {
        let mut half = self.half();
        half.close_holes();
        half.write_marks();
        let Some(mut files) = half.files.take() else { return Err(finished(&self.run.id)) };
        self.publish(&mut half);
        let mut run = self.run.metadata();
        end.apply_to(&mut run);
        if let Ok(Some(existing)) = self.run.folder.read_metadata() {
            for (key, value) in existing.other {
                run.other.entry(key).or_insert(value);
            }
        }
        let written = files.end(&run).and_then(|()| self.run.folder.write_metadata(&run));
        let disk_bytes = disk_bytes(&self.run.folder);
        self.run.change(|state| {
            state.run = run.clone();
            state.disk_bytes = disk_bytes;
            state.waiting.dirty = true;
        });
        written.map(|()| run)
    }

    /// Ends the journal of a run whose end is known already.
    pub(crate) fn end_as(&self, run: &JobMetadata) -> Result<(), LogError> {
        let mut half = self.half();
        half.write_marks();
        match half.files.take() {
            Some(mut files) => files.end(run),
            None => Err(finished(&self.run.id)),
        }
    }

    /// Tells the readers how far the run has come; gives how many rows wait for the index.
    fn publish(&self, half: &mut WriterHalf) -> usize {
        self.run.change(|state| {
            state.visible = half.progress.streams.map(|stream| stream.bytes);
            state.progress = half.progress;
            state.progress.journal = half.written.journal;
            state.tail.clear();
            state.tail.extend(half.unwritten.iter().copied());
            state.tail.extend(half.open.map(|mark| mark.arrival));
            if !half.gaps.is_empty() {
                Arc::make_mut(&mut state.gaps).append(&mut half.gaps);
            }
            for found in half.found.drain(..) {
                state.waiting.push(found);
                state.waiting.dirty = true;
            }
            state.waiting.lines.len() + state.waiting.places.len()
        })
    }
}

/// What an append left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Appended {
    /// Whether a mark waits for more of its stream; a flush writes it.
    pub(crate) mark_waits: bool,
    /// How many rows wait for the index.
    pub(crate) rows_wait: usize,
}

impl WriterHalf {
    fn new(files: Files, progress: Progress, checkpointer: Checkpointer, indexed: bool) -> Self {
        Self {
            files: Some(files),
            progress,
            written: progress,
            next_split: Stream::BOTH.map(|stream| checkpointer.next_offset(stream)),
            checkpointer,
            open: None,
            unwritten: VecDeque::new(),
            last_write: UnixMicros::default(),
            holes: [None; 2],
            gaps: Vec::new(),
            found: Vec::new(),
            indexed,
        }
    }

    fn mark_waits(&self) -> bool {
        self.open.is_some() || !self.unwritten.is_empty()
    }

    fn append(&mut self, stream: Stream, bytes: &[u8], now: UnixMicros) -> Result<(), LogError> {
        if self.holes[stream.index()].is_some() {
            self.append_behind_hole(stream, bytes, now);
            return Ok(());
        }
        let Some(files) = &mut self.files else { return Ok(()) };
        let log = &mut files.logs[stream.index()];
        let before = log.len();
        let Err(error) = log.append(bytes) else {
            log.begin_write_back();
            self.arrived(stream, bytes, now);
            return Ok(());
        };
        // Only whole lines stay: a hole begins and ends where a line does.
        let written = usize::try_from(log.len() - before).unwrap_or(usize::MAX);
        let kept = whole_lines(&bytes[..written]);
        if kept > 0 {
            self.arrived(stream, &bytes[..kept], now);
        }
        let mut hole = Hole {
            lines: 0,
            bytes: self.progress.of(stream).unterminated(),
            within_line: false,
            reason: GapReason::DiskFull,
        };
        hole.swallow(&bytes[kept..]);
        tracing::warn!(%error, %stream, "output can't be kept; the hole is counted until it can");
        self.holes[stream.index()] = Some(hole);
        self.cut_to_line_start(stream);
        Err(error)
    }

    /// Cuts off what stands behind the last whole line that was kept.
    fn cut_to_line_start(&mut self, stream: Stream) -> bool {
        let line_start = self.progress.of(stream).line_start;
        let Some(files) = &mut self.files else { return false };
        let log = &mut files.logs[stream.index()];
        log.len() == line_start || log.cut(line_start).is_ok()
    }

    /// Tries to go on behind a hole, from the first line that begins in `bytes` on.
    fn append_behind_hole(&mut self, stream: Stream, bytes: &[u8], now: UnixMicros) {
        let Some(mut hole) = self.holes[stream.index()] else { return };
        let line_start = match memchr(b'\n', bytes) {
            _ if !hole.within_line => 0,
            Some(end) => end + 1,
            None => bytes.len(),
        };
        let (lost, rest) = bytes.split_at(line_start);
        hole.swallow(lost);
        let kept = !rest.is_empty()
            && self.cut_to_line_start(stream)
            && self.files.as_mut().is_some_and(|files| files.logs[stream.index()].append(rest).is_ok());
        if kept {
            self.holes[stream.index()] = None;
            self.lost(stream, hole, now);
            self.arrived(stream, rest, now);
        } else {
            hole.swallow(rest);
            self.holes[stream.index()] = Some(hole);
            self.cut_to_line_start(stream);
        }
    }

    /// Ends the holes that are open at the end of the run.
    fn close_holes(&mut self) {
        for stream in Stream::BOTH {
            if let Some(hole) = self.holes[stream.index()].take() {
                self.lost(stream, hole, UnixMicros::now());
            }
        }
    }

    /// Counts what a hole swallowed.
    fn lost(&mut self, stream: Stream, hole: Hole, now: UnixMicros) {
        self.seal_open_mark();
        let lines = hole.lines + u64::from(hole.within_line);
        let at = self.progress.of(stream);
        let gap = Gap { stream, after: LineNumber(at.lines), lines, bytes: hole.bytes, reason: hole.reason };
        self.gaps.push(GapAt { gap, offset: at.line_start });
        let time = self.next_time(now);
        let after_micros = time.0 - self.progress.time.0;
        let what = What::Gap(hole.reason);
        self.take_in(Arrival { after_micros, stream, lines, bytes: hole.bytes, what });
    }

    /// Counts bytes that are in the log.
    fn arrived(&mut self, stream: Stream, mut bytes: &[u8], now: UnixMicros) {
        while !bytes.is_empty() {
            let at = *self.progress.of(stream);
            let split = self.next_split[stream.index()];
            // A line that starts at `split` has its `\n` before it one byte earlier.
            let to_split = usize::try_from(split - 1 - at.bytes.min(split - 1)).unwrap_or(usize::MAX);
            let (piece, is_split) = match bytes.get(to_split..).and_then(|rest| memchr(b'\n', rest)) {
                Some(end) => (to_split + end + 1, true),
                None => (bytes.len(), false),
            };
            let (piece, rest) = bytes.split_at(piece);
            let lines = count_lines(piece);
            let unterminated = match lines {
                0 => at.unterminated() + piece.len() as u64,
                _ => (piece.len() - whole_lines(piece)) as u64,
            };
            self.mark(stream, lines, piece.len() as u64, unterminated, now);
            if is_split {
                self.seal_open_mark();
                self.next_split[stream.index()] =
                    self.progress.of(stream).line_start + Checkpointer::EVERY_BYTES;
            }
            bytes = rest;
        }
    }

    /// Adds to the open mark, or opens another.
    fn mark(&mut self, stream: Stream, lines: u64, bytes: u64, unterminated: u64, now: UnixMicros) {
        let what = What::Mark { unterminated };
        if let Some(open) = &mut self.open
            && open.arrival.stream == stream
            && now.0.saturating_sub(open.began.0) < MERGE_MICROS
        {
            open.arrival.lines += lines;
            open.arrival.bytes += bytes;
            open.arrival.what = what;
            self.progress.advance(&Arrival { after_micros: 0, stream, lines, bytes, what });
            return;
        }
        self.seal_open_mark();
        let began = self.next_time(now);
        let after_micros = began.0 - self.progress.time.0;
        let arrival = Arrival { after_micros, stream, lines, bytes, what };
        self.progress.advance(&arrival);
        self.open = Some(OpenMark { arrival, began });
    }

    /// The time of the next record: by the clock, but strictly later than the last.
    fn next_time(&self, now: UnixMicros) -> UnixMicros {
        now.max(UnixMicros(self.progress.time.0 + 1))
    }

    fn take_in(&mut self, arrival: Arrival) {
        self.progress.advance(&arrival);
        self.unwritten.push_back(arrival);
    }

    /// Ends the open mark.
    fn seal_open_mark(&mut self) {
        let Some(OpenMark { arrival, .. }) = self.open.take() else { return };
        if self.unwritten.len() >= MAX_UNWRITTEN
            && let Some(last) = self.unwritten.back_mut()
            && last.stream == arrival.stream
            && matches!((last.what, arrival.what), (What::Mark { .. }, What::Mark { .. }))
        {
            last.after_micros += arrival.after_micros;
            last.lines += arrival.lines;
            last.bytes += arrival.bytes;
            last.what = arrival.what;
            return;
        }
        self.unwritten.push_back(arrival);
    }

    /// Writes marks to the journal, unless that was done a moment ago: the first line after a silence never
    /// waits, and a flood of lines costs a record a millisecond.
    fn write_marks_if_due(&mut self, now: UnixMicros) {
        let since = now.0.saturating_sub(self.last_write.0);
        if since >= MERGE_MICROS || now < self.last_write || self.unwritten.len() >= 64 {
            self.last_write = now;
            self.write_marks();
        }
    }

    fn write_marks(&mut self) {
        self.seal_open_mark();
        if self.unwritten.is_empty() {
            return;
        }
        let Some(files) = &mut self.files else { return };
        let (written, checkpointer) = (&mut self.written, &mut self.checkpointer);
        let (found, indexed) = (&mut self.found, self.indexed);
        let note = |arrival: &Arrival, end: u64| {
            written.advance(arrival);
            written.journal = end;
            let checkpoints = checkpointer.after(arrival.stream, written);
            if indexed && checkpoints.is_some() {
                found.push(checkpoints);
            }
        };
        match files.journal.append_arrivals(self.unwritten.make_contiguous(), note) {
            Ok(()) => self.unwritten.clear(),
            Err(error) => tracing::warn!(%error, "arrivals wait for the journal"),
        }
    }
}

impl Files {
    fn create(folder: &RunFolder, run: &JobMetadata) -> Result<Self, LogError> {
        let journal = AppendFile::create(folder.journal())?;
        if !journal.try_lock()? {
            return Err(LogError::InUse { path: folder.journal() });
        }
        let log = |stream: Stream| AppendFile::create(folder.log(stream));
        Ok(Self {
            logs: [log(Stream::Stdout)?, log(Stream::Stderr)?],
            journal: JournalWriter::begin(journal, run)?,
        })
    }

    fn moved_to(mut self, folder: &RunFolder) -> Self {
        for stream in Stream::BOTH {
            self.logs[stream.index()].moved_to(folder.log(stream));
        }
        self.journal.moved_to(folder.journal());
        self
    }

    /// Makes the logs durable, then says in the journal that the run is over, then makes that durable.
    fn end(&mut self, run: &JobMetadata) -> Result<(), LogError> {
        for log in self.logs.iter().filter(|log| log.len() > 0) {
            log.sync()?;
        }
        self.journal.append(&Record::End(Box::new(run.clone())))?;
        self.journal.sync()
    }
}

/// Bytes that a run's folder takes up on disk, as its blocks say.
pub(crate) fn disk_bytes(folder: &RunFolder) -> u64 {
    let blocks = |path| fs::symlink_metadata(path).map_or(0, |file: fs::Metadata| file.blocks() * 512);
    let entries = fs::read_dir(folder.path()).into_iter().flatten().flatten();
    entries.map(|entry| blocks(entry.path())).sum::<u64>() + blocks(folder.path().to_owned())
}
