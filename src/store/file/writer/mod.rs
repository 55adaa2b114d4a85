//! Writing a run: bytes to its log, then what arrived to its journal, then the news to its readers.

#[cfg(test)]
mod bounds;
mod cap;
mod changed;
mod files;
mod half;
mod hole;
#[cfg(test)]
mod tests;

use std::slice::Chunks;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cap::{GivenUp, RunCap};
use files::Files;
use half::WriterHalf;
use hole::Hole;

use crate::error::LogError;
use crate::index::progress::{Checkpointer, Progress};
use crate::journal::JournalWriter;
use crate::layout::Layout;
use crate::line::{Stream, UnixMicros};
use crate::logfile::AppendFile;
use crate::run::{GapReason, JobMetadata, RunSpec};
use crate::store::RunEnd;
use crate::store::file::FileStoreOptions;
use crate::store::file::live::{LiveRun, finished};
use crate::store::file::shared::Shared;

/// A run that this process writes.
#[derive(Debug)]
pub(crate) struct OwnRun {
    pub(crate) run: Arc<LiveRun>,
    half: Mutex<WriterHalf>,
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
        let mut half = WriterHalf::new(files, progress, Checkpointer::new(), number.is_some());
        half.cap = RunCap::new(options.max_run_bytes);
        Ok(Self { run: Arc::new(LiveRun::new(folder, number, run, progress, true)), half: Mutex::new(half) })
    }

    /// Takes over a run whose writer is gone, at the place where its journal ends. `journal` is locked.
    pub(crate) fn take_over(
        run: Arc<LiveRun>,
        journal: AppendFile,
        checkpointer: Checkpointer,
        options: &FileStoreOptions,
    ) -> Result<Self, LogError> {
        let (progress, cuts) = {
            let state = run.state();
            (state.progress, state.cuts)
        };
        let log = |stream: Stream| AppendFile::open(run.folder.log(stream));
        let logs = [log(Stream::Stdout)?, log(Stream::Stderr)?];
        let files = Files::new(logs, JournalWriter::resume(journal), options);
        let mut half = WriterHalf::new(files, progress, checkpointer, run.number.is_some());
        half.cuts = cuts;
        // The writer may have died before it did what it wrote down.
        cuts.iter().for_each(|cut| half.punch(cut));
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
        let (result, rows_wait) = match half.cap.as_ref().map(RunCap::piece) {
            None => self.append_piece(&mut half, stream, bytes, now),
            Some(piece) => self.append_within_cap(&mut half, stream, bytes.chunks(piece), now),
        };
        result.map(|()| Appended { mark_waits: half.mark_waits(), rows_wait })
    }

    fn append_piece(
        &self,
        half: &mut WriterHalf,
        stream: Stream,
        bytes: &[u8],
        now: UnixMicros,
    ) -> (Result<(), LogError>, usize) {
        let result = half.append(stream, bytes, now);
        half.write_marks_if_due(now);
        (result, self.publish(half))
    }

    /// The same in pieces, behind each of which the run is as large as it may be at most.
    fn append_within_cap(
        &self,
        half: &mut WriterHalf,
        stream: Stream,
        pieces: Chunks<'_, u8>,
        now: UnixMicros,
    ) -> (Result<(), LogError>, usize) {
        let (mut result, mut rows_wait) = (Ok(()), 0);
        for piece in pieces {
            let (appended, rows) = self.append_piece(half, stream, piece, now);
            result = result.and(appended);
            rows_wait = rows;
            while let Some(given_up) = half.give_up(now) {
                // Readers know of it before it is gone.
                rows_wait = self.publish(half);
                if let GivenUp::Middle(cut) = given_up {
                    half.punch(cut);
                }
            }
        }
        (result, rows_wait)
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
        if loss.in_marks {
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
        let mut run = self.wind_up(&mut half, end)?;
        let Some(mut files) = half.files.take() else { return Err(finished(&self.run.id)) };
        let written = files.end(&mut run, &self.run.folder);
        self.tell_end(&run);
        written.map(|()| run)
    }

    /// Ends a run that was taken over for its readers: what they are told is what [`write_end`](Self::write_end) writes
    /// next, which takes as long as the disk.
    pub(crate) fn end_for_readers(&self, end: RunEnd) -> Result<(), LogError> {
        let run = self.wind_up(&mut self.half(), end)?;
        self.tell_end(&run);
        Ok(())
    }

    /// Writes the end that the readers know of: syncs the logs, writes the journal's end and `metadata.json`, each when
    /// what comes before it is done. Calling again tries again what the disk refused.
    pub(crate) fn write_end(&self) -> Result<(), LogError> {
        let mut half = self.half();
        half.try_to_write_marks(true)?;
        let Some(files) = &mut half.files else { return Ok(()) };
        let run = self.run.metadata();
        files.end_in_order(&run, &self.run.folder)?;
        half.files = None;
        self.tell_end(&run);
        Ok(())
    }

    /// Notes in the journal what comes before the end, and gives the run as it ended.
    fn wind_up(&self, half: &mut WriterHalf, end: RunEnd) -> Result<JobMetadata, LogError> {
        half.look_for_what_was_taken();
        half.close_holes();
        half.write_last_marks();
        half.punch_what_is_told();
        if half.files.is_none() {
            return Err(finished(&self.run.id));
        }
        self.publish(half);
        let mut run = self.run.metadata();
        end.apply_to(&mut run);
        if let Ok(Some(existing)) = self.run.folder.read_metadata() {
            for (key, value) in existing.other {
                run.other.entry(key).or_insert(value);
            }
        }
        Ok(run)
    }

    fn tell_end(&self, run: &JobMetadata) {
        let disk_bytes = self.run.folder.disk_bytes();
        self.run.change(|state| {
            state.run = run.clone();
            state.disk_bytes = disk_bytes;
            state.waiting.dirty = true;
        });
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
            state.waiting.dirty |= state.cuts != half.cuts;
            state.cuts = half.cuts;
            state.tail.clear();
            state.tail.extend(half.unwritten.iter().copied());
            state.tail.extend(half.open.map(|mark| mark.arrival));
            state.add_gaps(&half.gaps);
            half.gaps.clear();
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
    /// Whether marks tell of some of it.
    pub(crate) in_marks: bool,
    /// Lines that marks tell of and that were not lost before.
    pub(crate) lines: u64,
    /// Bytes that marks tell of and that were not given up before.
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
