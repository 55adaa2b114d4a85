//! Runs that other processes write: found, followed, and ended when their writer is gone.

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::error::LogError;
use crate::index::RunNumber;
use crate::index::progress::{Checkpointer, Checkpoints, GapAt, Progress};
use crate::journal::{Arrival, Record, What};
use crate::layout::{Layout, RunFolder};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::logfile::{AppendFile, Fetched, Io, ReadFile, count_lines, whole_lines};
use crate::run::{Gap, JobMetadata, JobRunId, RunSpec, RunState};
use crate::store::file::FileStoreOptions;
use crate::store::file::live::LiveRun;
use crate::store::file::marks::{Entry, JournalReader};
use crate::store::file::power;
use crate::store::file::writer::{Loss, OwnRun, disk_bytes};
use crate::store::{Outcome, RunEnd};

/// A folder without a journal and without `metadata.json` counts as a run that goes on for as long as its logs
/// grew within this time.
const QUIET: Duration = Duration::from_secs(60 * 60);
/// How much of a log is read at once when its lines have to be counted.
const SCAN_BYTES: usize = 256 * 1024;

/// A run that another process writes, or wrote.
#[derive(Debug)]
pub(crate) struct ForeignRun {
    pub(crate) run: Arc<LiveRun>,
    tracker: Mutex<Tracker>,
}

#[derive(Debug)]
struct Tracker {
    source: Source,
    progress: Progress,
    checkpointer: Checkpointer,
}

/// What tells how far the run has come.
#[derive(Debug)]
enum Source {
    Journal(JournalReader),
    /// There is no journal: the lines are counted.
    Logs,
}

impl ForeignRun {
    /// Opens the run in a folder and catches up with it.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`] if there is no such folder, or what the disk said.
    pub(crate) fn open(layout: &Layout, id: &JobRunId, number: Option<RunNumber>) -> Result<Self, LogError> {
        let folder = layout.run(id);
        if !folder.is_there() {
            return Err(LogError::NotFound { id: id.clone() });
        }
        let opened = match ReadFile::open_if_there(&folder.journal())? {
            Some(file) => {
                let mut journal = JournalReader::new(file);
                match journal.at(0, Io::MayBlock)? {
                    Entry::Record(Record::Start(run), behind) if run.id() == id => {
                        Some((journal, *run, behind))
                    }
                    _ => {
                        tracing::error!(run = %id, "the journal has no sound beginning; its lines are counted");
                        None
                    }
                }
            }
            None => None,
        };
        let (source, run, progress) = match opened {
            Some((journal, run, behind)) => {
                let progress = Progress::start(run.started_at, behind);
                (Source::Journal(journal), run, progress)
            }
            None => {
                let run = plain_metadata(&folder, id)?;
                let progress = Progress::start(run.started_at, 0);
                (Source::Logs, run, progress)
            }
        };
        let has_journal = matches!(source, Source::Journal(_));
        // The end is taken from the folder by catching up, together with everything before it.
        let mut going_on = run;
        going_on.state = RunState::Running;
        let tracker = Tracker { source, progress, checkpointer: Checkpointer::new() };
        let run = LiveRun::new(folder, number, going_on, progress, has_journal);
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
        // Looked at before the journal: of every hole before these bytes, the journal tells by then.
        let lengths =
            Stream::BOTH.map(|stream| fs::metadata(self.run.folder.log(stream)).map_or(0, |file| file.len()));
        let indexed = self.run.number.is_some();
        let mut news = News { indexed, ..News::default() };
        match &mut tracker.source {
            Source::Journal(_) => tracker.read_journal(&mut news)?,
            Source::Logs => {
                // The end first: what comes before it is in the logs by then.
                news.end = self.plain_end()?;
                tracker.count_lines(&self.run.folder, &mut news)?;
                if let Some(run) = &mut news.end {
                    [run.stdout, run.stderr] = tracker.progress.streams.map(|stream| stream.totals());
                }
            }
        }
        self.publish(&tracker, lengths, news);
        Ok(self.run.is_over())
    }

