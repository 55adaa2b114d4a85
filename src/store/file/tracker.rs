//! How far a run has come, told by its folder alone: by its journal where that is sound, by counting the lines of
//! its logs where there is none or where it ends too early.

use std::fs;
use std::time::{Duration, SystemTime};

use crate::error::LogError;
use crate::index::progress::{
    Checkpointer, Checkpoints, Cuts, GapAt, LineCheckpoint, MAX_GAPS, Progress, Resume,
};
use crate::journal::{Arrival, Record, What};
use crate::layout::{RunFolder, metadata_of};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::logfile::{Fetched, Io, ReadFile, count_lines, whole_lines};
use crate::run::{Gap, JobMetadata, JobRunId, RunSpec, RunState, StreamTotals};
use crate::store::file::copied;
use crate::store::file::marks::{Entry, JournalReader};

/// A folder without a journal and without `metadata.json` counts as a run that goes on for as long as its logs
/// grew within this time.
const QUIET: Duration = Duration::from_secs(60 * 60);
/// How much of a log is read at once when its lines have to be counted.
pub(crate) const SCAN_BYTES: usize = 256 * 1024;

/// Follows the run in a folder.
#[derive(Debug)]
pub(crate) struct Tracker {
    pub(crate) source: Source,
    pub(crate) progress: Progress,
    pub(crate) checkpointer: Checkpointer,
    pub(crate) cuts: Cuts,
}

/// What tells how far the run has come.
#[derive(Debug)]
pub(crate) enum Source {
    Journal(JournalReader),
    /// There is no journal: the lines are counted.
    Logs,
}

/// What catching up found.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// Whether to gather places for an index.
    pub(crate) indexed: bool,
    /// How many of them to gather at most before giving them away; 0 for all that there are.
    pub(crate) at_most: usize,
    /// The first [`MAX_GAPS`] holes of what was found.
    pub(crate) gaps: Vec<GapAt>,
    pub(crate) found: Found,
    pub(crate) end: Option<Box<JobMetadata>>,
    /// How long the logs are in a folder that is just being copied: nothing is taken in that is not in them yet.
    pub(crate) copied: Option<[u64; 2]>,
}

/// Places that an index keeps.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) lines: Vec<LineCheckpoint>,
    pub(crate) places: Vec<Progress>,
}

impl Found {
    pub(crate) const fn len(&self) -> usize {
        self.lines.len() + self.places.len()
    }

    pub(crate) fn clear(&mut self) {
        self.lines.clear();
        self.places.clear();
    }
}

impl News {
    fn note(&mut self, found: Checkpoints) {
        if self.indexed {
            self.found.lines.extend(found.line);
            self.found.places.extend(found.progress);
        }
    }

    fn add_gap(&mut self, gap: GapAt) {
        if self.gaps.len() < MAX_GAPS {
            self.gaps.push(gap);
        }
    }

    /// Whether the logs do not hold so many bytes yet.
    fn is_ahead(&self, bytes: [u64; 2]) -> bool {
        self.copied.is_some_and(|lengths| (0..2).any(|stream| bytes[stream] > lengths[stream]))
    }

    fn is_full(&self) -> bool {
        self.at_most > 0 && self.found.len() >= self.at_most
    }
}

impl Tracker {
    /// Opens the run in a folder: what is known of it before any output, and the tracker at that place, or at a
    /// later one if the journal bears it out.
    pub(crate) fn open(
        folder: &RunFolder,
        id: &JobRunId,
        resume: Option<Resume>,
    ) -> Result<(Self, JobMetadata, Vec<GapAt>), LogError> {
        match Beginning::of(folder, id)? {
            Beginning::Sound(journal, run, behind) => {
                let fresh = Self {
                    source: Source::Journal(journal),
                    progress: Progress::start(run.started_at, behind),
                    checkpointer: Checkpointer::new(),
                    cuts: Cuts::default(),
                };
                return Ok(match resume.filter(|resume| resume.started_at == run.started_at) {
                    Some(resume) => {
                        let (tracker, gaps) = fresh.skip_to(resume)?;
                        (tracker, *run, gaps)
                    }
                    None => (fresh, *run, Vec::new()),
                });
            }
            Beginning::Damaged => {
                tracing::error!(run = %id, "the journal has no sound beginning; its lines are counted");
            }
            Beginning::Missing => {}
        }
        let run = plain_metadata(folder, id)?;
        let progress = Progress::start(run.started_at, 0);
        let (checkpointer, cuts) = (Checkpointer::new(), Cuts::default());
        Ok((Self { source: Source::Logs, progress, checkpointer, cuts }, run, Vec::new()))
    }

