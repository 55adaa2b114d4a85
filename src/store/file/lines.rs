//! Whole lines out of a log file, from any place on, however long they are.

use std::sync::Arc;

use bytes::Bytes;
use memchr::memchr;

use crate::error::LogError;
use crate::index::progress::{GapAt, gap_of_cut};
use crate::journal::{Cut, Place};
use crate::line::Stream;
use crate::logfile::{Fetched, Io, ReadFile, Sound, count_lines, end_of_line, whole_lines};
use crate::run::Gap;
use crate::store::file::cuts::{CutWatch, Look};
use crate::store::{Batch, CutLine};

/// Where lines are passed over, or few are wanted, so much is read at a time: most of what is read in vain is what costs a
/// seek in a large log its time, since it comes from memory and not from a cache.
pub(crate) const LITTLE_BYTES: usize = 16 * 1024;
/// So many lines are few.
const FEW_LINES: u64 = 128;

/// A place in one stream and the log file that it is in.
#[derive(Debug)]
pub(crate) struct LineReader {
    stream: Stream,
    file: ReadFile,
    cuts: Option<Arc<CutWatch>>,
    /// What others took, as far as the file that is open is known to be the one in which the writer went on.
    taken: Option<Cut>,
    /// Lines before the place.
    line: u64,
    /// Where the line behind them begins.
    offset: u64,
    /// Up to where there is no `\n` from `offset` on.
    scanned: u64,
    /// Lines that are passed over before the first one is given.
    skip: u64,
    chunk: Bytes,
    chunk_offset: u64,
    chunk_bytes: usize,
}

/// How far a reader may go at this moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reach<'a> {
    /// At most so many lines.
    pub(crate) lines: u64,
    /// Nothing at or behind this byte.
    pub(crate) end: u64,
    /// Whether the line that is cut off by `end` is a whole one: the stream has ended there.
    pub(crate) ended: bool,
    /// All holes of the stream, in order.
    pub(crate) gaps: &'a [GapAt],
}

/// What a reader found.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Whole lines; times and positions are left to the caller.
    Lines(Batch),
    /// A hole; the reader is behind it now.
    Gap(Gap),
    /// What is given up of the log from here on, holes in it included; the reader is behind it now.
    Cut(Gap),
    /// No whole line within reach.
    Nothing,
    /// The file ends before the reach does. The reader stays where it is.
    Missing,
    /// What comes next can't be read up to this place: lines before it, and its byte. The reader stays where it is.
    Damaged(u64, u64),
    /// Not in the page cache.
    WouldBlock,
}

impl LineReader {
    /// A reader at `offset`, where a line begins that has `line` lines before it.
    pub(crate) const fn new(
        stream: Stream,
        file: ReadFile,
        (line, offset): (u64, u64),
        chunk_bytes: usize,
    ) -> Self {
        Self {
            stream,
            file,
            cuts: None,
            taken: None,
            line,
            offset,
            scanned: offset,
            skip: 0,
            chunk: Bytes::new(),
            chunk_offset: 0,
            chunk_bytes,
        }
    }

    /// The same reader of a log of which something may be given up.
    pub(crate) fn beside(mut self, cuts: Arc<CutWatch>) -> Self {
        self.cuts = Some(cuts);
        self
    }

    /// Lines before the next one that will be given.
    pub(crate) const fn line(&self) -> u64 {
        self.line + self.skip
    }

    /// Where the reader is in the file; lines that are still to be skipped lie behind it.
    pub(crate) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Where the next line that will be given begins, if the reader has come so far: lines before, and bytes.
    pub(crate) fn place(&self) -> Option<Place> {
        (self.skip == 0).then_some(Place { lines: self.line, offset: self.offset })
    }

    /// Up to where the file was searched for the end of the line that comes next.
    pub(crate) const fn searched(&self) -> u64 {
        self.scanned
    }

    /// Passes over all lines up to `line`, the number of lines before the next one that will be given.
    pub(crate) const fn skip_to(&mut self, line: u64) {
        self.skip = line.saturating_sub(self.line);
    }

