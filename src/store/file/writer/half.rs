//! What arrives for a run: counted, gathered into marks, and brought to its log and its journal in this order.

use std::collections::VecDeque;
use std::io;
use std::sync::Weak;

use memchr::memchr;

use super::cap::RunCap;
use super::changed::Looked;
use super::files::Files;
use super::hole::Hole;
use crate::error::LogError;
use crate::index::progress::{Checkpointer, Checkpoints, Cuts, GapAt, Progress, before_line_at};
use crate::journal::{Arrival, What};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::logfile::{count_lines, whole_lines};
use crate::meter::Appends;
use crate::run::Gap;
use crate::store::file::shared::Shared;

/// Batches of a stream that arrive within this many microseconds share a mark.
pub(super) const MERGE_MICROS: u64 = 1_000;
/// The most records that wait for a journal which can't be written; beyond that, output is lost as on a full disk. So
/// many find room behind the journal when the run ends.
const MAX_UNWRITTEN: usize = 256;

/// What only one thread at a time does: it appends.
#[derive(Debug)]
pub(super) struct WriterHalf {
    /// `None` once the run is over.
    pub(super) files: Option<Files>,
    /// Everything that arrived, whether the journal has it or not.
    pub(super) progress: Progress,
    /// What the journal has.
    pub(super) written: Progress,
    checkpointer: Checkpointer,
    /// Where marks end next, by stream: just before the first line that starts there or behind.
    next_split: [u64; 2],
    /// The last mark, while it can still grow.
    pub(super) open: Option<OpenMark>,
    pub(super) unwritten: VecDeque<Arrival>,
    last_write: UnixMicros,
    /// When each log was looked at last.
    pub(super) looked: [Looked; 2],
    pub(super) holes: [Option<Hole>; 2],
    /// Holes that were closed and not published yet.
    pub(super) gaps: Vec<GapAt>,
    pub(super) cuts: Cuts,
    pub(super) cap: Option<RunCap>,
    pub(super) found: Vec<Checkpoints>,
    /// Whether to keep checkpoints for an index.
    indexed: bool,
    pub(super) appends: Appends,
    /// Who can make room on a full disk.
    pub(super) rescue: Weak<Shared>,
}

/// The last mark, to which more of its stream is added for a moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenMark {
    pub(super) arrival: Arrival,
    /// When it was opened, by the clock.
    opened: UnixMicros,
}

impl WriterHalf {
    pub(super) fn new(files: Files, progress: Progress, checkpointer: Checkpointer, indexed: bool) -> Self {
        Self {
            files: Some(files),
            progress,
            written: progress,
            next_split: Stream::BOTH.map(|stream| checkpointer.next_offset(stream)),
            checkpointer,
            open: None,
            unwritten: VecDeque::new(),
            last_write: UnixMicros::default(),
            looked: [Looked::default(); 2],
            holes: [None; 2],
            gaps: Vec::new(),
            cuts: Cuts::default(),
            cap: None,
            found: Vec::new(),
            indexed,
            appends: Appends::new(),
            rescue: Weak::new(),
        }
    }

    /// Bytes of each log that may be read: while a hole is open, what stands behind the last whole line is lost.
    pub(super) fn visible(&self) -> [u64; 2] {
        Stream::BOTH.map(|stream| {
            let at = self.progress.of(stream);
            if self.holes[stream.index()].is_some() { at.line_start } else { at.bytes }
        })
    }

    pub(super) fn mark_waits(&self) -> bool {
        self.open.is_some() || !self.unwritten.is_empty()
    }

