//! Writing a run: bytes to its log, then what arrived to its journal, then the news to its readers.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memchr::memchr;

use crate::error::LogError;
use crate::index::progress::{Checkpointer, Checkpoints, GapAt, Progress, before_line_at};
use crate::journal::{Arrival, JournalWriter, What};
use crate::layout::{Layout, RunFolder};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::logfile::{AppendFile, count_lines, whole_lines};
use crate::meter::Appends;
use crate::run::{Gap, GapReason, JobMetadata, RunSpec};
use crate::store::RunEnd;
use crate::store::file::FileStoreOptions;
use crate::store::file::live::{LiveRun, finished};
use crate::store::file::shared::Shared;
use crate::store::file::space::Floor;

/// Batches of a stream that arrive within this many microseconds share a mark.
const MERGE_MICROS: u64 = 1_000;
/// The most records that wait for a journal which can't be written; beyond that, output is lost as on a full disk. So
/// many find room behind the journal when the run ends.
const MAX_UNWRITTEN: usize = 256;
/// The longest time between two tries to go on behind a hole, in microseconds.
const MAX_RETRY_MICROS: u64 = 100_000;

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
    appends: Appends,
    /// Who can make room on a full disk.
    rescue: Weak<Shared>,
}

#[derive(Debug)]
struct Files {
    logs: [AppendFile; 2],
    journal: JournalWriter,
    floor: Floor,
    /// Whether the end of the run waits for the disk.
    syncs: bool,
    /// How far the logs and the journal were when they were last synced while the run went on.
    synced: [u64; 3],
}

#[derive(Clone, Copy, Debug)]
struct OpenMark {
    arrival: Arrival,
    /// When it was opened, by the clock.
    opened: UnixMicros,
}

/// A part of a stream that is being lost.
#[derive(Clone, Copy, Debug)]
struct Hole {
    lines: u64,
    bytes: u64,
    /// Whether the last byte lost was not a `\n`: the rest of that line is lost too.
    within_line: bool,
    reason: GapReason,
    /// When going on was last tried, and how long to wait before the next time, in microseconds: a disk that
    /// refuses everything is not asked at every line.
    tried: UnixMicros,
    wait: u64,
}

impl Hole {
    /// A hole that begins at this moment and swallows this unterminated part of a line.
    const fn new(unterminated: u64, now: UnixMicros) -> Self {
        Self {
            lines: 0,
            bytes: unterminated,
            within_line: unterminated > 0,
            reason: GapReason::DiskFull,
            tried: now,
            wait: 0,
        }
    }

    /// Whether it is time to try to go on. A clock that went back does not make it wait longer.
    const fn may_end(&self, now: UnixMicros) -> bool {
        now.0 < self.tried.0 || now.0 - self.tried.0 >= self.wait
    }

    fn failed_to_end(&mut self, now: UnixMicros) {
        self.tried = now;
        self.wait = (self.wait * 2).clamp(1_000, MAX_RETRY_MICROS);
    }

    fn swallow(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.lines += count_lines(bytes);
        self.bytes += bytes.len() as u64;
        self.within_line = *last != b'\n';
    }
}

