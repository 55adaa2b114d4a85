//! Runs that other processes write: found, followed, and ended when their writer is gone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::LogError;
use crate::index::RunNumber;
use crate::index::progress::{Progress, Resume};
use crate::layout::{FileId, Layout, file_at};
use crate::line::{Stream, UnixMicros};
use crate::logfile::{AppendFile, Fetched, Io, ReadFile};
use crate::meter::Appends;
use crate::run::{JobMetadata, JobRunId, RunState};
use crate::store::file::FileStoreOptions;
use crate::store::file::copied;
use crate::store::file::live::LiveRun;
use crate::store::file::power;
use crate::store::file::tracker::{
    News, SCAN_BYTES, Source, Tracker, has_sound_journal, last_touched, written_end,
};
use crate::store::file::writer::{Loss, OwnRun};
use crate::store::{Outcome, RunEnd};

/// A run that another process writes, or wrote.
#[derive(Debug)]
pub(crate) struct ForeignRun {
    pub(crate) run: Arc<LiveRun>,
    tracker: Mutex<Tracker>,
    /// Whether its journal is a copy of the one that a writer made, as far as can be told.
    copied: AtomicBool,
    /// Which files its logs are in, by what its writer says.
    logs: Mutex<[Option<FileId>; 2]>,
    /// The run of a dead writer, from when its readers know that it is over until the disk does.
    ending: Mutex<Option<OwnRun>>,
    /// Whether there is such a one.
    is_ending: AtomicBool,
    appends: Appends,
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
        if !folder.is_there()? {
            return Err(LogError::NotFound { id: id.clone() });
        }
        let (tracker, mut run, gaps) = Tracker::open(&folder, id, resume)?;
        // The end is taken from the folder by catching up, together with everything before it.
        run.state = RunState::Running;
        let run = LiveRun::new(folder, number, run, tracker.progress, tracker.has_journal());
        {
            let mut state = run.state();
            state.gaps = Arc::new(gaps);
            state.pinned = run.folder.is_pinned();
        }
        let copied = tracker.has_journal() && copied::is_copy(&run.folder, run.metadata().started_at);
        let foreign = Self {
            run: Arc::new(run),
            tracker: Mutex::new(tracker),
            copied: AtomicBool::new(copied),
            logs: Mutex::default(),
            ending: Mutex::new(None),
            is_ending: AtomicBool::new(false),
            appends: Appends::new(),
        };
        foreign.catch_up()?;
        Ok(foreign)
    }

    /// Begins the run's journal anew if a power cut took the beginning; gives whether it did. The run is to be opened again
    /// then.
    pub(crate) fn begin_journal_anew(&self) -> Result<bool, LogError> {
        let has_file = !self.tracker().has_journal() && self.run.folder.journal().exists();
        Ok(has_file && power::begin_journal_anew(&self.run.folder, &self.run.id)?)
    }

    fn ending(&self) -> MutexGuard<'_, Option<OwnRun>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
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
        // Looked at before the journal: of every hole before these bytes, the journal tells by then.
        let lengths = copied::lengths(&self.run.folder)?;
        if lengths == [0, 0] && !self.run.folder.is_there()? {
            // The journal is open and can still be read, but what it tells of is away.
            return Ok(false);
        }
        let indexed = self.run.number.is_some();
        let copied = self.is_being_copied().then_some(lengths);
        let mut news = News { indexed, copied, ..News::default() };
        let run = self.run.state().run.clone();
        tracker.catch_up(&self.run.folder, &run, &mut news)?;
        let now = copied::lengths(&self.run.folder).unwrap_or(lengths);
        self.publish(&tracker, [lengths, now], news);
        Ok(self.run.is_over())
    }

    /// Counts what came in since the run was as far as this.
    pub(crate) fn count(&self, before: &Progress) {
        let now = self.run.state().progress;
        now.count_since(before, &self.appends);
    }

    /// Tells the readers; `lengths` are those of the logs before and after the journal was looked at.
    fn publish(&self, tracker: &Tracker, lengths: [[u64; 2]; 2], news: News) {
        let visible = Stream::BOTH.map(|stream| {
            let [before, now] = lengths.map(|lengths| lengths[stream.index()]);
            let marked = tracker.progress.of(stream).bytes;
            if self.is_replaced(stream, tracker) {
                return marked.min(now);
            }
            // Of holes in what came since, the journal tells as far as its marks go.
            if now < before { now } else { before.max(marked.min(now)) }
        });
        let unchanged = {
            let state = self.run.state();
            state.visible == visible
                && state.progress == tracker.progress
                && state.cuts == tracker.cuts
                && news.end.is_none()
        };
        if unchanged {
            return;
        }
        let (disk_bytes, compressed) = match news.end {
            Some(_) => (self.run.folder.disk_bytes(), self.run.folder.is_compressed()),
            None => (0, false),
        };
        self.run.change(|state| {
            state.progress = tracker.progress;
            state.visible = visible;
            state.waiting.dirty |= state.cuts != tracker.cuts;
            state.cuts = tracker.cuts;
            state.add_gaps(&news.gaps);
            state.waiting.dirty |= news.found.len() > 0;
            state.waiting.extend(news.found.lines, news.found.places);
            if let Some(run) = news.end {
                state.visible = [run.stdout.bytes, run.stderr.bytes];
                state.run = *run;
                (state.disk_bytes, state.compressed) = (disk_bytes, compressed);
                state.waiting.dirty = true;
            }
        });
    }

    /// Whether there is another file in the place of a log, of which the run's writer has not said that it goes on there.
    fn is_replaced(&self, stream: Stream, tracker: &Tracker) -> bool {
        let found = file_at(&self.run.folder.log(stream));
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let known = &mut logs[stream.index()];
        let cut = tracker.cuts.of(stream);
        if known.is_none() || cut.is_some_and(|cut| cut.by_others) && cut != self.run.state().cuts.of(stream)
        {
            *known = found;
        }
        tracker.has_journal() && *known != found
    }

    /// The run as its `metadata.json` says that it ended, if it says so.
    fn written_end(&self) -> Result<Option<JobMetadata>, LogError> {
        let started_at = self.run.state().run.started_at;
        written_end(&self.run.folder, &self.run.id, started_at)
    }

    /// Whether the run is in a folder that somebody is just copying.
    fn is_being_copied(&self) -> bool {
        self.copied.load(Ordering::Relaxed) && copied::is_changing(&self.run.folder)
    }

    /// Whether a run whose lines were counted has got its journal: somebody copied its log first.
    pub(crate) fn has_got_journal(&self) -> bool {
        let has_journal = self.tracker().has_journal();
        !has_journal && has_sound_journal(&self.run.folder, &self.run.id)
    }

    /// Whether another run is in its folder by now: somebody removed that, and used the id again.
    pub(crate) fn is_outlived(&self) -> bool {
        let is_in_place = match &self.tracker().source {
            Source::Journal(journal) => journal.file().is_at_its_path(),
            // Until it is over, what tells of the end may say when it began too.
            Source::Logs => !self.run.is_over(),
        };
        !is_in_place && self.run.is_outlived()
    }

    /// Whether a run that is over can still get its journal: its `metadata.json` is by a writer that had one, and its
    /// folder is so new that somebody may be copying it.
    pub(crate) fn may_get_journal(&self) -> bool {
        let was_recorded = {
            let state = self.run.state();
            !state.has_journal && state.run.state.is_over() && !state.run.spec.host.is_empty()
        };
        was_recorded && copied::is_made_just_now(&self.run.folder)
    }

    /// Whether the writer of a journaled run is gone without having ended it.
    pub(crate) fn writer_is_gone(&self) -> Result<bool, LogError> {
        {
            let tracker = self.tracker();
            let Source::Journal(journal) = &tracker.source else { return Ok(false) };
            if journal.file().is_locked()? {
                // Nobody who copies locks anything.
                self.copied.store(false, Ordering::Relaxed);
                return Ok(false);
            }
        }
        if self.is_being_copied() {
            return Ok(false);
        }
        // It may have written the end just before it went.
        Ok(!self.catch_up()?)
    }

    /// Ends a run whose writer is gone without touching its folder: as its `metadata.json` says if there is one,
    /// which means that its journal was damaged later, or else as lost.
    pub(crate) fn report_end(&self) -> Result<(), LogError> {
        // What the journal does not tell of is counted in the logs; the tracker itself stays where the journal ends.
        let mut behind = {
            let tracker = self.tracker();
            let (progress, checkpointer, cuts) = (tracker.progress, tracker.checkpointer, tracker.cuts);
            Tracker { source: Source::Logs, progress, checkpointer, cuts }
        };
        let mut news = News { indexed: self.run.number.is_some(), ..News::default() };
        behind.count_lines(&self.run.folder, &mut news)?;
        let mut run = self.run.metadata();
        match self.written_end()? {
            Some(written) => {
                run = written;
                behind.fill_in(&mut run);
            }
            None => {
                run.state = RunState::Lost { ended: self.last_sign() };
                [run.stdout, run.stderr] = behind.totals();
            }
        }
        let (disk_bytes, compressed) = (self.run.folder.disk_bytes(), self.run.folder.is_compressed());
        self.run.change(|state| {
            state.visible = [run.stdout.bytes, run.stderr.bytes];
            state.run = run;
            (state.disk_bytes, state.compressed) = (disk_bytes, compressed);
            state.waiting.extend(news.found.lines, news.found.places);
            state.waiting.dirty = true;
        });
        Ok(())
    }

    /// When the last sign of the run was written.
    fn last_sign(&self) -> UnixMicros {
        UnixMicros::from(last_touched(&self.run.folder)).max(self.tracker().progress.time)
    }

    /// Whether the run's journal is compressed: it was over by then, and nothing is written to it any more.
    pub(crate) fn is_compressed(&self) -> bool {
        matches!(&self.tracker().source, Source::Journal(journal) if journal.file().is_compressed())
    }

    /// Whether `metadata.json` says how the run ended, although its journal does not.
    pub(crate) fn has_written_end(&self) -> Result<bool, LogError> {
        Ok(self.written_end()?.is_some())
    }

    /// Ends a run whose writer is gone for its readers: what it left in the logs is noted in the journal, and they are
    /// told that it is lost. [`complete_end`](Self::complete_end) writes the end. Gives false if somebody else has the
    /// run after all.
    pub(crate) fn recover(&self, options: &FileStoreOptions) -> Result<bool, LogError> {
        let mut journal = AppendFile::open(self.run.folder.journal())?;
        if !journal.try_lock()? {
            return Ok(false);
        }
        if self.catch_up()? {
            return Ok(true);
        }
        let ended_at = self.last_sign();
        let (progress, checkpointer) = {
            let tracker = self.tracker();
            (tracker.progress, tracker.checkpointer)
        };
        // Before anything is changed: the files' own times tell whether the machine stopped.
        let lost = self.lost_to_a_power_cut(&progress)?;
        if journal.len() > progress.journal {
            tracing::warn!(run = %self.run.id, bytes = journal.len() - progress.journal, "cutting off a torn journal record");
            journal.cut(progress.journal)?;
        }
        let own = OwnRun::take_over(Arc::clone(&self.run), journal, checkpointer, options)?;
        for stream in Stream::BOTH {
            own.note_loss(stream, lost[stream.index()]);
        }
        adopt_unmarked(&own, &progress, ended_at)?;
        let mut end = RunEnd { ended_at, ..RunEnd::now(Outcome::Lost) };
        if lost.iter().any(Option::is_some) {
            end.note = Some("the machine stopped before all output was on its disk".to_owned());
        }
        self.is_ending.store(true, Ordering::Release);
        own.end_for_readers(end)?;
        *self.ending() = Some(own);
        Ok(true)
    }

    /// Lets a journal that ends too early tell of everything up to this end. Gives false if somebody else has the
    /// run.
    pub(crate) fn complete_journal(
        &self,
        end: &JobMetadata,
        options: &FileStoreOptions,
    ) -> Result<bool, LogError> {
        let mut journal = AppendFile::open(self.run.folder.journal())?;
        if !journal.try_lock()? || self.catch_up()? {
            return Ok(false);
        }
        let (progress, checkpointer) = {
            let tracker = self.tracker();
            (tracker.progress, tracker.checkpointer)
        };
        journal.cut(progress.journal)?;
        let own = OwnRun::take_over(Arc::clone(&self.run), journal, checkpointer, options)?;
        adopt_unmarked(&own, &progress, end.state.ended().unwrap_or(progress.time))?;
        own.end_as(end)?;
        Ok(true)
    }

    /// Cuts off what is not what it was any more, if the machine stopped while the run went on.
    fn lost_to_a_power_cut(&self, progress: &Progress) -> Result<[Option<Loss>; 2], LogError> {
        let mut lost = [None; 2];
        if !power::machine_was_started_since(last_touched(&self.run.folder)) {
            return Ok(lost);
        }
        for stream in Stream::BOTH {
            let cuts = self.run.state().cuts;
            let Some(sound) = power::check(&self.run.folder, stream, progress, &cuts)? else { continue };
            let marked = progress.of(stream);
            let mut log = AppendFile::open(self.run.folder.log(stream))?;
            tracing::error!(run = %self.run.id, %stream, bytes = log.len(), sound = sound.bytes, "the machine stopped before all of a log was on its disk");
            log.cut(sound.bytes.min(log.len()))?;
            let (lines, marked) =
                (marked.totals().lines.saturating_sub(sound.lines), marked.bytes.saturating_sub(sound.bytes));
            lost[stream.index()] = Some(Loss {
                in_marks: marked > 0,
                lines: lines.saturating_sub(sound.lost_before.0),
                marked: marked.saturating_sub(sound.lost_before.1),
                unmarked: sound.unmarked,
            });
        }
        Ok(lost)
    }

    /// Whether the run is over, but not all of its end is written yet.
    pub(crate) fn lacks_end(&self) -> bool {
        // A folder without a journal is by another tool.
        self.is_ending.load(Ordering::Acquire)
            || self.run.is_over() && !self.run.folder.metadata().exists() && self.run.folder.has_journal()
    }

    /// Writes what is missing of the run's end: all of it if it was lost, or the `metadata.json` that a writer did not
    /// get to after it ended its journal. What the disk refuses is tried again by calling again.
    pub(crate) fn complete_end(&self, options: &FileStoreOptions) -> Result<(), LogError> {
        let mut ending = self.ending();
        if let Some(own) = &*ending {
            own.write_end()?;
            self.run.folder.remove_unfinished_metadata();
            *ending = None;
            self.is_ending.store(false, Ordering::Release);
            return Ok(());
        }
        if !self.lacks_end() || self.is_being_copied() {
            return Ok(());
        }
        // Whoever has the lock is the one to write it.
        let journal = ReadFile::open_when_there(&self.run.folder.journal())?;
        let lock = journal.try_lock_alone()?;
        if lock.is_some() && self.lacks_end() {
            self.run.folder.write_metadata(&self.run.metadata(), options.durability.syncs_ends())?;
            self.run.folder.remove_unfinished_metadata();
            self.run.state().waiting.dirty = true;
        }
        Ok(())
    }
}

/// Notes what is in the logs behind what the journal tells of.
fn adopt_unmarked(own: &OwnRun, progress: &Progress, time: UnixMicros) -> Result<(), LogError> {
    for stream in Stream::BOTH {
        let mut offset = progress.of(stream).bytes;
        let Some(mut file) = ReadFile::open_if_there(&own.run.folder.log(stream))? else { continue };
        while let Fetched::Bytes(bytes) = file.read(offset, SCAN_BYTES, Io::MayBlock)?
            && !bytes.is_empty()
        {
            own.adopt_bytes(stream, &bytes, time);
            offset += bytes.len() as u64;
        }
    }
    Ok(())
}