    fn publish(&self, tracker: &Tracker, lengths: [u64; 2], news: News) {
        let visible = Stream::BOTH.map(|stream| {
            let (before, marked) = (lengths[stream.index()], tracker.progress.of(stream).bytes);
            let now = fs::metadata(self.run.folder.log(stream)).map_or(0, |file| file.len());
            // Of holes in what came since, the journal tells as far as its marks go.
            if now < before { now } else { before.max(marked.min(now)) }
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
            if let Some(run) = news.end {
                state.visible = [run.stdout.bytes, run.stderr.bytes];
                state.run = *run;
                state.disk_bytes = disk_bytes;
                state.waiting.dirty = true;
            }
        });
    }

    /// The end of a run without a journal: `metadata.json` by another tool, or long silence.
    fn plain_end(&self) -> Result<Option<Box<JobMetadata>>, LogError> {
        if let Some(run) = self.written_end()? {
            return Ok(Some(Box::new(run)));
        }
        let touched = last_touched(&self.run.folder);
        let is_quiet = touched.elapsed().is_ok_and(|silence| silence > QUIET);
        // A folder that is gone says nothing of how its run ended.
        if !(is_quiet || self.journal_is_abandoned()?) || !self.run.folder.is_there() {
            return Ok(None);
        }
        let mut run = self.run.state().run.clone();
        run.state = RunState::Lost { ended: touched.into() };
        Ok(Some(Box::new(run)))
    }