    /// Goes to another place.
    pub(crate) fn jump(&mut self, line: u64, offset: u64) {
        self.line = line;
        self.offset = offset;
        self.skip = 0;
        self.look_again();
    }

    /// Goes to a place behind lines that can't be read, to give the same line next as before.
    pub(crate) fn pass_over(&mut self, line: u64, offset: u64) {
        let next = self.line();
        self.jump(line, offset);
        self.skip_to(next);
    }

    /// Forgets what was read of the line that comes next: where there is a hole, it was cut off, and another line
    /// is in its place.
    fn look_again(&mut self) {
        self.scanned = self.offset;
        self.chunk = Bytes::new();
    }

    /// The next lines within reach.
    pub(crate) fn next(&mut self, reach: Reach<'_>, io: Io) -> Result<Taken, LogError> {
        loop {
            if reach.lines == 0 && self.skip == 0 {
                return Ok(Taken::Nothing);
            }
            let cut = self.cuts.as_ref().and_then(|cuts| cuts.known(self.stream));
            if let Some(cut) = cut.filter(|cut| cut.by_others && self.taken != Some(*cut)) {
                if self.file.follow_name()? {
                    self.look_again();
                }
                self.taken = Some(cut);
            }
            if let Some(cut) = cut.filter(|cut| cut.covers(self.offset)) {
                let gap = gap_of_cut(&cut, Place { lines: self.line, offset: self.offset }, reach.gaps);
                self.offset = cut.end.offset;
                match self.cross(gap) {
                    Some(gap) => return Ok(Taken::Cut(gap)),
                    None => continue,
                }
            }
            // Both only rise from hole to hole.
            let passed =
                reach.gaps.partition_point(|at| at.gap.after.0 < self.line || at.offset < self.offset);
            let ahead = reach.gaps.get(passed);
            if let Some(at) = ahead.filter(|at| at.offset == self.offset && at.gap.after.0 == self.line) {
                if let Some(gap) = self.cross(at.gap) {
                    return Ok(Taken::Gap(gap));
                }
                continue;
            }
            let end = ahead.map_or(reach.end, |at| at.offset.min(reach.end));
            let end =
                cut.filter(|cut| self.offset < cut.begin.offset).map_or(end, |cut| end.min(cut.begin.offset));
            if self.scanned >= end {
                if reach.ended && self.offset < end {
                    let Some(taken) = self.take_line(end, end, io)? else { continue };
                    return Ok(taken);
                }
                return Ok(Taken::Nothing);
            }
            match self.fill(reach.lines, end, io)? {
                Filled::Ready => {}
                Filled::Missing => return Ok(Taken::Missing),
                Filled::GivenUp => {
                    self.look_again();
                    continue;
                }
                Filled::Damaged(sound) => return Ok(self.damaged(sound, reach.gaps, passed, cut)),
                Filled::WouldBlock => return Ok(Taken::WouldBlock),
            }
            if let Some(taken) = self.take(reach.lines, end, io)? {
                return Ok(taken);
            }
        }
    }

    /// Goes behind a hole; nothing to tell if all of it is skipped. What was read from there on is forgotten: it can
    /// be the beginning of a line that was cut off when the hole began.
    fn cross(&mut self, gap: Gap) -> Option<Gap> {
        self.look_again();
        self.line += gap.lines;
        if self.skip >= gap.lines && gap.lines > 0 {
            self.skip -= gap.lines;
            return None;
        }
        self.skip = 0;
        Some(gap)
    }