    /// Goes on at a place that the index keeps, if a record begins or the journal ends there: a record's checksum
    /// covers where it stands.
    fn skip_to(mut self, resume: Resume) -> Result<(Self, Vec<GapAt>), LogError> {
        let Source::Journal(journal) = &mut self.source else { return Ok((self, Vec::new())) };
        if !is_behind_a_record(journal, resume.progress.journal)? {
            return Ok((self, Vec::new()));
        }
        self.progress = resume.progress;
        self.checkpointer = resume.checkpointer;
        self.cuts = resume.cuts;
        Ok((self, resume.gaps))
    }

    pub(crate) const fn has_journal(&self) -> bool {
        matches!(self.source, Source::Journal(_))
    }

    /// Takes in what was written since the last time, and the run's end if there is one. `run` is what is known of it.
    /// Gives whether there may be more than was gathered.
    pub(crate) fn catch_up(
        &mut self,
        folder: &RunFolder,
        run: &JobMetadata,
        news: &mut News,
    ) -> Result<bool, LogError> {
        if self.has_journal() {
            return self.read_journal(news);
        }
        // The end first: what comes before it is in the logs by then.
        news.end = plain_end(folder, run)?;
        let more = self.count_lines(folder, news)?;
        if let Some(run) = &mut news.end {
            [run.stdout, run.stderr] = self.totals();
        }
        Ok(more)
    }

