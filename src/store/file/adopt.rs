//! Runs that other processes write: followed, and ended when their writer is gone.

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::LogError;
use crate::index::RunNumber;
use crate::index::progress::Resume;
use crate::layout::{Layout, RunFolder};
use crate::line::{Stream, UnixMicros};
use crate::logfile::{AppendFile, Fetched, Io, ReadFile, count_lines};
use crate::run::{JobMetadata, JobRunId, RunState};
use crate::store::file::live::LiveRun;
use crate::store::file::tracker::{News, SCAN_BYTES, Source, Tracker, last_touched};
use crate::store::file::writer::{OwnRun, disk_bytes};
use crate::store::{Outcome, RunEnd};

/// A run that another process writes, or wrote.
#[derive(Debug)]
pub(crate) struct ForeignRun {
    pub(crate) run: Arc<LiveRun>,
    tracker: Mutex<Tracker>,
}

impl ForeignRun {
    /// Opens the run in a folder and catches up with it, from `resume` on if there is such a place.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`] if there is no such folder, or what the disk said.
    pub(crate) fn open(
        layout: &Layout,
        id: &JobRunId,
        number: Option<RunNumber>,
        resume: Option<Resume>,
    ) -> Result<Self, LogError> {
        let folder = layout.run(id);
        if !folder.path().is_dir() {
            return Err(LogError::NotFound { id: id.clone() });
        }
        let (tracker, mut run, gaps) = Tracker::open(&folder, id, resume)?;
        // The end is taken from the folder by catching up, together with everything before it.
        run.state = RunState::Running;
        let run = LiveRun::new(folder, number, run, tracker.progress, tracker.has_journal());
        run.state().gaps = Arc::new(gaps);
        let foreign = Self { run: Arc::new(run), tracker: Mutex::new(tracker) };
        foreign.catch_up()?;
        Ok(foreign)
    }

    fn tracker(&self) -> MutexGuard<'_, Tracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what was written since the last time and tells the readers; gives whether the run is over.
    pub(crate) fn catch_up(&self) -> Result<bool, LogError> {
        let mut tracker = self.tracker();
        if self.run.is_over() {
            return Ok(true);
        }
        let indexed = self.run.number.is_some();
        let mut news = News { indexed, ..News::default() };
        tracker.catch_up(&self.run.folder, &mut news)?;
        if news.end.is_none() {
            let run = self.run.state().run.clone();
            if tracker.plain_end(&self.run.folder, run.clone())?.is_some() {
                // Its last lines may have come between the look at its logs and that at its metadata.
                tracker.catch_up(&self.run.folder, &mut news)?;
                news.end = tracker.plain_end(&self.run.folder, run)?;
            }
        }
        self.publish(&tracker, news);
        Ok(self.run.is_over())
    }

    fn publish(&self, tracker: &Tracker, news: News) {
        let visible = Stream::BOTH.map(|stream| {
            let length = fs::metadata(self.run.folder.log(stream)).map_or(0, |file| file.len());
            length.max(tracker.progress.of(stream).bytes)
        });
        let unchanged = {
            let state = self.run.state();
            state.visible == visible && state.progress == tracker.progress && news.end.is_none()
        };
        if unchanged {
            return;
        }
        let disk_bytes = if news.end.is_some() { disk_bytes(&self.run.folder) } else { 0 };
        self.run.change(|state| {
            state.progress = tracker.progress;
            state.visible = visible;
            if !news.gaps.is_empty() {
                Arc::make_mut(&mut state.gaps).extend(news.gaps);
            }
            for found in news.found {
                state.waiting.push(found);
                state.waiting.dirty = true;
            }
            if let Some(mut run) = news.end {
                tracker.fill_in(&mut run);
                state.visible = [run.stdout.bytes, run.stderr.bytes];
                state.run = *run;
                state.disk_bytes = disk_bytes;
                state.waiting.dirty = true;
            }
        });
    }

    /// Whether the writer of a journaled run is gone without having ended it.
    pub(crate) fn writer_is_gone(&self) -> Result<bool, LogError> {
        {
            let tracker = self.tracker();
            let Source::Journal(journal) = &tracker.source else { return Ok(false) };
            if journal.file().is_locked()? {
                return Ok(false);
            }
        }
        // It may have written the end just before it went.
        Ok(!self.catch_up()?)
    }

    /// Takes the end of a run whose journal ends too early from the `metadata.json` that its writer left; gives
    /// whether there is one. What the journal does not tell of is counted in the logs.
    pub(crate) fn end_by_metadata(&self) -> Result<bool, LogError> {
        let Some(end) = written_end(&self.run)? else { return Ok(false) };
        let mut tracker = self.tracker();
        if self.run.is_over() {
            return Ok(true);
        }
        tracing::error!(run = %self.run.id, "the journal ends before the run does; its metadata.json is believed");
        let mut news = News { indexed: self.run.number.is_some(), ..News::default() };
        tracker.count_lines(&self.run.folder, &mut news, UnixMicros::default())?;
        news.end = Some(end);
        self.publish(&tracker, news);
        Ok(true)
    }