    /// Sees to it that the chunk holds bytes from `scanned` on, of which at most so many lines are wanted.
    fn fill(&mut self, lines: u64, end: u64, io: Io) -> Result<Filled, LogError> {
        let chunk_end = self.chunk_offset + self.chunk.len() as u64;
        let held = self.chunk_offset <= self.scanned && self.scanned < chunk_end;
        // What is left of a chunk is worth looking at only if a line ends in it, or if nothing lies behind it.
        if held && (chunk_end >= end || memchr(b'\n', self.rest_of_chunk(end)).is_some()) {
            return Ok(Filled::Ready);
        }
        let is_little = self.skip > 0 || lines <= FEW_LINES;
        let chunk_bytes = if is_little { self.chunk_bytes.min(LITTLE_BYTES) } else { self.chunk_bytes };
        let length = usize::try_from(end - self.scanned).unwrap_or(usize::MAX).min(chunk_bytes);
        match self.read(self.scanned, length, io)? {
            // Somebody may have deleted or replaced the log, and its writer made it anew.
            Read::Bytes(bytes) if bytes.is_empty() && io == Io::MayBlock && self.file.follow_name()? => {
                self.fill(lines, end, io)
            }
            Read::Bytes(bytes) if bytes.is_empty() => Ok(Filled::Missing),
            Read::Bytes(bytes) => {
                self.chunk = bytes;
                self.chunk_offset = self.scanned;
                Ok(Filled::Ready)
            }
            Read::GivenUp => Ok(Filled::GivenUp),
            Read::WouldBlock => Ok(Filled::WouldBlock),
            Read::Damaged(sound) => Ok(Filled::Damaged(sound)),
        }
    }

    /// Reads bytes that are what was written. Zeros among them can mean that they were given up just now.
    fn read(&mut self, offset: u64, length: usize, io: Io) -> Result<Read, LogError> {
        let bytes = match self.file.read(offset, length, io)? {
            Fetched::Bytes(bytes) => bytes,
            Fetched::WouldBlock => return Ok(Read::WouldBlock),
            Fetched::Damaged(sound) => return Ok(Read::Damaged(sound)),
        };
        let Some(cuts) = self.cuts.as_ref().filter(|_| memchr(0, &bytes).is_some()) else {
            return Ok(Read::Bytes(bytes));
        };
        let end = offset + bytes.len() as u64;
        Ok(match cuts.look(self.stream, io)? {
            Look::WouldBlock => Read::WouldBlock,
            Look::Known(Some(cut)) if offset < cut.end.offset && cut.begin.offset < end => Read::GivenUp,
            Look::Known(_) => Read::Bytes(bytes),
        })
    }

    /// How far what is damaged reaches: to the next hole or to what is given up, which say how many lines lie before
    /// them, or else to where the file can be read again.
    fn damaged(&self, sound: Sound, gaps: &[GapAt], passed: usize, cut: Option<Cut>) -> Taken {
        let lost = gaps[..passed].iter().fold(0u64, |sum, at| sum.saturating_add(at.gap.lines));
        let hole = gaps.get(passed).map(|at| Place { lines: at.gap.after.0, offset: at.offset });
        let given_up = cut.map(|cut| cut.begin).filter(|begin| self.offset < begin.offset);
        let known = hole.into_iter().chain(given_up).min_by_key(|place| place.offset);
        let Place { lines, offset } = match known.filter(|place| place.offset <= sound.offset) {
            Some(place) => place,
            None => {
                let passed_cut = cut.filter(|cut| cut.end.offset <= self.offset);
                let given_up = passed_cut.map_or(0, |cut| lines_not_in_log(&cut, &gaps[..passed]));
                let lines = sound.lines.saturating_add(lost).saturating_add(given_up);
                Place { lines, offset: sound.offset }
            }
        };
        // A table that tells something else than the journal is of no use.
        if lines < self.line || offset <= self.offset {
            Taken::Missing
        } else {
            Taken::Damaged(lines, offset)
        }
    }

    fn rest_of_chunk(&self, end: u64) -> &[u8] {
        let from = usize::try_from(self.scanned - self.chunk_offset).unwrap_or(usize::MAX);
        let to = usize::try_from(end - self.chunk_offset).unwrap_or(usize::MAX).min(self.chunk.len());
        &self.chunk[from..to]
    }

