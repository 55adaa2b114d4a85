//! The most that one run may keep. When its logs are larger, the first quarter of that stays, and of what follows
//! the newest: a part in the middle is given up, which grows as the run goes on.
//!
//! Where such a part begins and ends is taken from the run's own journal: behind a mark, so that each mark is given up
//! whole or not at all, and so that the log need not be read again to count its lines.

use std::path::Path;
use std::sync::Once;

use super::half::WriterHalf;
use super::hole::Hole;
use crate::error::LogError;
use crate::index::progress::{Checkpointer, Progress, before_line_at};
use crate::journal::{Cut, CutFurther, Place, Record};
use crate::line::{Stream, UnixMicros};
use crate::logfile::{AppendFile, Io, ReadFile, whole_lines};
use crate::run::GapReason;
use crate::store::file::marks::{Entry, JournalReader};

/// The least that is given up at a time, unless that is a quarter of all.
const STEP_BYTES: u64 = 1024 * 1024;
/// The most bytes of one append that are written before it is looked whether the run is too large; fewer where it may
/// keep little.
const PIECE_BYTES: u64 = 256 * 1024;

/// What a run is to be kept within.
#[derive(Debug)]
pub(super) struct RunCap {
    bytes: u64,
    /// Whether a mark has ended where the head does.
    past_head: bool,
    /// Where marks end next, by stream: small enough to be given up one by one.
    next_split: [u64; 2],
    /// Nothing is tried before so many bytes are kept: what was tried last did not work.
    not_below: u64,
    /// What others took of each stream before that.
    taken: [Option<Taken>; 2],
    /// Once the run was too large for the first time.
    middle: Option<Middle>,
}

/// What somebody else took of a stream, which is given up as its middle is.
#[derive(Clone, Copy, Debug)]
struct Taken {
    begin: Place,
    /// The run behind it.
    end: Progress,
}

/// What lies between the head of a run and its end.
#[derive(Debug)]
struct Middle {
    journal: JournalReader,
    /// Where the heads of both streams end.
    begin: [Place; 2],
    /// The run behind the mark at which each stream's cut ends.
    end: [Progress; 2],
}

/// What was given up.
#[derive(Clone, Copy, Debug)]
pub(super) enum GivenUp {
    /// A further part of a stream's middle: the journal tells of it, and the log still has it.
    Middle(Cut),
    /// The beginning of a line that is too long to be kept.
    Line,
}

impl RunCap {
    /// A cap of so many bytes; 0: none.
    pub(super) fn new(bytes: u64) -> Option<Self> {
        let next_split = [Self::mark_of(bytes); 2];
        let cap = Self { bytes, past_head: false, next_split, not_below: 0, taken: [None; 2], middle: None };
        (bytes > 0).then_some(cap)
    }

    /// How much is given up at a time: each time waits until the journal is on the disk.
    fn step_of(bytes: u64) -> u64 {
        (bytes / 16).max(STEP_BYTES).min(bytes / 4).max(1)
    }

    /// How much a mark holds at most, but for one line: marks are given up whole.
    fn mark_of(bytes: u64) -> u64 {
        (Self::step_of(bytes) / 4).clamp(1, Checkpointer::EVERY_BYTES)
    }

    /// How many of the bytes that come next in a stream belong into one mark, if not all of them. None do where the
    /// head ends before them.
    pub(super) fn split(&self, stream: Stream, at: &Progress, bytes: &[u8]) -> Option<usize> {
        if self.ends_head(at, bytes.len()) {
            return Some(self.within_head(at, bytes));
        }
        before_line_at(self.next_split[stream.index()], at.of(stream).bytes, bytes)
    }

    /// A mark of a stream has ended at the beginning of a line, before these bytes.
    pub(super) fn has_split(&mut self, stream: Stream, at: &Progress, following: &[u8]) {
        if self.ends_head(at, following.len()) {
            self.past_head = self.within_head(at, following) == 0;
        }
        let next = &mut self.next_split[stream.index()];
        let line_start = at.of(stream).line_start;
        if line_start >= *next {
            *next = line_start + Self::mark_of(self.bytes);
        }
    }

    /// How many bytes are written before it is looked whether the run is too large.
    pub(super) fn piece(&self) -> usize {
        let piece = (self.bytes / 16).clamp(Checkpointer::EVERY_BYTES, PIECE_BYTES);
        usize::try_from(piece).unwrap_or(usize::MAX)
    }

    /// How many bytes stay of how the run began.
    pub(super) const fn head(&self) -> u64 {
        self.bytes / 4
    }

    /// Somebody else took what lies between these places, and the journal tells of it.
    pub(super) fn was_taken(&mut self, stream: Stream, begin: Place, end: Progress) {
        let taken = Taken { begin, end };
        match &mut self.middle {
            Some(middle) => middle.set(stream, &taken),
            None => self.taken[stream.index()] = Some(taken),
        }
    }