    /// Says that the run is lost without touching its folder: all that a process may do that does not keep the
    /// store.
    pub(crate) fn report_lost(&self) {
        let mut run = self.run.metadata();
        for (totals, stream) in [&mut run.stdout, &mut run.stderr].into_iter().zip(Stream::BOTH) {
            let visible = self.run.state().visible[stream.index()];
            let known = self.tracker().progress.of(stream).bytes;
            let unmarked = count_from(&self.run.folder, stream, known).unwrap_or_default();
            totals.bytes = visible;
            totals.lines = self.tracker().progress.of(stream).lines + unmarked.lines;
            totals.lines +=
                u64::from(unmarked.unterminated || (unmarked.bytes == 0 && self.unterminated(stream)));
        }
        run.state = RunState::Lost { ended: self.last_sign() };
        self.run.change(|state| state.run = run);
    }

    fn unterminated(&self, stream: Stream) -> bool {
        self.tracker().progress.of(stream).unterminated() > 0
    }

    /// When the last sign of the run was written.
    fn last_sign(&self) -> UnixMicros {
        UnixMicros::from(last_touched(&self.run.folder)).max(self.tracker().progress.time)
    }

    /// Ends a run whose writer is gone: what it left in the logs is noted in the journal, then that it is lost.
    /// Gives false if somebody else has the run after all.
    pub(crate) fn recover(&self) -> Result<bool, LogError> {
        let journal = AppendFile::open(self.run.folder.journal())?;
        if !journal.try_lock()? {
            return Ok(false);
        }
        if self.catch_up()? {
            return Ok(true);
        }
        let ended_at = self.last_sign();
        let own = self.take_over(journal, ended_at)?;
        own.finish(RunEnd { ended_at, ..RunEnd::now(Outcome::Lost) })?;
        self.run.folder.remove_unfinished_metadata();
        Ok(true)
    }

    /// Goes on behind the last sound record of the journal, which is locked, with what it does not tell of.
    fn take_over(&self, mut journal: AppendFile, time: UnixMicros) -> Result<OwnRun, LogError> {
        let (progress, checkpointer) = {
            let tracker = self.tracker();
            (tracker.progress, tracker.checkpointer)
        };
        if journal.len() > progress.journal {
            tracing::warn!(run = %self.run.id, bytes = journal.len() - progress.journal, "cutting off a torn journal record");
            journal.cut(progress.journal)?;
        }
        let own = OwnRun::take_over(Arc::clone(&self.run), journal, checkpointer)?;
        for stream in Stream::BOTH {
            adopt_unmarked(&own, stream, progress.of(stream).bytes, time)?;
        }
        Ok(own)
    }

    /// Lets a journal that ends too early tell of everything up to this end. Gives false if somebody else has the
    /// run.
    pub(crate) fn complete_journal(&self, end: &JobMetadata) -> Result<bool, LogError> {
        let journal = AppendFile::open(self.run.folder.journal())?;
        if !journal.try_lock()? || self.catch_up()? {
            return Ok(false);
        }
        let time = end.state.ended().unwrap_or_else(|| self.last_sign());
        self.take_over(journal, time)?.end_as(end)?;
        Ok(true)
    }

    /// Whether the run's journal has ended but nothing was said of it in `metadata.json` yet.
    pub(crate) fn lacks_metadata(&self) -> bool {
        let over = {
            let state = self.run.state();
            state.has_journal && state.run.state.is_over()
        };
        over && !self.run.folder.metadata().exists()
    }

    /// Writes the `metadata.json` that a writer did not get to after it ended its journal.
    pub(crate) fn complete_metadata(&self) -> Result<(), LogError> {
        if self.lacks_metadata()
            && let Source::Journal(journal) = &self.tracker().source
            && !journal.file().is_locked()?
            && self.lacks_metadata()
        {
            self.run.folder.write_metadata(&self.run.metadata())?;
            self.run.folder.remove_unfinished_metadata();
            self.run.state().waiting.dirty = true;
        }
        Ok(())
    }
}

/// The end of a run by the `metadata.json` that its own writer left.
fn written_end(run: &LiveRun) -> Result<Option<Box<JobMetadata>>, LogError> {
    let started_at = run.state().run.started_at;
    match run.folder.read_metadata() {
        Ok(written) => Ok(written
            .filter(|end| end.id() == &run.id && end.started_at == started_at && end.state.is_over())
            .map(Box::new)),
        Err(LogError::Corrupt { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lines behind a place in a log file.
#[derive(Default)]
struct Counted {
    lines: u64,
    bytes: u64,
    unterminated: bool,
}

fn count_from(folder: &RunFolder, stream: Stream, mut offset: u64) -> Result<Counted, LogError> {
    let mut counted = Counted::default();
    let Some(mut file) = ReadFile::open_if_there(&folder.log(stream))? else { return Ok(counted) };
    while let Fetched::Bytes(bytes) = file.read(offset, SCAN_BYTES, Io::MayBlock)?
        && let Some(last) = bytes.last()
    {
        counted.lines += count_lines(&bytes);
        counted.bytes += bytes.len() as u64;
        counted.unterminated = *last != b'\n';
        offset += bytes.len() as u64;
    }
    Ok(counted)
}

fn adopt_unmarked(own: &OwnRun, stream: Stream, mut offset: u64, time: UnixMicros) -> Result<(), LogError> {
    let Some(mut file) = ReadFile::open_if_there(&own.run.folder.log(stream))? else { return Ok(()) };
    while let Fetched::Bytes(bytes) = file.read(offset, SCAN_BYTES, Io::MayBlock)?
        && !bytes.is_empty()
    {
        own.adopt_bytes(stream, &bytes, time);
        offset += bytes.len() as u64;
    }
    Ok(())
}