    pub(super) fn append(&mut self, stream: Stream, bytes: &[u8], now: UnixMicros) -> Result<(), LogError> {
        if self.holes[stream.index()].is_none()
            && let Err(error) = self.look_if_due(stream, now)
        {
            self.open_hole(stream, bytes, now, &error);
            return Err(error);
        }
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
            log.begin_write_back(self.cuts.of(stream).map_or(0, |cut| cut.end.offset));
            self.arrived(stream, bytes, now);
            return Ok(());
        };
        // Only whole lines stay, unless somebody else is at the log: a hole begins and ends where a line does.
        let written = usize::try_from(log.len() - before).unwrap_or(usize::MAX);
        let is_changed = matches!(log.changed(), Ok(Some(_)));
        let kept = if is_changed { written } else { whole_lines(&bytes[..written]) };
        if kept > 0 {
            self.arrived(stream, &bytes[..kept], now);
        }
        if is_changed && self.look(stream, now).is_ok() {
            return self.append(stream, &bytes[kept..], now);
        }
        self.open_hole(stream, &bytes[kept..], now, &error);
        Err(error)
    }

    /// Loses the line that a stream is in the middle of, and these bytes.
    fn open_hole(&mut self, stream: Stream, bytes: &[u8], now: UnixMicros, error: &LogError) {
        let mut hole = Hole::new(self.progress.of(stream).unterminated(), now);
        hole.swallow(bytes);
        tracing::warn!(%error, %stream, "output can't be kept; the hole is counted until it can");
        self.holes[stream.index()] = Some(hole);
        self.cut_to_line_start(stream);
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
        log.len() == length || matches!(log.changed(), Ok(None)) && log.cut(length).is_ok()
    }

    /// Whether so many bytes may be tried at all: the disk has more than it is to keep free, and the journal can
    /// take what is told to it.
    fn has_room(&mut self, stream: Stream, bytes: usize, now: UnixMicros) -> bool {
        let Some(files) = &mut self.files else { return false };
        self.unwritten.len() < MAX_UNWRITTEN
            && !files.floor.is_reached(&files.logs[stream.index()], bytes, now)
    }

    /// Cuts off what stands behind the last whole line that was kept.
    pub(super) fn cut_to_line_start(&mut self, stream: Stream) -> bool {
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
            && self.look(stream, now).is_ok()
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
    pub(super) fn close_holes(&mut self) {
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
    pub(super) fn arrived(&mut self, stream: Stream, mut bytes: &[u8], now: UnixMicros) {
        while !bytes.is_empty() {
            let at = *self.progress.of(stream);
            let checkpoint = before_line_at(self.next_split[stream.index()], at.bytes, bytes);
            let of_cap = self.cap.as_ref().and_then(|cap| cap.split(stream, &self.progress, bytes));
            let split = checkpoint.into_iter().chain(of_cap).min();
            let (piece, rest) = bytes.split_at(split.unwrap_or(bytes.len()));
            let lines = count_lines(piece);
            let unterminated = match lines {
                0 => at.unterminated() + piece.len() as u64,
                _ => (piece.len() - whole_lines(piece)) as u64,
            };
            if !piece.is_empty() {
                self.mark(stream, lines, piece.len() as u64, unterminated, now);
            }
            if split.is_some() {
                self.seal_open_mark();
                let line_start = self.progress.of(stream).line_start;
                let next = &mut self.next_split[stream.index()];
                if line_start >= *next {
                    *next = line_start + Checkpointer::EVERY_BYTES;
                }
                if let Some(cap) = &mut self.cap {
                    cap.has_split(stream, &self.progress, rest);
                }
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
    pub(super) fn write_marks_if_due(&mut self, now: UnixMicros) {
        let since = now.0.saturating_sub(self.last_write.0);
        if since >= MERGE_MICROS || now < self.last_write || self.unwritten.len() >= 64 {
            self.last_write = now;
            self.write_marks();
        }
    }

    pub(super) fn write_marks(&mut self) {
        self.write_marks_or_wait(false);
    }

    /// The last marks of a run may use the room that is kept for its end.
    pub(super) fn write_last_marks(&mut self) {
        self.write_marks_or_wait(true);
    }

    fn write_marks_or_wait(&mut self, last: bool) {
        if let Err(error) = self.try_to_write_marks(last) {
            tracing::debug!(%error, "arrivals wait for the journal");
        }
    }

    /// Writes all marks to the journal, or none of them.
    pub(super) fn try_to_write_marks(&mut self, last: bool) -> Result<(), LogError> {
        self.seal_open_mark();
        if self.unwritten.is_empty() {
            return Ok(());
        }
        let Some(files) = &mut self.files else { return Ok(()) };
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
        files.journal.append_arrivals(self.unwritten.make_contiguous(), last, note)?;
        self.unwritten.clear();
        Ok(())
    }
}