    /// How many of the bytes that come next are whole lines of the head.
    fn within_head(&self, at: &Progress, bytes: &[u8]) -> usize {
        let room = usize::try_from(self.head().saturating_sub(total(at))).unwrap_or(usize::MAX);
        whole_lines(&bytes[..room.min(bytes.len())])
    }

    /// Whether the head ends before the last of so many bytes that come next.
    const fn ends_head(&self, at: &Progress, bytes: usize) -> bool {
        !self.past_head && total(at) + bytes as u64 > self.head()
    }
}

/// Bytes of both logs.
const fn total(at: &Progress) -> u64 {
    at.streams[0].bytes + at.streams[1].bytes
}

impl Middle {
    /// What lies behind the last mark of a journal within the first so many bytes of the run.
    fn behind(head: u64, path: &Path, journal_end: u64) -> Result<Self, LogError> {
        let mut journal = JournalReader::new(ReadFile::open_when_there(path)?);
        let end = journal.last_while(journal_end, |at| total(at) <= head)?;
        let begin = end.streams.map(|at| Place { lines: at.lines, offset: at.line_start });
        Ok(Self { journal, begin, end: [end; 2] })
    }

    /// Takes what was taken for the middle of a stream: that of its head which is left stays.
    const fn set(&mut self, stream: Stream, taken: &Taken) {
        self.begin[stream.index()] = taken.begin;
        self.end[stream.index()] = taken.end;
    }

    /// The run behind the first mark with which a stream has come to `target` or farther; but no farther than `lines`.
    fn seek(
        &mut self,
        stream: Stream,
        target: u64,
        lines: u64,
        journal_end: u64,
    ) -> Result<Option<Progress>, LogError> {
        let begin = self.end[stream.index()];
        let (mut at, mut found) = (begin, None);
        while at.journal < journal_end
            && at.of(stream).line_start < target
            && let Entry::Record(record, behind) = self.journal.at(at.journal, Io::MayBlock)?
        {
            if let Record::Arrival(arrival) = record
                && !at.advance(&arrival)
            {
                break;
            }
            at.journal = behind;
            if at.of(stream).lines > lines {
                break;
            }
            if at.of(stream).line_start > begin.of(stream).line_start {
                found = Some(at);
            }
        }
        Ok(found)
    }

    /// A part of a stream that comes next, up to where the run was `to`, and what that adds. `by_others`: whether others
    /// took some of what was given up before.
    fn up_to(&self, stream: Stream, to: &Progress, by_others: bool) -> CutFurther {
        let (before, after) = (self.end[stream.index()].of(stream), to.of(stream));
        let end = Place { lines: after.lines, offset: after.line_start };
        let lost_before = after.dropped_lines - before.dropped_lines;
        CutFurther {
            cut: Cut { stream, begin: self.begin[stream.index()], end, by_others },
            lines: after.lines - before.lines - lost_before,
            bytes: after.line_start - before.line_start,
        }
    }
}

impl WriterHalf {
    /// Bytes of both logs that are kept.
    fn kept(&self) -> u64 {
        let Some(files) = &self.files else { return 0 };
        let logs: u64 = files.logs.iter().map(AppendFile::len).sum();
        logs - self.cuts.iter().map(|cut| cut.bytes()).sum::<u64>()
    }

    /// Gives something up if the run is larger than it may be.
    pub(super) fn give_up(&mut self, now: UnixMicros) -> Option<GivenUp> {
        let kept = self.kept();
        if self.cap.as_ref().is_none_or(|cap| kept <= cap.bytes.max(cap.not_below)) {
            return None;
        }
        let mut cap = self.cap.take()?;
        let given_up = self.give_up_within(&mut cap, kept, now).unwrap_or_else(|error| {
            tracing::warn!(%error, "nothing can be given up of a run that is too large");
            None
        });
        cap.not_below = match given_up {
            Some(_) => 0,
            None => cap.not_below.max(kept + RunCap::step_of(cap.bytes)),
        };
        self.cap = Some(cap);
        given_up
    }

