//! How far a run has come, told by its folder alone: by its journal where that is sound, by counting the lines of
//! its logs where there is none or where it ends too early.

mod plain;

use crate::error::LogError;
use crate::index::progress::{
    Checkpointer, Checkpoints, Cuts, GapAt, LineCheckpoint, MAX_GAPS, Progress, Resume,
};
use crate::journal::{Arrival, Record, What};
use crate::layout::RunFolder;
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::logfile::{Fetched, Io, ReadFile, count_lines, whole_lines};
use crate::run::{Gap, JobMetadata, JobRunId, StreamTotals};
use crate::store::file::copied;
use crate::store::file::marks::{Entry, JournalReader};
use plain::plain_end;

pub(crate) use plain::{last_touched, plain_metadata, written_end};

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
#[derive(Clone, Debug, Default)]
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
    matches!(began(folder, id), Ok(Began::At(_)))
}

/// When the run in a folder began, by its journal alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Began {
    At(UnixMicros),
    /// There is no journal, or it has no sound beginning.
    Unknown,
}

/// When the run in a folder began, by its journal alone.
pub(crate) fn began(folder: &RunFolder, id: &JobRunId) -> Result<Began, LogError> {
    Ok(match Beginning::of(folder, id)? {
        Beginning::Sound(_, run, _) => Began::At(run.started_at),
        Beginning::Damaged | Beginning::Missing => Began::Unknown,
    })
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

#[cfg(test)]
mod tests;
