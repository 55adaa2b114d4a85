//! Reading a journal: record by record, and as the order in which lines arrived.

use bytes::Bytes;

use crate::error::LogError;
use crate::index::progress::Progress;
use crate::journal::{Arrival, Parsed, Record, parse};
use crate::line::{Stream, UnixMicros};
use crate::logfile::{Fetched, Io, ReadFile};

/// The first guess at how much of a journal to read at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// A place in a journal file.
#[derive(Debug)]
pub(crate) struct JournalReader {
    file: ReadFile,
    chunk: Bytes,
    chunk_offset: u64,
}

/// What stands at a place in a journal file.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A record, and where the one behind it begins.
    Record(Record, u64),
    /// Nothing whole yet.
    Nothing,
    /// Bytes that are no record.
    Damaged,
    /// Not in the page cache.
    WouldBlock,
}

impl JournalReader {
    pub(crate) const fn new(file: ReadFile) -> Self {
        Self { file, chunk: Bytes::new(), chunk_offset: 0 }
    }

    pub(crate) const fn file(&self) -> &ReadFile {
        &self.file
    }

    /// The record at `offset`.
    #[inline]
    pub(crate) fn at(&mut self, offset: u64, io: Io) -> Result<Entry, LogError> {
        if let Some(held) = offset.checked_sub(self.chunk_offset).and_then(|at| usize::try_from(at).ok())
            && held < self.chunk.len()
            && let Parsed::Record(record, length) = parse(&self.chunk[held..], offset)
        {
            return Ok(Entry::Record(record, offset + length as u64));
        }
        self.read_at(offset, io)
    }

    /// The same, when it is not held yet.
    fn read_at(&mut self, offset: u64, io: Io) -> Result<Entry, LogError> {
        let mut length = CHUNK_BYTES;
        loop {
            match self.file.read(offset, length, io)? {
                Fetched::WouldBlock => return Ok(Entry::WouldBlock),
                Fetched::Damaged(_) => return Ok(Entry::Damaged),
                Fetched::Bytes(bytes) => {
                    let got = bytes.len();
                    (self.chunk, self.chunk_offset) = (bytes, offset);
                    match parse(&self.chunk, offset) {
                        Parsed::Record(record, length) => {
                            return Ok(Entry::Record(record, offset + length as u64));
                        }
                        Parsed::Damaged => return Ok(Entry::Damaged),
                        Parsed::Incomplete if got < length => return Ok(Entry::Nothing),
                        Parsed::Incomplete => length *= 4,
                    }
                }
            }
        }
    }

    /// The run behind the last record before `end` up to which `holds` does, from the beginning of the journal on.
    pub(crate) fn last_while(
        &mut self,
        end: u64,
        holds: impl Fn(&Progress) -> bool,
    ) -> Result<Progress, LogError> {
        let mut at = Progress::start(UnixMicros::default(), 0);
        while at.journal < end
            && let Entry::Record(record, behind) = self.at(at.journal, Io::MayBlock)?
        {
            let mut after = at;
            if let Record::Arrival(arrival) = record
                && (!after.advance(&arrival) || !holds(&after))
            {
                break;
            }
            after.journal = behind;
            at = after;
        }
        Ok(at)
    }
}

/// The order of arrival, from some place in the run on.
#[derive(Debug)]
pub(crate) struct Arrivals {
    journal: JournalReader,
    at: Progress,
    /// Lines of each stream that are taken; those of a stream nobody asks for are all taken from the start.
    pub(crate) taken: [u64; 2],
}

/// The next arrival of which lines are not taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    pub(crate) arrival: Arrival,
    pub(crate) before: Progress,
    pub(crate) after: Progress,
}

/// What [`Arrivals::next`] found.
#[derive(Debug)]
pub(crate) enum Walk {
    Next(Box<Next>),
    Nothing,
    WouldBlock,
}

impl Arrivals {
    /// Everything behind `at`.
    pub(crate) fn new(journal: JournalReader, at: Progress) -> Self {
        Self { journal, at, taken: at.streams.map(|stream| stream.lines) }
    }

    /// The next arrival with lines that are not taken. It stays the next one until they are: an arrival that is
    /// still in `tail` can grow before it gets into the journal.
    pub(crate) fn next(&mut self, journal_end: u64, tail: &[Arrival], io: Io) -> Result<Walk, LogError> {
        while self.at.journal < journal_end {
            match self.journal.at(self.at.journal, io)? {
                Entry::WouldBlock => return Ok(Walk::WouldBlock),
                Entry::Record(Record::Arrival(arrival), behind) => {
                    let mut after = self.at;
                    if !after.advance(&arrival) {
                        return Ok(Walk::Nothing);
                    }
                    after.journal = behind;
                    if self.has_news(&arrival, &after) {
                        return Ok(Walk::Next(Box::new(Next { arrival, before: self.at, after })));
                    }
                    self.at = after;
                }
                Entry::Record(Record::Start(_) | Record::Cut(_), behind) => self.at.journal = behind,
                Entry::Record(Record::End(_), _) | Entry::Nothing | Entry::Damaged => {
                    return Ok(Walk::Nothing);
                }
            }
        }
        let mut before = self.at;
        for &arrival in tail {
            let mut after = before;
            if !after.advance(&arrival) {
                break;
            }
            if self.has_news(&arrival, &after) {
                return Ok(Walk::Next(Box::new(Next { arrival, before, after })));
            }
            before = after;
        }
        Ok(Walk::Nothing)
    }

    /// The run where the journal was read up to.
    pub(crate) const fn here(&self) -> Progress {
        self.at
    }

    /// Where the journal was read up to: lines of a stream, and the bytes up to the end of the last of them.
    pub(crate) const fn place(&self, stream: Stream) -> (u64, u64) {
        let at = self.at.of(stream);
        (at.lines, at.line_start)
    }

    /// Counts the next arrival as taken whole.
    pub(crate) fn take(&mut self, next: &Next) {
        let stream = next.arrival.stream.index();
        self.taken[stream] = self.taken[stream].max(next.after.streams[stream].lines);
    }

    /// Goes back to a place in the run, with so many lines of a stream taken.
    pub(crate) fn go_back(&mut self, to: Progress, stream: Stream, lines: u64) {
        self.at = to;
        self.taken[stream.index()] = lines;
    }

    fn has_news(&self, arrival: &Arrival, after: &Progress) -> bool {
        let stream = arrival.stream.index();
        after.streams[stream].lines > self.taken[stream]
    }
}
