//! How far a run has come after each record of its journal, and which of these places are kept as checkpoints.
//!
//! A writer and whoever replays its journal go through the same two types, so an index rebuilt from journals is
//! the index that was.

use std::cmp::Reverse;

use memchr::memchr;

use crate::journal::{Arrival, Cut, CutFurther, Place, What};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::meter::Appends;
use crate::run::{Gap, StreamTotals};

/// How far one stream has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamProgress {
    /// Bytes in the log file.
    pub(crate) bytes: u64,
    /// Lines that have ended, those that could not be kept included.
    pub(crate) lines: u64,
    /// Where in the file the line behind them begins.
    pub(crate) line_start: u64,
    /// Bytes that could not be kept.
    pub(crate) dropped_bytes: u64,
    /// Lines that could not be kept.
    pub(crate) dropped_lines: u64,
}

impl StreamProgress {
    /// Bytes behind the last `\n`.
    pub(crate) const fn unterminated(&self) -> u64 {
        self.bytes - self.line_start
    }

    /// What the stream holds; an unterminated last line counts.
    pub(crate) const fn totals(&self) -> StreamTotals {
        StreamTotals {
            bytes: self.bytes,
            lines: self.lines.saturating_add((self.unterminated() > 0) as u64),
            dropped_bytes: self.dropped_bytes,
            dropped_lines: self.dropped_lines,
        }
    }
}

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// When the last record was written.
    pub(crate) time: UnixMicros,
    /// Where the journal goes on behind it.
    pub(crate) journal: u64,
    /// Both streams, by [`Stream::index`].
    pub(crate) streams: [StreamProgress; 2],
}

impl Progress {
    /// A run that has printed nothing.
    pub(crate) fn start(time: UnixMicros, journal: u64) -> Self {
        Self { time, journal, ..Self::default() }
    }

    pub(crate) const fn of(&self, stream: Stream) -> &StreamProgress {
        &self.streams[stream.index()]
    }

    /// Lines of both streams that have ended: the position in [`View::All`](crate::View::All).
    pub(crate) const fn lines(&self) -> u64 {
        self.streams[0].lines.saturating_add(self.streams[1].lines)
    }

    /// Counts what came in since this.
    pub(crate) fn count_since(&self, before: &Self, appends: &Appends) {
        for (now, before) in self.streams.iter().zip(&before.streams) {
            if now != before {
                appends.count(
                    now.bytes.saturating_sub(before.bytes),
                    now.lines.saturating_sub(before.lines),
                    now.dropped_bytes.saturating_sub(before.dropped_bytes),
                );
            }
        }
    }

    /// Takes in what happened next. `journal` is left to whoever knows the record's length.
    ///
    /// An arrival that contradicts what came before (an unterminated part longer than the stream) changes nothing
    /// and gives `false`.
    pub(crate) fn advance(&mut self, arrival: &Arrival) -> bool {
        let stream = &mut self.streams[arrival.stream.index()];
        match arrival.what {
            What::Mark { unterminated } => {
                let bytes = stream.bytes.saturating_add(arrival.bytes);
                let Some(line_start) = bytes.checked_sub(unterminated).filter(|&at| at >= stream.line_start)
                else {
                    return false;
                };
                stream.bytes = bytes;
                stream.line_start = line_start;
            }
            What::Gap(_) => {
                stream.bytes = stream.line_start;
                stream.dropped_bytes = stream.dropped_bytes.saturating_add(arrival.bytes);
                stream.dropped_lines = stream.dropped_lines.saturating_add(arrival.lines);
            }
        }
        stream.lines = stream.lines.saturating_add(arrival.lines);
        self.time = UnixMicros(self.time.0.saturating_add(arrival.after_micros));
        true
    }
}

/// The most holes of a run that are kept in memory and in the index: the first ones. A disk that is full on and off for
/// days leaves more of them; who reads such a run goes by its journal, which has them all.
pub(crate) const MAX_GAPS: usize = 1024;

impl Progress {
    /// Takes in what is given up of a log. A cut that contradicts what came before (it takes what is not there) changes
    /// nothing and gives `false`.
    pub(crate) const fn give_up(&mut self, further: &CutFurther) -> bool {
        let CutFurther { cut, lines, bytes } = further;
        let stream = &mut self.streams[cut.stream.index()];
        if cut.end.offset > stream.line_start || cut.end.lines > stream.lines {
            return false;
        }
        stream.dropped_bytes = stream.dropped_bytes.saturating_add(*bytes);
        stream.dropped_lines = stream.dropped_lines.saturating_add(*lines);
        true
    }
}

/// What is given up of the logs of a run: of each stream one part at most, whose end only ever moves on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cuts([Option<Cut>; 2]);