    /// Takes what the chunk has from `scanned` on; `None` if there is nothing to give yet.
    fn take(&mut self, limit: u64, end: u64, io: Io) -> Result<Option<Taken>, LogError> {
        let rest = self.rest_of_chunk(end);
        let whole = whole_lines(rest);
        if whole == 0 {
            self.scanned += rest.len() as u64;
            return Ok(None);
        }
        if self.scanned > self.offset {
            let first = memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
            let line_end = self.scanned + first as u64;
            return self.take_line(line_end, line_end - 1, io);
        }
        if self.skip > 0 {
            let (length, lines) = match end_of_line(&rest[..whole], self.skip) {
                Ok(length) => (length, self.skip),
                Err(lines) => (whole, lines),
            };
            self.skip -= lines;
            self.pass(length as u64, lines);
            return Ok(None);
        }
        let (length, lines) = match count_lines(&rest[..whole]) {
            lines if lines <= limit => (whole, lines),
            _ => (end_of_line(&rest[..whole], limit).unwrap_or(whole), limit),
        };
        let from = usize::try_from(self.scanned - self.chunk_offset).unwrap_or(usize::MAX);
        let batch = self.batch(self.chunk.slice(from..from + length), lines, None);
        self.pass(length as u64, lines);
        Ok(Some(Taken::Lines(batch)))
    }

    /// Takes the one line that ends before `line_end`, its text before `text_end`.
    fn take_line(&mut self, line_end: u64, text_end: u64, io: Io) -> Result<Option<Taken>, LogError> {
        if self.skip > 0 {
            self.skip -= 1;
            self.pass(line_end - self.offset, 1);
            return Ok(None);
        }
        let text_bytes = text_end - self.offset;
        let (length, cut) = if text_bytes > Batch::MAX_LINE_BYTES as u64 {
            (Batch::MAX_LINE_BYTES, Some(CutLine { full_bytes: text_bytes }))
        } else {
            (usize::try_from(line_end - self.offset).unwrap_or(usize::MAX), None)
        };
        let bytes = match self.read(self.offset, length, io)? {
            Read::Bytes(bytes) if bytes.len() == length => bytes,
            Read::Bytes(_) | Read::Damaged(_) if io == Io::MayBlock => return Ok(Some(Taken::Missing)),
            Read::Bytes(_) | Read::Damaged(_) | Read::WouldBlock => return Ok(Some(Taken::WouldBlock)),
            Read::GivenUp => {
                self.look_again();
                return Ok(None);
            }
        };
        let batch = self.batch(bytes, 1, cut);
        self.pass(line_end - self.offset, 1);
        Ok(Some(Taken::Lines(batch)))
    }

    const fn pass(&mut self, bytes: u64, lines: u64) {
        self.offset += bytes;
        self.line += lines;
        self.scanned = self.offset;
    }

    fn batch(&self, bytes: Bytes, lines: u64, cut: Option<CutLine>) -> Batch {
        let first = crate::line::LineNumber(self.line + 1);
        Batch {
            stream: self.stream,
            first_line: first,
            first_position: first,
            lines,
            bytes,
            times: Vec::new(),
            cut,
        }
    }
}

/// How many more lines a cut is of than its log still has of it, given the holes before its end. What is given up is zeros
/// and the end of its last line; the lines of the holes are counted with those of others.
fn lines_not_in_log(cut: &Cut, gaps: &[GapAt]) -> u64 {
    let within = |at: &&GapAt| cut.begin.lines <= at.gap.after.0 && at.gap.after.0 < cut.end.lines;
    let lost_before = gaps.iter().filter(within).fold(1u64, |sum, at| sum.saturating_add(at.gap.lines));
    cut.lines().saturating_sub(lost_before)
}

enum Filled {
    Ready,
    Missing,
    GivenUp,
    Damaged(Sound),
    WouldBlock,
}

enum Read {
    Bytes(Bytes),
    GivenUp,
    Damaged(Sound),
    WouldBlock,
}

#[cfg(test)]
mod tests;