    fn read_journal(&mut self, news: &mut News) -> Result<bool, LogError> {
        let Source::Journal(journal) = &mut self.source else { return Ok(false) };
        while !news.is_full() {
            match journal.at(self.progress.journal, Io::MayBlock)? {
                Entry::Record(Record::Arrival(arrival), behind) => {
                    let before = self.progress;
                    if !self.progress.advance(&arrival) {
                        return Ok(false);
                    }
                    if news.is_ahead(self.progress.streams.map(|stream| stream.bytes)) {
                        self.progress = before;
                        return Ok(false);
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
                        news.add_gap(GapAt { gap, offset: at.line_start });
                    }
                    news.note(self.checkpointer.after(arrival.stream, &self.progress));
                }
                Entry::Record(Record::Cut(further), behind) => {
                    if !self.progress.give_up(&further) {
                        return Ok(false);
                    }
                    self.progress.journal = behind;
                    self.cuts.take(further.cut);
                }
                Entry::Record(Record::End(run), _) if news.is_ahead([run.stdout.bytes, run.stderr.bytes]) => {
                    return Ok(false);
                }
                Entry::Record(Record::End(run), behind) => {
                    self.progress.journal = behind;
                    news.end = Some(run);
                    return Ok(false);
                }
                Entry::Record(Record::Start(_), behind) => self.progress.journal = behind,
                Entry::Nothing | Entry::Damaged | Entry::WouldBlock => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Counts the lines of the logs behind what is known of them. When they were written is not known: their places
    /// get the time 0. Gives whether there may be more than was gathered.
    pub(crate) fn count_lines(&mut self, folder: &RunFolder, news: &mut News) -> Result<bool, LogError> {
        for stream in Stream::BOTH {
            let Some(mut file) = ReadFile::open_if_there(&folder.log(stream))? else { continue };
            loop {
                let at = *self.progress.of(stream);
                match file.read(at.bytes, SCAN_BYTES, Io::MayBlock)? {
                    Fetched::Bytes(bytes) if !bytes.is_empty() => self.count(stream, &bytes, news),
                    // The file still says how many lines end in what is damaged.
                    Fetched::Damaged(sound) if sound.offset > at.bytes => {
                        // Of what was given up, the end of the last line is still there, and counted as lost.
                        let twice = u64::from(self.cuts.of(stream).is_some());
                        let lines = (sound.lines + at.dropped_lines).saturating_sub(at.lines + twice);
                        self.count_as(stream, lines, sound.offset - at.bytes, 0, news);
                    }
                    _ => break,
                }
                if news.is_full() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Takes in bytes of a log in pieces, each of which ends where a checkpoint can be, as a mark does.
    fn count(&mut self, stream: Stream, mut bytes: &[u8], news: &mut News) {
        while !bytes.is_empty() {
            let at = *self.progress.of(stream);
            let length = self.checkpointer.piece(stream, at.bytes, bytes);
            let (piece, rest) = bytes.split_at(length);
            let unterminated = match whole_lines(piece) {
                0 => at.unterminated() + piece.len() as u64,
                whole => (piece.len() - whole) as u64,
            };
            self.count_as(stream, count_lines(piece), piece.len() as u64, unterminated, news);
            bytes = rest;
        }
    }

    fn count_as(&mut self, stream: Stream, lines: u64, bytes: u64, unterminated: u64, news: &mut News) {
        let what = What::Mark { unterminated };
        self.progress.advance(&Arrival { after_micros: 0, stream, lines, bytes, what });
        let mut found = self.checkpointer.after(stream, &self.progress);
        found.progress = None;
        if let Some(line) = &mut found.line {
            line.time = UnixMicros::default();
        }
        news.note(found);
    }

    /// What both streams hold.
    pub(crate) const fn totals(&self) -> [StreamTotals; 2] {
        [self.progress.streams[0].totals(), self.progress.streams[1].totals()]
    }

    /// Fills in what a document may leave open: how much the streams hold.
    pub(crate) const fn fill_in(&self, run: &mut JobMetadata) {
        if run.stdout.bytes == 0 && run.stderr.bytes == 0 {
            [run.stdout, run.stderr] = self.totals();
        }
    }
}

/// The beginning of a run's journal.
enum Beginning {
    /// It is of this run; the record behind it begins there.
    Sound(JournalReader, Box<JobMetadata>, u64),
    Damaged,
    Missing,
}

impl Beginning {
    fn of(folder: &RunFolder, id: &JobRunId) -> Result<Self, LogError> {
        let Some(file) = ReadFile::open_if_there(&folder.journal())? else { return Ok(Self::Missing) };
        if file.is_damaged() && copied::is_changing(folder) {
            // The table of a compressed file stands at its end, which is not copied yet.
            return Ok(Self::Missing);
        }
        let mut journal = JournalReader::new(file);
        Ok(match journal.at(0, Io::MayBlock)? {
            Entry::Record(Record::Start(run), behind) if run.id() == id => Self::Sound(journal, run, behind),
            _ => Self::Damaged,
        })
    }
}

/// Whether there is a journal of this run.
pub(crate) fn has_sound_journal(folder: &RunFolder, id: &JobRunId) -> bool {
    matches!(Beginning::of(folder, id), Ok(Beginning::Sound(..)))
}

/// Whether a record begins or the journal ends at a place in a run's journal.
pub(crate) fn ends_a_record(folder: &RunFolder, place: u64) -> bool {
    let journal = ReadFile::open_if_there(&folder.journal()).ok().flatten();
    journal.is_some_and(|file| is_behind_a_record(&mut JournalReader::new(file), place).unwrap_or(false))
}

fn is_behind_a_record(journal: &mut JournalReader, place: u64) -> Result<bool, LogError> {
    match journal.at(place, Io::MayBlock)? {
        Entry::Record(..) => Ok(true),
        Entry::Nothing => Ok(journal.file().len()? == place),
        Entry::Damaged | Entry::WouldBlock => Ok(false),
    }
}

/// The end of a run without a journal: `metadata.json` by another tool, or long silence.
fn plain_end(folder: &RunFolder, run: &JobMetadata) -> Result<Option<Box<JobMetadata>>, LogError> {
    if let Some(run) = written_end(folder, run.id(), run.started_at)? {
        let [stdout, stderr] = copied::lengths(folder);
        let is_whole = run.stdout.bytes <= stdout && run.stderr.bytes <= stderr;
        return Ok((is_whole || !copied::is_changing(folder)).then(|| Box::new(run)));
    }
    let touched = last_touched(folder);
    let is_quiet = touched.elapsed().is_ok_and(|silence| silence > QUIET);
    // A folder that is gone says nothing of how its run ended.
    if !(is_quiet || journal_is_abandoned(folder)?) || !folder.is_there() {
        return Ok(None);
    }
    Ok(Some(Box::new(JobMetadata { state: RunState::Lost { ended: touched.into() }, ..run.clone() })))
}

/// A run as its `metadata.json` says that it ended, if it says so.
pub(crate) fn written_end(
    folder: &RunFolder,
    id: &JobRunId,
    started_at: UnixMicros,
) -> Result<Option<JobMetadata>, LogError> {
    match folder.read_metadata() {
        Ok(Some(mut run)) if run.state.is_over() => {
            // A folder that was copied or renamed still has the name of the other in it.
            run.spec.id = id.clone();
            Ok(Some(with_times(run, folder, started_at)))
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
fn journal_is_abandoned(folder: &RunFolder) -> Result<bool, LogError> {
    let journal = ReadFile::open_if_there(&folder.journal())?;
    let is_free = journal.map_or(Ok(false), |journal| journal.is_locked().map(|locked| !locked))?;
    Ok(is_free && !copied::is_changing(folder))
}

/// What is known of a run whose folder has no journal.
fn plain_metadata(folder: &RunFolder, id: &JobRunId) -> Result<JobMetadata, LogError> {
    let started = created(folder)?;
    match folder.read_metadata() {
        Ok(Some(run)) if run.id() == id => return Ok(with_times(run, folder, started)),
        Ok(_) => {}
        // It may be half written by a tool that does not rename.
        Err(error @ LogError::Corrupt { .. }) => {
            tracing::warn!(%error, "until it can be read the run counts as one that goes on");
        }
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
pub(crate) fn last_touched(folder: &RunFolder) -> SystemTime {
    let own = fs::metadata(folder.path());
    let files = folder.parts().map(|part| metadata_of(&part)).into_iter().chain([own]);
    let touched = files.filter_map(|file| file.and_then(|file| file.modified()).ok());
    touched.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::journal::JournalWriter;
    use crate::layout::Layout;
    use crate::logfile::AppendFile;
    use crate::run::GapReason;

    /// A journal of marks and holes, as a writer would have made them.
    fn journal(arrivals: &[(bool, u16, u32, u8)]) -> (tempfile::TempDir, RunFolder, JobRunId) {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path());
        let id: JobRunId = "r".parse().unwrap();
        let of_run = layout.run(&id);
        fs::create_dir_all(of_run.path()).unwrap();
        let run = JobMetadata::started(RunSpec::new(id.clone()), UnixMicros(1_000));
        let mut writer = JournalWriter::begin(AppendFile::create(of_run.journal()).unwrap(), &run).unwrap();
        let mut records = Vec::new();
        for &(stderr, lines, bytes, kind) in arrivals {
            let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
            let (lines, bytes) = (u64::from(lines), u64::from(bytes));
            let what = match kind {
                0 => What::Gap(GapReason::DiskFull),
                _ if lines > 0 => What::Mark { unterminated: bytes / 3 },
                _ => What::Mark { unterminated: 0 },
            };
            // A hole covers whole lines, and a mark in which no line ends has nothing in it.
            let (lines, bytes) = match what {
                What::Gap(_) => (lines + 1, bytes),
                What::Mark { .. } => (lines, if lines == 0 { 0 } else { bytes }),
            };
            let what = if bytes == 0 && kind != 0 { What::Mark { unterminated: 0 } } else { what };
            records.push(Arrival { after_micros: 1 + u64::from(kind), stream, lines, bytes, what });
        }
        writer.append_arrivals(&records, true, |_, _| ()).unwrap();
        (folder, of_run, id)
    }

    /// The places to go on from, and how many lines and places come before each, itself included.
    fn resumes(all: &News, started_at: UnixMicros, whole: &Tracker) -> Vec<(Resume, [usize; 2])> {
        let mut found = Vec::new();
        for (index, &progress) in all.found.places.iter().enumerate() {
            // Each record has a time of its own.
            let lines = all.found.lines.partition_point(|at| at.time <= progress.time);
            let mut next_offset = [Checkpointer::EVERY_BYTES; 2];
            for line in &all.found.lines[..lines] {
                next_offset[line.stream.index()] = line.offset + Checkpointer::EVERY_BYTES;
            }
            let before = |at: &&GapAt| at.gap.after.0 + at.gap.lines <= progress.of(at.gap.stream).lines;
            let gaps = all.gaps.iter().filter(before).copied().collect();
            let checkpointer = Checkpointer::behind_a_place(next_offset);
            let cuts = Cuts::default();
            found.push((Resume { started_at, progress, checkpointer, gaps, cuts }, [lines, index + 1]));
        }
        assert!(whole.progress.journal > 0);
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn going_on_from_a_place_finds_what_reading_all_finds(
            arrivals in vec((any::<bool>(), 0..40u16, 0..9_000u32, 0..20u8), 2_000..5_000),
        ) {
            let (_folder, folder, id) = journal(&arrivals);
            let (mut whole, run, _) = Tracker::open(&folder, &id, None).unwrap();
            let mut all = News { indexed: true, ..News::default() };
            whole.catch_up(&folder, &run, &mut all).unwrap();
            let places = resumes(&all, run.started_at, &whole);
            prop_assert_eq!(places.len(), arrivals.len() / 1024);
            for (resume, [lines, found]) in places {
                let began = resume.progress.journal;
                let (mut resumed, _, mut gaps) = Tracker::open(&folder, &id, Some(resume)).unwrap();
                prop_assert_eq!(resumed.progress.journal, began, "nothing before it is read");
                let mut rest = News { indexed: true, ..News::default() };
                resumed.catch_up(&folder, &run, &mut rest).unwrap();
                gaps.append(&mut rest.gaps);
                prop_assert_eq!(&gaps, &all.gaps);
                prop_assert_eq!(resumed.progress, whole.progress);
                prop_assert_eq!(resumed.checkpointer, whole.checkpointer);
                prop_assert_eq!(&rest.found.lines, &all.found.lines[lines..]);
                prop_assert_eq!(&rest.found.places, &all.found.places[found..]);
            }
        }
    }

    #[test]
    fn a_place_that_the_journal_does_not_bear_out_is_not_used() {
        let (_folder, folder, id) = journal(&[(false, 2, 10, 1); 1_100]);
        let (mut whole, run, _) = Tracker::open(&folder, &id, None).unwrap();
        let mut all = News { indexed: true, ..News::default() };
        whole.catch_up(&folder, &run, &mut all).unwrap();
        let (resume, _) = resumes(&all, run.started_at, &whole).remove(0);
        let opened = |resume| Tracker::open(&folder, &id, Some(resume)).unwrap().0.progress;
        assert_eq!(opened(resume.clone()), resume.progress);
        let start = Tracker::open(&folder, &id, None).unwrap().0.progress;
        for shift in [1, 1_000_000] {
            let mut moved = resume.clone();
            moved.progress.journal += shift;
            assert_eq!(opened(moved), start);
        }
        assert_eq!(opened(Resume { started_at: UnixMicros(2), ..resume }), start, "of another run");
    }
}