    /// The run as its `metadata.json` says that it ended, if it says so.
    fn written_end(&self) -> Result<Option<JobMetadata>, LogError> {
        match self.run.folder.read_metadata() {
            Ok(Some(mut run)) if run.state.is_over() => {
                // A folder that was copied or renamed still has the name of the other in it.
                run.spec.id = self.run.id.clone();
                let started_at = self.run.state().run.started_at;
                Ok(Some(with_times(run, &self.run.folder, started_at)))
            }
            Ok(_) => Ok(None),
            Err(LogError::Corrupt { path, what }) => {
                // It may be half written by a tool that does not rename.
                tracing::debug!(path = %path.display(), what, "metadata.json can't be read now");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether there is a journal that tells nothing, and nobody who writes it: of a run that had just begun when the
    /// machine stopped.
    fn journal_is_abandoned(&self) -> Result<bool, LogError> {
        let journal = ReadFile::open_if_there(&self.run.folder.journal())?;
        journal.map_or(Ok(false), |journal| journal.is_locked().map(|locked| !locked))
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

    /// Ends a run whose writer is gone without touching its folder: as its `metadata.json` says if there is one,
    /// which means that its journal was damaged later, or else as lost.
    pub(crate) fn report_end(&self) -> Result<(), LogError> {
        let mut run = self.run.metadata();
        for (totals, stream) in [&mut run.stdout, &mut run.stderr].into_iter().zip(Stream::BOTH) {
            let known = *self.tracker().progress.of(stream);
            let unmarked = count_from(&self.run.folder, stream, known.bytes)?;
            totals.bytes = known.bytes + unmarked.bytes;
            totals.lines = known.lines + unmarked.lines;
            totals.lines +=
                u64::from(unmarked.unterminated || (unmarked.bytes == 0 && known.unterminated() > 0));
        }
        match self.written_end()? {
            Some(written) => {
                let counted = [run.stdout, run.stderr];
                run = written;
                if run.stdout.bytes + run.stderr.bytes == 0 {
                    [run.stdout, run.stderr] = counted;
                }
            }
            None => run.state = RunState::Lost { ended: self.last_sign() },
        }
        let disk_bytes = disk_bytes(&self.run.folder);
        self.run.change(|state| {
            state.visible = [run.stdout.bytes, run.stderr.bytes];
            state.run = run;
            state.disk_bytes = disk_bytes;
            state.waiting.dirty = true;
        });
        Ok(())
    }

    /// When the last sign of the run was written.
    fn last_sign(&self) -> UnixMicros {
        UnixMicros::from(last_touched(&self.run.folder)).max(self.tracker().progress.time)
    }

    /// Whether `metadata.json` says how the run ended, although its journal does not.
    pub(crate) fn has_written_end(&self) -> Result<bool, LogError> {
        Ok(self.written_end()?.is_some())
    }

    /// Ends a run whose writer is gone: what it left in the logs is noted in the journal, then that it is lost.
    /// Gives false if somebody else has the run after all.
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
        for stream in Stream::BOTH {
            adopt_unmarked(&own, stream, progress.of(stream).bytes, ended_at)?;
        }
        let mut end = RunEnd { ended_at, ..RunEnd::now(Outcome::Lost) };
        if lost.iter().any(Option::is_some) {
            end.note = Some("the machine stopped before all output was on its disk".to_owned());
        }
        own.finish(end)?;
        Ok(true)
    }

    /// Cuts off what is not what it was any more, if the machine stopped while the run went on.
    fn lost_to_a_power_cut(&self, progress: &Progress) -> Result<[Option<Loss>; 2], LogError> {
        let mut lost = [None; 2];
        if !power::machine_was_started_since(last_touched(&self.run.folder)) {
            return Ok(lost);
        }
        for stream in Stream::BOTH {
            let Some(sound) = power::check(&self.run.folder, stream, progress)? else { continue };
            let marked = progress.of(stream);
            let mut log = AppendFile::open(self.run.folder.log(stream))?;
            tracing::error!(run = %self.run.id, %stream, bytes = log.len(), sound = sound.bytes, "the machine stopped before all of a log was on its disk");
            log.cut(sound.bytes.min(log.len()))?;
            lost[stream.index()] = Some(Loss {
                lines: marked.totals().lines.saturating_sub(sound.lines),
                marked: marked.bytes.saturating_sub(sound.bytes),
                unmarked: sound.unmarked,
            });
        }
        Ok(lost)
    }

    /// Whether the run's journal has ended but nothing was said of it in `metadata.json` yet.
    pub(crate) fn lacks_metadata(&self) -> bool {
        // A folder without a journal is by another tool.
        self.run.is_over() && !self.run.folder.metadata().exists() && self.run.folder.journal().exists()
    }

    /// Writes the `metadata.json` that a writer did not get to after it ended its journal.
    pub(crate) fn complete_metadata(&self, options: &FileStoreOptions) -> Result<(), LogError> {
        if !self.lacks_metadata() {
            return Ok(());
        }
        // Whoever has the lock is the one to write it.
        let journal = AppendFile::open(self.run.folder.journal())?;
        if journal.try_lock()? && self.lacks_metadata() {
            self.run.folder.write_metadata(&self.run.metadata(), options.durability.syncs_ends())?;
            self.run.state().waiting.dirty = true;
        }
        Ok(())
    }
}

/// What catching up found.
#[derive(Default)]
struct News {
    indexed: bool,
    gaps: Vec<GapAt>,
    found: Vec<Checkpoints>,
    end: Option<Box<JobMetadata>>,
}

impl Tracker {
    fn read_journal(&mut self, news: &mut News) -> Result<(), LogError> {
        let Source::Journal(journal) = &mut self.source else { return Ok(()) };
        loop {
            match journal.at(self.progress.journal, Io::MayBlock)? {
                Entry::Record(Record::Arrival(arrival), behind) => {
                    let before = self.progress;
                    if !self.progress.advance(&arrival) {
                        return Ok(());
                    }
                    self.progress.journal = behind;
                    if let What::Gap(reason) = arrival.what {
                        let at = before.of(arrival.stream);
                        let gap = Gap {
                            stream: arrival.stream,
                            after: LineNumber(at.lines),
                            lines: arrival.lines,
                            bytes: arrival.bytes,
                            reason,
                        };
                        news.gaps.push(GapAt { gap, offset: at.line_start });
                    }
                    news.note(self.checkpointer.after(arrival.stream, &self.progress));
                }
                Entry::Record(Record::End(run), behind) => {
                    self.progress.journal = behind;
                    news.end = Some(run);
                    return Ok(());
                }
                Entry::Record(Record::Start(_), behind) => self.progress.journal = behind,
                Entry::Nothing | Entry::Damaged | Entry::WouldBlock => return Ok(()),
            }
        }
    }

    /// Counts the lines that were written since the last time.
    fn count_lines(&mut self, folder: &RunFolder, news: &mut News) -> Result<(), LogError> {
        let now = UnixMicros::now();
        for stream in Stream::BOTH {
            let Some(mut file) = ReadFile::open_if_there(&folder.log(stream))? else { continue };
            loop {
                // A piece ends where a checkpoint can be, as a mark does.
                let at = *self.progress.of(stream);
                let Fetched::Bytes(bytes) = file.read(at.bytes, SCAN_BYTES, Io::MayBlock)? else { break };
                if bytes.is_empty() {
                    break;
                }
                for piece in bytes.chunks(usize::try_from(Checkpointer::EVERY_BYTES).unwrap_or(SCAN_BYTES)) {
                    let unterminated = match whole_lines(piece) {
                        0 => self.progress.of(stream).unterminated() + piece.len() as u64,
                        whole => (piece.len() - whole) as u64,
                    };
                    let arrival = Arrival {
                        after_micros: now.0.saturating_sub(self.progress.time.0).max(1),
                        stream,
                        lines: count_lines(piece),
                        bytes: piece.len() as u64,
                        what: What::Mark { unterminated },
                    };
                    self.progress.advance(&arrival);
                    news.note(Checkpoints {
                        progress: None,
                        ..self.checkpointer.after(stream, &self.progress)
                    });
                }
            }
        }
        Ok(())
    }
}

impl News {
    fn note(&mut self, found: Checkpoints) {
        if self.indexed && found.is_some() {
            self.found.push(found);
        }
    }
}

/// What is known of a run whose folder has no journal.
fn plain_metadata(folder: &RunFolder, id: &JobRunId) -> Result<JobMetadata, LogError> {
    let started = created(folder)?;
    match folder.read_metadata() {
        Ok(Some(run)) if run.id() == id => return Ok(with_times(run, folder, started)),
        Ok(_) | Err(LogError::Corrupt { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(JobMetadata::started(RunSpec { created_at: started, ..RunSpec::new(id.clone()) }, started))
}

fn created(folder: &RunFolder) -> Result<UnixMicros, LogError> {
    let path = folder.path();
    let created = fs::metadata(path).and_then(|folder| folder.created().or_else(|_| folder.modified()));
    Ok(created.map_err(LogError::io("looking at", path))?.into())
}

/// Takes times that a document lacks from the files.
fn with_times(mut run: JobMetadata, folder: &RunFolder, started: UnixMicros) -> JobMetadata {
    let unknown = UnixMicros::default();
    if run.started_at == unknown {
        run.started_at = started;
    }
    if run.spec.created_at == unknown {
        run.spec.created_at = run.started_at;
    }
    if run.state.ended() == Some(unknown) {
        run.state = run.state.ended_at(last_touched(folder).into());
    }
    run
}

/// When something was last written to a run's logs or journal.
fn last_touched(folder: &RunFolder) -> SystemTime {
    let files =
        [folder.log(Stream::Stdout), folder.log(Stream::Stderr), folder.journal(), folder.path().to_owned()];
    let touched = files.iter().filter_map(|path| fs::metadata(path).and_then(|file| file.modified()).ok());
    touched.max().unwrap_or(SystemTime::UNIX_EPOCH)
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