impl OwnRun {
    /// Creates a run's folder and gives the run. It appears under its id all at once, with its journal locked.
    pub(crate) fn create(
        layout: &Layout,
        spec: RunSpec,
        number: Option<u64>,
        options: &FileStoreOptions,
    ) -> Result<Self, LogError> {
        layout.create()?;
        let id = spec.id.clone();
        let started = UnixMicros::now();
        let run = JobMetadata::started(spec, started);
        let prepared = layout.prepare_run(&id)?;
        let made = Files::create(&prepared, &run, options).and_then(|files| {
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
        options: &FileStoreOptions,
    ) -> Result<Self, LogError> {
        let progress = run.state().progress;
        let log = |stream: Stream| AppendFile::open(run.folder.log(stream));
        let logs = [log(Stream::Stdout)?, log(Stream::Stderr)?];
        let files = Files::new(logs, JournalWriter::resume(journal), options);
        let half = WriterHalf::new(files, progress, checkpointer, run.number.is_some());
        Ok(Self { run, half: Mutex::new(half) })
    }

    /// The same run, for which this store makes room when the disk is full.
    pub(crate) fn rescued_by(mut self, shared: Weak<Shared>) -> Self {
        self.half.get_mut().unwrap_or_else(PoisonError::into_inner).rescue = shared;
        self
    }

    fn half(&self) -> MutexGuard<'_, WriterHalf> {
        self.half.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends bytes to a stream.
    pub(crate) fn append(&self, stream: Stream, bytes: &[u8]) -> Result<Appended, LogError> {
        self.append_at(stream, bytes, UnixMicros::now())
    }

    /// The same at a given time.
    fn append_at(&self, stream: Stream, bytes: &[u8], now: UnixMicros) -> Result<Appended, LogError> {
        let mut half = self.half();
        if half.files.is_none() {
            return Err(finished(&self.run.id));
        }
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

    /// Notes what a power cut took of a stream.
    pub(crate) fn note_loss(&self, stream: Stream, loss: Option<Loss>) {
        let Some(loss) = loss else { return };
        let mut half = self.half();
        if loss.marked > 0 {
            // The marks stay what they are; readers see that the log is shorter.
            let totals = &mut half.progress.streams[stream.index()];
            totals.dropped_bytes += loss.marked + loss.unmarked;
            totals.dropped_lines += loss.lines;
        } else {
            let now = UnixMicros::now();
            let reason = GapReason::Corrupt;
            let hole = Hole { bytes: loss.unmarked, within_line: true, reason, ..Hole::new(0, now) };
            half.holes[stream.index()] = Some(hole);
        }
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
        half.write_last_marks();
        let Some(mut files) = half.files.take() else { return Err(finished(&self.run.id)) };
        self.publish(&mut half);
        let mut run = self.run.metadata();
        end.apply_to(&mut run);
        if let Ok(Some(existing)) = self.run.folder.read_metadata() {
            for (key, value) in existing.other {
                run.other.entry(key).or_insert(value);
            }
        }
        let written = files.end(&mut run, &self.run.folder);
        let disk_bytes = self.run.folder.disk_bytes();
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
            Some(mut files) => files.end(&mut run.clone(), &self.run.folder),
            None => Err(finished(&self.run.id)),
        }
    }

    /// Makes what was appended since the last time survive a power cut.
    pub(crate) fn sync(&self) -> Result<(), LogError> {
        let (files, lengths) = {
            let mut half = self.half();
            half.write_marks();
            self.publish(&mut half);
            let Some(files) = &half.files else { return Ok(()) };
            let lengths = files.lengths();
            if lengths == files.synced {
                return Ok(());
            }
            (files.handles(), lengths)
        };
        // Appends go on meanwhile. The journal comes last: what it tells of is there.
        for (file, path) in files {
            file.sync_data().map_err(LogError::io("syncing", path))?;
        }
        if let Some(files) = &mut self.half().files {
            files.synced = lengths;
        }
        Ok(())
    }

    /// Tells the readers how far the run has come; gives how many rows wait for the index.
    fn publish(&self, half: &mut WriterHalf) -> usize {
        self.run.change(|state| {
            state.visible = half.visible();
            half.progress.count_since(&state.progress, &half.appends);
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

/// What a power cut took of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// Lines that marks tell of.
    pub(crate) lines: u64,
    /// Bytes that marks tell of.
    pub(crate) marked: u64,
    /// Bytes that no mark tells of; nobody knows how many lines they were, but there was one at least.
    pub(crate) unmarked: u64,
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
            appends: Appends::new(),
            rescue: Weak::new(),
        }
    }

    /// Bytes of each log that may be read: while a hole is open, what stands behind the last whole line is lost.
    fn visible(&self) -> [u64; 2] {
        Stream::BOTH.map(|stream| {
            let at = self.progress.of(stream);
            if self.holes[stream.index()].is_some() { at.line_start } else { at.bytes }
        })
    }

    fn mark_waits(&self) -> bool {
        self.open.is_some() || !self.unwritten.is_empty()
    }

    fn append(&mut self, stream: Stream, bytes: &[u8], now: UnixMicros) -> Result<(), LogError> {
        if self.holes[stream.index()].is_some() {
            self.append_behind_hole(stream, bytes, now);
            return Ok(());
        }
        let Some(before) = self.files.as_ref().map(|files| files.logs[stream.index()].len()) else {
            return Ok(());
        };
        let mut appended = self.try_append(stream, bytes, now);
        if let Err(error) = &appended
            && error.is_disk_full()
            && self.is_rescued(bytes.len())
            && self.cut_back(stream, before)
        {
            appended = self.try_append(stream, bytes, now);
        }
        let Some(files) = &mut self.files else { return Ok(()) };
        let log = &mut files.logs[stream.index()];
        let Err(error) = appended else {
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
        let mut hole = Hole::new(self.progress.of(stream).unterminated(), now);
        hole.swallow(&bytes[kept..]);
        tracing::warn!(%error, %stream, "output can't be kept; the hole is counted until it can");
        self.holes[stream.index()] = Some(hole);
        self.cut_to_line_start(stream);
        Err(error)
    }

    fn try_append(&mut self, stream: Stream, bytes: &[u8], now: UnixMicros) -> Result<(), LogError> {
        let has_room = self.has_room(stream, bytes.len(), now);
        let Some(files) = &mut self.files else { return Ok(()) };
        let log = &mut files.logs[stream.index()];
        match has_room {
            true => log.append(bytes),
            false => Err(LogError::io("appending to", log.path())(io::ErrorKind::StorageFull.into())),
        }
    }

    /// Whether runs that are over made room for so many bytes.
    fn is_rescued(&mut self, bytes: usize) -> bool {
        let rescued = self.rescue.upgrade().is_some_and(|shared| shared.make_room(bytes as u64));
        if rescued && let Some(files) = &mut self.files {
            files.floor.look_again();
        }
        rescued
    }

    /// Cuts off what a failed append left behind this length.
    fn cut_back(&mut self, stream: Stream, length: u64) -> bool {
        let Some(files) = &mut self.files else { return false };
        let log = &mut files.logs[stream.index()];
        log.len() == length || log.cut(length).is_ok()
    }

    /// Whether so many bytes may be tried at all: the disk has more than it is to keep free, and the journal can
    /// take what is told to it.
    fn has_room(&mut self, stream: Stream, bytes: usize, now: UnixMicros) -> bool {
        let Some(files) = &mut self.files else { return false };
        self.unwritten.len() < MAX_UNWRITTEN
            && !files.floor.is_reached(&files.logs[stream.index()], bytes, now)
    }

    /// Cuts off what stands behind the last whole line that was kept.
    fn cut_to_line_start(&mut self, stream: Stream) -> bool {
        self.cut_back(stream, self.progress.of(stream).line_start)
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
        let may_end = !rest.is_empty() && hole.may_end(now);
        // The journal tells of the hole before the log has what lies behind it: a reader that sees those lines
        // numbers them by what it knows.
        if !(may_end
            && self.has_room(stream, rest.len(), now)
            && self.cut_to_line_start(stream)
            && self.make_room(stream, rest.len())
            && self.tell_of_hole(stream, hole, now))
        {
            if may_end {
                hole.failed_to_end(now);
            }
            hole.swallow(rest);
            self.holes[stream.index()] = Some(hole);
            return;
        }
        self.holes[stream.index()] = None;
        // What fails now is the beginning of another hole, which is told of as this one is.
        if self.append(stream, rest, now).is_err()
            && let Some(next) = &mut self.holes[stream.index()]
        {
            next.wait = hole.wait;
            next.failed_to_end(now);
        }
    }

    /// Asks for room for so many bytes. A hole is told of when it ends, and it should end only once.
    fn make_room(&self, stream: Stream, bytes: usize) -> bool {
        let Some(files) = &self.files else { return false };
        let log = &files.logs[stream.index()];
        // Where it can't be asked for, the write itself will tell.
        log.allocate(log.len() + bytes as u64).is_ok()
    }

    /// Writes a hole to the journal at once, and counts it if that works.
    fn tell_of_hole(&mut self, stream: Stream, hole: Hole, now: UnixMicros) -> bool {
        self.write_marks();
        if !self.unwritten.is_empty() {
            return false;
        }
        let (arrival, gap) = self.gap(stream, hole, now);
        self.unwritten.push_back(arrival);
        self.write_marks();
        if self.unwritten.pop_back().is_some() {
            return false;
        }
        self.progress.advance(&arrival);
        self.gaps.push(gap);
        true
    }

    /// Ends the holes that are open at the end of the run.
    fn close_holes(&mut self) {
        let now = UnixMicros::now();
        for stream in Stream::BOTH {
            if let Some(hole) = self.holes[stream.index()].take() {
                self.cut_to_line_start(stream);
                self.seal_open_mark();
                let (arrival, gap) = self.gap(stream, hole, now);
                self.progress.advance(&arrival);
                self.unwritten.push_back(arrival);
                self.gaps.push(gap);
            }
        }
    }

    /// What a hole swallowed, as the journal and the readers are told.
    fn gap(&self, stream: Stream, hole: Hole, now: UnixMicros) -> (Arrival, GapAt) {
        let lines = hole.lines + u64::from(hole.within_line);
        let at = self.progress.of(stream);
        let gap = Gap { stream, after: LineNumber(at.lines), lines, bytes: hole.bytes, reason: hole.reason };
        let after_micros = self.next_time(now).0 - self.progress.time.0;
        let what = What::Gap(hole.reason);
        let arrival = Arrival { after_micros, stream, lines, bytes: hole.bytes, what };
        (arrival, GapAt { gap, offset: at.line_start })
    }

    /// Counts bytes that are in the log.
    fn arrived(&mut self, stream: Stream, mut bytes: &[u8], now: UnixMicros) {
        while !bytes.is_empty() {
            let at = *self.progress.of(stream);
            let split = before_line_at(self.next_split[stream.index()], at.bytes, bytes);
            let (piece, rest) = bytes.split_at(split.unwrap_or(bytes.len()));
            let lines = count_lines(piece);
            let unterminated = match lines {
                0 => at.unterminated() + piece.len() as u64,
                _ => (piece.len() - whole_lines(piece)) as u64,
            };
            self.mark(stream, lines, piece.len() as u64, unterminated, now);
            if split.is_some() {
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
            && now.0.checked_sub(open.opened.0).is_some_and(|age| age < MERGE_MICROS)
        {
            open.arrival.lines += lines;
            open.arrival.bytes += bytes;
            open.arrival.what = what;
            self.progress.advance(&Arrival { after_micros: 0, stream, lines, bytes, what });
            return;
        }
        self.seal_open_mark();
        let after_micros = self.next_time(now).0 - self.progress.time.0;
        let arrival = Arrival { after_micros, stream, lines, bytes, what };
        self.progress.advance(&arrival);
        self.open = Some(OpenMark { arrival, opened: now });
    }

    /// The time of the next record: by the clock, but strictly later than the last.
    fn next_time(&self, now: UnixMicros) -> UnixMicros {
        now.max(UnixMicros(self.progress.time.0 + 1))
    }

    /// Ends the open mark.
    fn seal_open_mark(&mut self) {
        let Some(OpenMark { arrival, .. }) = self.open.take() else { return };
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
        self.write_marks_of(false);
    }

    /// The last marks of a run may use the room that is kept for its end.
    fn write_last_marks(&mut self) {
        self.write_marks_of(true);
    }

    fn write_marks_of(&mut self, last: bool) {
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
        match files.journal.append_arrivals(self.unwritten.make_contiguous(), last, note) {
            Ok(()) => self.unwritten.clear(),
            Err(error) => tracing::debug!(%error, "arrivals wait for the journal"),
        }
    }
}

impl Files {
    const fn new(logs: [AppendFile; 2], journal: JournalWriter, options: &FileStoreOptions) -> Self {
        let floor = Floor::new(options.min_free_bytes);
        Self { logs, journal, floor, syncs: options.durability.syncs_ends(), synced: [0; 3] }
    }

    fn create(folder: &RunFolder, run: &JobMetadata, options: &FileStoreOptions) -> Result<Self, LogError> {
        let journal = AppendFile::create(folder.journal())?;
        if !journal.try_lock()? {
            return Err(LogError::InUse { path: folder.journal() });
        }
        let log = |stream: Stream| AppendFile::create(folder.log(stream));
        let logs = [log(Stream::Stdout)?, log(Stream::Stderr)?];
        let journal = JournalWriter::begin(journal, run)?;
        if journal.reserve() > 0
            && let Err(error) = folder.reserve_metadata(journal.reserve())
        {
            tracing::warn!(%error, "a run begins without room for its end");
        }
        Ok(Self::new(logs, journal, options))
    }

    fn moved_to(mut self, folder: &RunFolder) -> Self {
        for stream in Stream::BOTH {
            self.logs[stream.index()].moved_to(folder.log(stream));
        }
        self.journal.moved_to(folder.journal());
        self
    }

    fn lengths(&self) -> [u64; 3] {
        [self.logs[0].len(), self.logs[1].len(), self.journal.len()]
    }

    /// The logs, then the journal.
    fn handles(&self) -> [(Arc<File>, PathBuf); 3] {
        let [out, err] = &self.logs;
        let of_log = |log: &AppendFile| (log.handle(), log.path().to_owned());
        [of_log(out), of_log(err), (self.journal.handle(), self.journal.path().to_owned())]
    }

    /// Makes the logs durable, then says in the journal that the run is over, makes that durable, and writes
    /// `metadata.json`. Each is done even when one before it failed: the more is there of a run's end, the better.
    fn end(&mut self, run: &mut JobMetadata, folder: &RunFolder) -> Result<(), LogError> {
        let mut failed = None;
        let mut note = |result: Result<(), LogError>| {
            let error = result.err();
            failed = LogError::both(failed.take(), error);
        };
        if self.syncs {
            self.logs.iter().filter(|log| log.len() > 0).for_each(|log| note(log.sync()));
        }
        let mut ended = self.journal.append_end(run);
        if ended.is_err() && !run.missing_deps.is_empty() {
            // It is the only part that can be larger than the room that is kept.
            run.missing_deps.clear();
            let shorter = "what the job said it lacks is only in its log: the disk was full";
            run.note = Some(run.note.take().map_or(shorter.to_owned(), |note| format!("{note}; {shorter}")));
            ended = self.journal.append_end(run);
        }
        note(ended);
        if self.syncs {
            note(self.journal.sync());
        }
        note(folder.write_metadata(run, self.syncs));
        failed.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::journal::{Parsed, Record, parse};
    use crate::run::{Exit, RunState};
    use crate::store::Outcome;
    use proptest::prelude::*;

    fn own_run() -> (tempfile::TempDir, OwnRun) {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path());
        let run = OwnRun::create(
            &layout,
            RunSpec::new("x".parse().unwrap()),
            Some(1),
            &FileStoreOptions::default(),
        )
        .unwrap();
        (folder, run)
    }

    fn end() -> RunEnd {
        RunEnd::now(Outcome::Exited(Exit::Code(0)))
    }

    /// The arrivals in a run's journal.
    fn journal(run: &OwnRun) -> Vec<Arrival> {
        let bytes = fs::read(run.run.folder.journal()).unwrap();
        let mut offset = 0;
        let mut arrivals = Vec::new();
        while let Parsed::Record(record, length) = parse(&bytes[offset..], offset as u64) {
            offset += length;
            arrivals.extend(if let Record::Arrival(arrival) = record { Some(arrival) } else { None });
        }
        assert_eq!(offset, bytes.len(), "all of the journal is sound");
        arrivals
    }

    /// Puts another file in the place of a log for as long as `action` takes.
    fn with_log(run: &OwnRun, stream: Stream, path: &str, action: impl FnOnce()) {
        let swap = |other: &mut AppendFile| {
            let mut half = run.half();
            std::mem::swap(&mut half.files.as_mut().unwrap().logs[stream.index()], other);
        };
        let mut other = AppendFile::open(path.into()).unwrap();
        swap(&mut other);
        action();
        swap(&mut other);
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_make_one_mark_of_all_that_follows() {
        let (_folder, run) = own_run();
        {
            let mut half = run.half();
            let first = UnixMicros(half.progress.time.0 + 10_000_000);
            half.append(Stream::Stdout, b"one\n", first).unwrap();
            for n in 0..3 {
                let later = UnixMicros(first.0 - 5_000_000 + n * 2 * MERGE_MICROS);
                half.append(Stream::Stdout, b"later\n", later).unwrap();
            }
            half.write_marks();
        }
        let lines: Vec<u64> = journal(&run).iter().map(|mark| mark.lines).collect();
        assert_eq!(lines, [1, 1, 1, 1]);
    }

    #[test]
    fn readers_see_nothing_of_a_line_whose_beginning_a_hole_takes_away() {
        let (_folder, run) = own_run();
        run.append(Stream::Stdout, b"a\nbeg").unwrap();
        assert_eq!(run.run.state().visible, [5, 0]);
        with_log(&run, Stream::Stdout, "/dev/full", || {
            run.append(Stream::Stdout, b"in\nlost\nalso").unwrap_err();
            assert_eq!(run.run.state().visible, [2, 0]);
            run.append(Stream::Stderr, b"goes on\n").unwrap();
        });
        run.append(Stream::Stdout, b" lost\nkept\n").unwrap();
        assert_eq!(fs::read(run.run.folder.log(Stream::Stdout)).unwrap(), b"a\nkept\n");
        assert_eq!(run.run.state().visible, [7, 8]);
        let gaps = Arc::clone(&run.run.state().gaps);
        let gap = Gap {
            stream: Stream::Stdout,
            after: LineNumber(1),
            lines: 3,
            bytes: 21,
            reason: GapReason::DiskFull,
        };
        assert_eq!(*gaps, [GapAt { gap, offset: 2 }]);
        let metadata = run.finish(end()).unwrap();
        assert_eq!((metadata.stdout.lines, metadata.stdout.dropped_lines), (5, 3));
    }

    fn begin(folder: &tempfile::TempDir) -> OwnRun {
        let spec = RunSpec::new("r".parse().unwrap());
        let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
        OwnRun::create(&Layout::new(folder.path()), spec, None, &options).unwrap()
    }

    /// Lets the disk refuse a stream from now on, or no more.
    fn refuse(own: &OwnRun, stream: Stream, refused: bool) {
        let mut half = own.half();
        let files = half.files.as_mut().unwrap();
        let path = own.run.folder.log(stream);
        // A device that is always full takes the place of the log.
        let log = if refused { "/dev/full".into() } else { path };
        files.logs[stream.index()] = AppendFile::open(log).unwrap();
    }

    #[test]
    fn a_clock_that_goes_back_neither_stops_the_marks_nor_turns_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let own = begin(&folder);
        let start = own.run.metadata().started_at.0;
        let clock = [5_000, 9_000, 2_000, 2_500, 3_600, 0, 10_000].map(|after| UnixMicros(start + after));
        for now in clock {
            own.append_at(Stream::Stdout, b"x\n", now).unwrap();
        }
        let back_to_1970 = UnixMicros(7);
        own.append_at(Stream::Stdout, b"x\n", back_to_1970).unwrap();
        own.flush();
        let found = journal(&own);
        assert_eq!(found.iter().map(|arrival| arrival.lines).sum::<u64>(), 8);
        assert!(found.len() >= 5, "marks go on: {found:?}");
        assert!(found.iter().all(|arrival| arrival.after_micros >= 1), "{found:?}");
        let end = RunEnd { ended_at: back_to_1970, ..RunEnd::now(Outcome::Lost) };
        let run = own.finish(end).unwrap();
        assert_eq!((run.duration_ms(), run.stdout.lines), (Some(0), 8));
        assert_eq!(run.state, RunState::Lost { ended: back_to_1970 });
    }

    #[test]
    fn a_clock_that_goes_back_does_not_keep_a_hole_open() {
        let folder = tempfile::tempdir().unwrap();
        let own = begin(&folder);
        let now = own.run.metadata().started_at.0 + 10_000_000;
        refuse(&own, Stream::Stdout, true);
        for step in 0..10 {
            drop(own.append_at(Stream::Stdout, b"lost\n", UnixMicros(now + step * 200_000)));
        }
        refuse(&own, Stream::Stdout, false);
        own.append_at(Stream::Stdout, b"kept\n", UnixMicros(now - 5_000_000)).unwrap();
        assert_eq!(fs::read(own.run.folder.log(Stream::Stdout)).unwrap(), b"kept\n");
        assert_eq!(own.finish(RunEnd::now(Outcome::Lost)).unwrap().stdout.dropped_lines, 10);
    }

    #[test]
    fn a_hole_begins_and_ends_where_lines_do() {
        let folder = tempfile::tempdir().unwrap();
        let own = begin(&folder);
        let now = own.run.metadata().started_at.0;
        let append =
            |bytes: &[u8], after: u64| own.append_at(Stream::Stdout, bytes, UnixMicros(now + after)).is_ok();
        assert!(append(b"one\ntw", 1_000));
        refuse(&own, Stream::Stdout, true);
        assert!(!append(b"o\nthree\nfo", 2_000), "the first loss is an error");
        assert!(append(b"ur\nfive", 3_000), "those after it are only counted");
        refuse(&own, Stream::Stdout, false);
        // The rest of a line that began in the hole is lost with it.
        assert!(append(b"!\nsix\n", 2_000_000));
        let gap = *journal(&own).iter().find(|arrival| matches!(arrival.what, What::Gap(_))).unwrap();
        assert_eq!((gap.lines, gap.bytes), (4, 21), "two to five");
        assert_eq!(fs::read(own.run.folder.log(Stream::Stdout)).unwrap(), b"one\nsix\n");
        let run = own.finish(RunEnd::now(Outcome::Lost)).unwrap();
        assert_eq!((run.stdout.lines, run.stdout.bytes, run.stdout.dropped_bytes), (6, 8, 21));
    }

    #[test]
    fn a_disk_that_refuses_everything_is_asked_now_and_then_and_the_journal_hears_of_each_hole_first() {
        let folder = tempfile::tempdir().unwrap();
        let own = begin(&folder);
        let now = own.run.metadata().started_at.0;
        refuse(&own, Stream::Stderr, true);
        for after in 0..1_000 {
            drop(own.append_at(Stream::Stderr, b"lost\n", UnixMicros(now + after * 1_000)));
        }
        // The log has nothing of what was tried, and the journal tells of every hole that ended in a try.
        let tries = journal(&own).len();
        assert!((5..=25).contains(&tries), "{tries} tries in a second");
        let run = own.finish(RunEnd::now(Outcome::Lost)).unwrap();
        assert_eq!(
            (run.stderr.lines, run.stderr.dropped_lines, run.stderr.dropped_bytes),
            (1_000, 1_000, 5_000)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// What the writer keeps is what its journal bears out: the first line behind every 64 KiB, by the bytes alone.
        #[test]
        fn checkpoints_are_those_of_the_journal_and_of_the_bytes(
            appends in proptest::collection::vec((any::<bool>(), 1..60_000usize, 1..90_000usize), 1..24),
            flush in any::<bool>(),
        ) {
            let (_folder, run) = own_run();
            let mut logs = [Vec::new(), Vec::new()];
            for (stderr, size, line) in appends {
                let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
                let log: &mut Vec<u8> = &mut logs[stream.index()];
                let text: Vec<u8> =
                    (0..size).map(|i| if (log.len() + i).is_multiple_of(line) { b'\n' } else { b'x' }).collect();
                run.append(stream, &text).unwrap();
                log.extend_from_slice(&text);
                if flush {
                    run.flush();
                }
            }
            run.flush();
            let mut expected = Vec::new();
            for stream in Stream::BOTH {
                let log = &logs[stream.index()];
                let (mut next, mut line) = (Checkpointer::EVERY_BYTES, 0);
                for (at, _) in log.iter().enumerate().filter(|&(_, &byte)| byte == b'\n') {
                    line += 1;
                    let offset = at as u64 + 1;
                    if offset >= next {
                        next = offset + Checkpointer::EVERY_BYTES;
                        expected.push((stream, line, offset));
                    }
                }
            }
            let mut progress = Progress::start(run.run.metadata().started_at, 0);
            let mut checkpointer = Checkpointer::new();
            let mut replayed = Vec::new();
            for arrival in journal(&run) {
                prop_assert!(progress.advance(&arrival));
                replayed.extend(checkpointer.after(arrival.stream, &progress).line);
            }
            let kept = run.run.state().waiting.lines.clone();
            prop_assert_eq!(&kept, &replayed);
            let mut found: Vec<_> = kept.iter().map(|at| (at.stream, at.line, at.offset)).collect();
            found.sort_by_key(|&(stream, line, _)| (stream, line));
            prop_assert_eq!(found, expected);
        }
    }
}