impl Cuts {
    pub(crate) const fn of(&self, stream: Stream) -> Option<Cut> {
        self.0[stream.index()]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Cut> {
        self.0.into_iter().flatten()
    }

    /// Takes in a cut; one that is known to cover more stays.
    pub(crate) fn take(&mut self, cut: Cut) {
        let known = &mut self.0[cut.stream.index()];
        let reach = |cut: &Cut| (cut.end.offset, Reverse(cut.begin.offset));
        if known.as_ref().is_none_or(|known| reach(known) < reach(&cut)) {
            *known = Some(cut);
        }
    }

    /// Takes in all that another knows.
    pub(crate) fn take_all(&mut self, others: &Self) {
        others.iter().for_each(|cut| self.take(cut));
    }
}

/// A hole, and where in the log file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GapAt {
    pub(crate) gap: Gap,
    pub(crate) offset: u64,
}

/// What a reader that has come to `from` is told of a cut which covers that place, given all holes of its stream: those
/// that are left of the cut are part of it.
pub(crate) fn gap_of_cut(cut: &Cut, from: Place, gaps: &[GapAt]) -> Gap {
    let (after, end) = (LineNumber(from.lines), cut.end.lines);
    let within = |at: &&GapAt| after <= at.gap.after && at.gap.after.plus(at.gap.lines).0 <= end;
    let of_log = cut.end.offset.saturating_sub(from.offset);
    let bytes = gaps.iter().filter(within).fold(of_log, |sum, at| sum.saturating_add(at.gap.bytes));
    Gap {
        stream: cut.stream,
        after,
        // The index is believed to be sound only until its files say something else.
        lines: end.saturating_sub(from.lines),
        bytes,
        reason: cut.reason(),
    }
}

/// A line whose place in its log file is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineCheckpoint {
    pub(crate) stream: Stream,
    /// Lines before the place.
    pub(crate) line: u64,
    /// Where the line behind them begins.
    pub(crate) offset: u64,
    /// When it was written.
    pub(crate) time: UnixMicros,
}

/// Decides which places are kept: in each stream the first line that starts 64 KiB or more behind the last one
/// kept, and of the run as a whole every 1,024th record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checkpointer {
    next_offset: [u64; 2],
    records: u32,
}

/// What a [`Checkpointer`] found worth keeping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checkpoints {
    pub(crate) line: Option<LineCheckpoint>,
    pub(crate) progress: Option<Progress>,
}

impl Checkpoints {
    pub(crate) const fn is_some(&self) -> bool {
        self.line.is_some() || self.progress.is_some()
    }
}

impl Checkpointer {
    /// The most bytes between a line and the checkpoint before it, but for one line.
    pub(crate) const EVERY_BYTES: u64 = 64 * 1024;
    const EVERY_RECORDS: u32 = 1024;

    pub(crate) const fn new() -> Self {
        Self { next_offset: [Self::EVERY_BYTES; 2], records: 0 }
    }

    /// One that goes on right behind a kept place of the run as a whole, and behind the last kept line of each stream
    /// before it.
    pub(crate) const fn behind_a_place(next_offset: [u64; 2]) -> Self {
        Self { next_offset, records: 0 }
    }

    /// The first place in a log file at which a line that starts there would be kept. A writer ends a mark just
    /// before the first such line, so that the place is known from the journal alone.
    pub(crate) const fn next_offset(&self, stream: Stream) -> u64 {
        self.next_offset[stream.index()]
    }

    /// How many of the bytes that stand at `offset` of a log belong together: those before the first line that would
    /// be kept, or all of them.
    pub(crate) fn piece(&self, stream: Stream, offset: u64, bytes: &[u8]) -> usize {
        before_line_at(self.next_offset(stream), offset, bytes).unwrap_or(bytes.len())
    }

    /// Looks at the progress after a record of `stream`.
    pub(crate) fn after(&mut self, stream: Stream, progress: &Progress) -> Checkpoints {
        let mut found = Checkpoints::default();
        let at = progress.of(stream);
        let next = &mut self.next_offset[stream.index()];
        if at.line_start >= *next {
            *next = at.line_start.saturating_add(Self::EVERY_BYTES);
            found.line =
                Some(LineCheckpoint { stream, line: at.lines, offset: at.line_start, time: progress.time });
        }
        self.records += 1;
        if self.records == Self::EVERY_RECORDS {
            self.records = 0;
            found.progress = Some(*progress);
        }
        found
    }
}

/// How many of the bytes that stand at `offset` of a log come before the first line that starts at `place` or behind
/// it; `None` if no line starts there in them.
pub(crate) fn before_line_at(place: u64, offset: u64, bytes: &[u8]) -> Option<usize> {
    // A line that starts at `place` has its `\n` before it one byte earlier.
    let from = usize::try_from((place - 1).saturating_sub(offset)).unwrap_or(usize::MAX);
    let end = memchr(b'\n', bytes.get(from..)?)?;
    Some(from + end + 1)
}

/// From where a run is followed on without looking at what came before.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Resume {
    /// When the run started: a journal that says otherwise is another one.
    pub(crate) started_at: UnixMicros,
    pub(crate) progress: Progress,
    pub(crate) checkpointer: Checkpointer,
    /// The holes before it.
    pub(crate) gaps: Vec<GapAt>,
    /// What is given up, by now or later.
    pub(crate) cuts: Cuts,
}
