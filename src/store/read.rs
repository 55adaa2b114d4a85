//! What a reader asks for and what it gets.

use bytes::Bytes;
use futures_util::stream::BoxStream;
use memchr::memchr;

use crate::error::LogError;
use crate::line::{LineNumber, Stream, UnixMicros, View};
use crate::run::{Gap, JobMetadata, Tombstone};

/// The events of a read, in order; the last one is a [`ReadEvent::End`] or an error.
pub type ReadStream = BoxStream<'static, Result<ReadEvent, LogError>>;

/// What to read of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// One stream or both.
    pub view: View,
    /// Where to start.
    pub start: Start,
    /// End after this many lines.
    pub limit: Option<u64>,
    /// Go on with new lines until the run ends, and wait for a run that does not exist yet.
    pub follow: bool,
    /// Tell when each line arrived. [`View::All`] always does.
    pub times: bool,
    /// The most bytes of text in one batch; a line longer than that still comes whole, up to
    /// [`Batch::MAX_LINE_BYTES`].
    pub batch_bytes: usize,
}

impl ReadOptions {
    /// The whole of what is there now.
    #[must_use]
    pub const fn new(view: View) -> Self {
        Self {
            view,
            start: Start::After(LineNumber::START),
            limit: None,
            follow: false,
            times: false,
            batch_bytes: 64 * 1024,
        }
    }
}

/// Where a read starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Behind this line.
    After(LineNumber),
    /// With the last `count` lines that are there now, but behind `after`.
    LastLines {
        /// How many lines of the backlog at most.
        count: u64,
        /// Never start before the line behind this one.
        after: LineNumber,
    },
    /// With the first line that arrived at this moment or later.
    Since(UnixMicros),
}

/// One event of a read.
#[derive(Clone, Debug, PartialEq)]
pub enum ReadEvent {
    /// Lines of one stream.
    Lines(Batch),
    /// Lines that could not be kept.
    Gap {
        /// The hole; [`Gap::after`] counts in the gap's own stream.
        gap: Gap,
        /// The position behind the hole in the view that is read. Where the holes of both streams came by turns, no
        /// place lies between them: they are told one after the other, and the last has the position behind both.
        next: LineNumber,
    },
    /// Nothing comes after this.
    End(ReadEnd),
}

/// Why a read ended.
#[derive(Clone, Debug, PartialEq)]
pub enum ReadEnd {
    /// The run is over, and every line up to the limit was given.
    Complete(Box<JobMetadata>),
    /// The run goes on, but the read does not follow, or its limit is reached.
    Running {
        /// The position behind the last line given: where another read would go on.
        next: LineNumber,
    },
    /// The run was evicted while it was being read.
    Evicted(Box<Tombstone>),
    /// The store is being closed; another read will find the run again.
    Shutdown,
}

/// Consecutive whole lines of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The stream that the lines are of.
    pub stream: Stream,
    /// The number of the first line in its stream.
    pub first_line: LineNumber,
    /// The number of the first line in the view that is read; the same as `first_line` unless that is
    /// [`View::All`].
    pub first_position: LineNumber,
    /// How many lines there are; at least one.
    pub lines: u64,
    /// The text: every line with its `\n`, except a last one that has none in the log, or that was cut.
    pub bytes: Bytes,
    /// When the lines arrived, if that was asked for: each entry holds from its line on, until the next entry.
    pub times: Vec<LineTime>,
    /// Set when the batch is a single line that was too long to be given whole.
    pub cut: Option<CutLine>,
}

impl Batch {
    /// The longest line that is given whole, in bytes: 1 MiB.
    pub const MAX_LINE_BYTES: usize = 1024 * 1024;

    /// The position of the last line of the batch in the view.
    #[must_use]
    pub const fn last_position(&self) -> LineNumber {
        self.first_position.plus(self.lines - 1)
    }

    /// The lines one by one.
    #[must_use]
    pub fn lines(&self) -> Lines<'_> {
        Lines { batch: self, rest: &self.bytes, index: 0, times: self.times.iter().as_slice() }
    }
}

/// When lines arrived: this one and those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineTime {
    /// The first line, numbered in its stream.
    pub from: LineNumber,
    /// When its end arrived.
    pub time: UnixMicros,
}

/// A line of which only the beginning is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutLine {
    /// The line's length in the log, in bytes, without its `\n`.
    pub full_bytes: u64,
}

/// One line of a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// Its number in its stream.
    pub number: LineNumber,
    /// Its number in the view that is read.
    pub position: LineNumber,
    /// Its bytes, without the `\n`.
    pub text: &'a [u8],
    /// When it arrived, if that was asked for and is known.
    pub time: Option<UnixMicros>,
    /// Set when `text` is only the beginning.
    pub cut: Option<CutLine>,
}

/// The lines of a [`Batch`], one by one.
#[derive(Clone, Debug)]
pub struct Lines<'a> {
    batch: &'a Batch,
    rest: &'a [u8],
    index: u64,
    times: &'a [LineTime],
}

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        if self.index == self.batch.lines {
            return None;
        }
        let (text, rest) = match memchr(b'\n', self.rest) {
            Some(end) => (&self.rest[..end], &self.rest[end + 1..]),
            None => (self.rest, &[][..]),
        };
        self.rest = rest;
        let number = self.batch.first_line.plus(self.index);
        while self.times.get(1).is_some_and(|next| next.from <= number) {
            self.times = &self.times[1..];
        }
        let line = Line {
            number,
            position: self.batch.first_position.plus(self.index),
            text,
            time: self.times.first().map(|entry| entry.time),
            cut: self.batch.cut,
        };
        self.index += 1;
        Some(line)
    }
}