    fn give_up_within(
        &mut self,
        cap: &mut RunCap,
        kept: u64,
        now: UnixMicros,
    ) -> Result<Option<GivenUp>, LogError> {
        self.write_marks();
        let Some(files) = self.files.as_ref().filter(|_| self.unwritten.is_empty()) else { return Ok(None) };
        let middle = match &mut cap.middle {
            Some(middle) => middle,
            none => {
                if !can_punch(&files.logs[0])? {
                    cap.not_below = u64::MAX;
                    return Ok(None);
                }
                tracing::warn!(path = %files.journal.path().display(), cap = cap.bytes, "a run has become larger than it may be; what is in its middle is given up");
                let middle = Middle::behind(cap.bytes / 4, files.journal.path(), self.written.journal)?;
                let middle = none.insert(middle);
                for (stream, taken) in Stream::BOTH.into_iter().zip(&cap.taken) {
                    taken.iter().for_each(|taken| middle.set(stream, taken));
                }
                middle
            }
        };
        let wanted = kept - cap.bytes + RunCap::step_of(cap.bytes);
        // The last line of each stream stays as long as there is anything else.
        if let Some(cut) = self.cut_further(middle, wanted, 1)? {
            return Ok(Some(GivenUp::Middle(cut)));
        }
        let unterminated = |stream: Stream| match self.holes[stream.index()] {
            None => self.progress.of(stream).unterminated(),
            Some(_) => 0,
        };
        let [out, err] = Stream::BOTH;
        let longest = if unterminated(err) > unterminated(out) { err } else { out };
        if unterminated(longest) > (cap.bytes - cap.bytes / 4) / 2 {
            self.lose_line(longest, now);
            return Ok(Some(GivenUp::Line));
        }
        Ok(self.cut_further(middle, wanted, 0)?.map(GivenUp::Middle))
    }

    /// Gives up `wanted` bytes or somewhat more of the stream that has more to give, or as much as leaves so many lines.
    /// The journal tells of it when this returns.
    fn cut_further(&mut self, middle: &mut Middle, wanted: u64, leave: u64) -> Result<Option<Cut>, LogError> {
        let ends = Stream::BOTH.map(|stream| middle.end[stream.index()].of(stream).line_start);
        let tail = |stream: Stream| self.progress.of(stream).bytes - ends[stream.index()];
        let [out, err] = Stream::BOTH;
        for stream in if tail(err) > tail(out) { [err, out] } else { [out, err] } {
            let target = ends[stream.index()] + wanted;
            let lines = self.written.of(stream).lines.saturating_sub(leave);
            let Some(to) = middle.seek(stream, target, lines, self.written.journal)? else { continue };
            let by_others = self.cuts.of(stream).is_some_and(|cut| cut.by_others);
            let further = middle.up_to(stream, &to, by_others);
            self.tell_of_cut(&further)?;
            middle.end[stream.index()] = to;
            if let Some(files) = self.files.as_ref().filter(|files| files.syncs) {
                // After a power cut, what was given up must not look like what the power cut took.
                files.journal.sync()?;
            }
            return Ok(Some(further.cut));
        }
        Ok(None)
    }

    pub(super) fn tell_of_cut(&mut self, further: &CutFurther) -> Result<(), LogError> {
        let Some(files) = &mut self.files else { return Ok(()) };
        self.written.journal = files.journal.append_cut(further)?;
        self.written.give_up(further);
        self.progress.give_up(further);
        self.cuts.take(further.cut);
        Ok(())
    }

    /// Gives the disk back what a cut covers.
    pub(super) fn punch(&self, cut: Cut) {
        let Some(files) = &self.files else { return };
        let log = &files.logs[cut.stream.index()];
        // The end of the line before what is kept stays: by it a place where a line begins is known.
        if let Err(error) = log.punch(cut.begin.offset..cut.end.offset - 1) {
            // It is tried again with the next cut, which covers this one, and at the end.
            tracing::warn!(%error, "what is given up of a log stays on the disk for now");
        }
    }

    /// Gives the disk back what is given up, if it could not be given back before; the journal has to tell of it first.
    pub(super) fn punch_what_is_told(&self) {
        let Some(files) = self.files.as_ref().filter(|_| self.cuts.iter().next().is_some()) else { return };
        match if files.syncs { files.journal.sync() } else { Ok(()) } {
            Ok(()) => self.cuts.iter().for_each(|cut| self.punch(cut)),
            Err(error) => tracing::warn!(%error, "what is given up of a log stays on the disk"),
        }
    }

    /// Loses the line that a stream is in the middle of.
    fn lose_line(&mut self, stream: Stream, now: UnixMicros) {
        let unterminated = self.progress.of(stream).unterminated();
        tracing::warn!(%stream, bytes = unterminated, "a line is too long for what its run may keep");
        let hole = Hole { reason: GapReason::RunSizeCap, ..Hole::new(unterminated, now) };
        self.holes[stream.index()] = Some(hole);
        self.cut_to_line_start(stream);
    }
}

/// Whether the file system can free the middle of a file.
fn can_punch(log: &AppendFile) -> Result<bool, LogError> {
    static SAID: Once = Once::new();
    // Nothing is there.
    let behind = log.len() + (1 << 30);
    let can = log.punch(behind..behind + 1)?;
    if !can {
        SAID.call_once(|| {
            tracing::warn!(path = %log.path().display(), "the file system can't free the middle of a file: logs stay whole, however large a run becomes");
        });
    }
    Ok(can)
}
