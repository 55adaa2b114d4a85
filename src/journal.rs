//! The run journal: what happened to a run and when, in one append-only file. `migrations-docs/0001-format-v1.md`
//! has the byte tables.

use crate::error::LogError;
use crate::line::Stream;
use crate::logfile::AppendFile;
use crate::run::{FORMAT_VERSION, GapReason, JobMetadata};

/// The first bytes of every journal; the two last ones are the format version, little-endian.
const HEADER: [u8; 8] = {
    let version = (FORMAT_VERSION as u16).to_le_bytes();
    [b'D', b'B', b'J', b'R', b'N', b'L', version[0], version[1]]
};

/// The most bytes that a record's body may have; commands can be up to 2 MiB long.
const MAX_BODY: u64 = 16 * 1024 * 1024;
const CHECKSUM: usize = 4;
/// Bytes kept for the last marks and the end of a run, beside those of a second start record.
const END_BYTES: u64 = 16 * 1024;
/// Blocks are asked for so many bytes at a time.
const ALLOCATION_BYTES: u64 = 16 * 1024;

const START: u8 = 1;
const MARK: u8 = 2;
const GAP: u8 = 3;
const END: u8 = 4;
const CUT: u8 = 5;
const KIND: u8 = 0x0f;
/// Set in the kind byte of a mark, gap or cut of standard error.
const STDERR: u8 = 0x10;
/// Set in the kind byte of a mark that ends within a line.
const UNTERMINATED: u8 = 0x20;

/// Something that happened to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// Microseconds since the record before; at least 1, so that times rise strictly.
    pub(crate) after_micros: u64,
    pub(crate) stream: Stream,
    pub(crate) lines: u64,
    pub(crate) bytes: u64,
    pub(crate) what: What,
}

/// What an [`Arrival`]'s lines and bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A batch that was appended to the log: so many bytes, in which so many lines ended. Behind the last `\n` of
    /// the stream there were `unterminated` bytes at the end of the batch.
    Mark { unterminated: u64 },
    /// Whole lines that could not be kept. The log holds nothing of them; bytes of an unterminated line that it
    /// held before were cut off and count as lost.
    Gap(GapReason),
}

/// A place in a log at which a line begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Lines of the stream before it, those that could not be kept included.
    pub(crate) lines: u64,
    /// Bytes of the log before it.
    pub(crate) offset: u64,
}

/// The part in the middle of a log that was given up because the run is larger than it may be. The log is as long as it
/// was, and what stands in it from the beginning to the end of the cut means nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) stream: Stream,
    pub(crate) begin: Place,
    pub(crate) end: Place,
}

impl Cut {
    /// Bytes of the log.
    pub(crate) const fn bytes(&self) -> u64 {
        self.end.offset - self.begin.offset
    }

    /// Lines of the stream, those of holes in it included.
    pub(crate) const fn lines(&self) -> u64 {
        self.end.lines - self.begin.lines
    }

    /// Whether what stands there is given up.
    pub(crate) const fn covers(&self, offset: u64) -> bool {
        self.begin.offset <= offset && offset < self.end.offset
    }

    /// Whether the line behind so many others is given up.
    pub(crate) const fn covers_line(&self, before: u64) -> bool {
        self.begin.lines <= before && before < self.end.lines
    }
}

/// A cut, and what it takes beyond the one before it in its stream, which it replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CutFurther {
    pub(crate) cut: Cut,
    /// Lines of the log; those of holes are counted as lost already.
    pub(crate) lines: u64,
    /// Bytes of the log.
    pub(crate) bytes: u64,
}

/// One entry of a journal.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Record {
    /// The run as it started; always first.
    Start(Box<JobMetadata>),
    /// Output, or the loss of it.
    Arrival(Arrival),
    /// Output that is given up after it was kept.
    Cut(CutFurther),
    /// The run as it ended; always last.
    End(Box<JobMetadata>),
}

impl Record {
    /// Appends the record's bytes as they stand at `offset` in the file.
    fn encode(&self, offset: u64, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
        match self {
            Self::Start(run) => frame_document(START, run, offset, out),
            Self::End(run) => frame_document(END, run, offset, out),
            Self::Arrival(arrival) => {
                arrival.encode(offset, out);
                Ok(())
            }
            Self::Cut(cut) => {
                cut.encode(offset, out);
                Ok(())
            }
        }
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let (&kind, rest) = body.split_first()?;
        match kind & KIND {
            START => Some(Self::Start(serde_json::from_slice(rest).ok()?)),
            END => Some(Self::End(serde_json::from_slice(rest).ok()?)),
            MARK | GAP => Arrival::decode(kind, rest).map(Self::Arrival),
            CUT => CutFurther::decode(kind, rest).map(Self::Cut),
            _ => None,
        }
    }
}

impl Arrival {
    /// The longest body: a kind and four numbers of ten bytes.
    const MAX_BODY: usize = 41;

    fn encode(&self, offset: u64, out: &mut Vec<u8>) {
        let mut body = ArrayWriter { bytes: [0; Self::MAX_BODY], length: 0 };
        let (kind, last) = match self.what {
            What::Mark { unterminated: 0 } => (MARK, None),
            What::Mark { unterminated } => (MARK | UNTERMINATED, Some(unterminated)),
            What::Gap(reason) => (GAP, Some(reason_code(reason))),
        };
        body.push(kind | stream_flag(self.stream));
        for number in [self.after_micros, self.lines, self.bytes].into_iter().chain(last) {
            push_varint(&mut |byte| body.push(byte), number);
        }
        frame(&body.bytes[..body.length], offset, out);
    }

    fn decode(kind: u8, mut rest: &[u8]) -> Option<Self> {
        let mut number = || take_varint(&mut rest);
        let (after_micros, lines, bytes) = (number()?, number()?, number()?);
        let what = match kind & KIND {
            GAP => What::Gap(reason_from(number()?)?),
            _ if kind & UNTERMINATED != 0 => What::Mark { unterminated: number()? },
            _ => What::Mark { unterminated: 0 },
        };
        let stream = stream_of(kind);
        rest.is_empty().then_some(Self { after_micros, stream, lines, bytes, what })
    }
}

impl CutFurther {
    /// The longest body: a kind and six numbers of ten bytes.
    const MAX_BODY: usize = 61;

    fn encode(&self, offset: u64, out: &mut Vec<u8>) {
        let mut body = ArrayWriter { bytes: [0; Self::MAX_BODY], length: 0 };
        let Cut { stream, begin, .. } = self.cut;
        body.push(CUT | stream_flag(stream));
        for number in [begin.lines, begin.offset, self.cut.lines(), self.cut.bytes(), self.lines, self.bytes]
        {
            push_varint(&mut |byte| body.push(byte), number);
        }
        frame(&body.bytes[..body.length], offset, out);
    }

    fn decode(kind: u8, mut rest: &[u8]) -> Option<Self> {
        let mut number = || take_varint(&mut rest);
        let begin = Place { lines: number()?, offset: number()? };
        let end = Place {
            lines: begin.lines.checked_add(number()?)?,
            offset: begin.offset.checked_add(number()?)?,
        };
        let (lines, bytes) = (number()?, number()?);
        rest.is_empty().then_some(Self { cut: Cut { stream: stream_of(kind), begin, end }, lines, bytes })
    }
}

const fn stream_flag(stream: Stream) -> u8 {
    match stream {
        Stream::Stdout => 0,
        Stream::Stderr => STDERR,
    }
}

const fn stream_of(kind: u8) -> Stream {
    if kind & STDERR == 0 { Stream::Stdout } else { Stream::Stderr }
}

struct ArrayWriter<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> ArrayWriter<N> {
    fn push(&mut self, byte: u8) {
        self.bytes[self.length] = byte;
        self.length += 1;
    }
}

fn frame_document(
    kind: u8,
    run: &JobMetadata,
    offset: u64,
    out: &mut Vec<u8>,
) -> Result<(), serde_json::Error> {
    let mut body = vec![kind];
    serde_json::to_writer(&mut body, run)?;
    frame(&body, offset, out);
    Ok(())
}

const fn reason_code(reason: GapReason) -> u64 {
    match reason {
        GapReason::DiskFull => 1,
        GapReason::RunSizeCap => 2,
        GapReason::Corrupt => 3,
    }
}

const fn reason_from(code: u64) -> Option<GapReason> {
    match code {
        1 => Some(GapReason::DiskFull),
        2 => Some(GapReason::RunSizeCap),
        3 => Some(GapReason::Corrupt),
        _ => None,
    }
}

/// Length, checksum, body. The checksum covers the record's place too, so a sound record elsewhere is not taken
/// for one here.
fn frame(body: &[u8], offset: u64, out: &mut Vec<u8>) {
    push_varint(&mut |byte| out.push(byte), body.len() as u64);
    out.extend_from_slice(&checksum(body, offset).to_le_bytes());
    out.extend_from_slice(body);
}

fn checksum(body: &[u8], offset: u64) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&offset.to_le_bytes());
    crc.update(body);
    crc.finalize()
}

/// Unsigned LEB128.
fn push_varint(push: &mut impl FnMut(u8), mut number: u64) {
    while number >= 0x80 {
        push((number as u8) | 0x80);
        number >>= 7;
    }
    push(number as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// What stands at a place in a journal.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// A sound record of this many bytes.
    Record(Record, usize),
    /// The beginning of a record, or nothing.
    Incomplete,
    /// Bytes that are no record.
    Damaged,
}

/// Reads the record, or at the very start the header and the record behind it, that stands at `offset` in the file.
pub(crate) fn parse(bytes: &[u8], offset: u64) -> Parsed {
    if offset == 0 {
        let known = bytes.len().min(HEADER.len());
        if bytes[..known] != HEADER[..known] {
            return Parsed::Damaged;
        }
        if known < HEADER.len() {
            return Parsed::Incomplete;
        }
        return match parse_record(&bytes[known..], known as u64) {
            Parsed::Record(record, length) => Parsed::Record(record, known + length),
            other => other,
        };
    }
    parse_record(bytes, offset)
}

fn parse_record(bytes: &[u8], offset: u64) -> Parsed {
    let mut rest = bytes;
    let Some(length) = take_varint(&mut rest) else {
        return if bytes.len() < 10 { Parsed::Incomplete } else { Parsed::Damaged };
    };
    if length == 0 || length > MAX_BODY {
        return Parsed::Damaged;
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if rest.len() < CHECKSUM + length {
        return Parsed::Incomplete;
    }
    let (sum, rest) = rest.split_at(CHECKSUM);
    let body = &rest[..length];
    if sum != checksum(body, offset).to_le_bytes() {
        return Parsed::Damaged;
    }
    match Record::decode(body) {
        Some(record) => Parsed::Record(record, bytes.len() - rest.len() + length),
        None => Parsed::Damaged,
    }
}

/// Writes the records of one run.
///
/// Behind the records, blocks of the disk are kept for the run's last marks and its end, so that these find room on
/// a disk that is full; other records are only written where they leave that much.
#[derive(Debug)]
pub(crate) struct JournalWriter {
    file: AppendFile,
    /// Where the last sound record ends. The file is longer when a write failed half-way and could not be undone.
    end: u64,
    /// Bytes to keep behind the records; 0 if the file system can't.
    reserve: u64,
    /// Up to where the file has blocks of the disk.
    allocated: u64,
    scratch: Vec<u8>,
    ends: Vec<u64>,
}

impl JournalWriter {
    /// Begins a journal in an empty file.
    pub(crate) fn begin(file: AppendFile, run: &JobMetadata) -> Result<Self, LogError> {
        let mut writer = Self { scratch: HEADER.to_vec(), ..Self::resume(file) };
        let start = Record::Start(Box::new(run.clone()));
        start.encode(HEADER.len() as u64, &mut writer.scratch).map_err(|error| writer.unwritable(&error))?;
        writer.write_scratch()?;
        // The end says again what the start says.
        writer.allocated = 0;
        writer.reserve = END_BYTES + writer.end;
        if let Err(error) = writer.make_room(0) {
            tracing::warn!(%error, "a run begins without room for its end");
        }
        Ok(writer)
    }

    /// Goes on behind the last sound record of an existing journal.
    pub(crate) const fn resume(file: AppendFile) -> Self {
        let end = file.len();
        // What the writer before had kept for the end may still be there.
        Self { file, end, reserve: 0, allocated: u64::MAX, scratch: Vec::new(), ends: Vec::new() }
    }

    /// Bytes that are kept for the run's end.
    pub(crate) const fn reserve(&self) -> u64 {
        self.reserve
    }

    pub(crate) fn moved_to(&mut self, path: std::path::PathBuf) {
        self.file.moved_to(path);
    }

    /// Appends the record with which the run ends, whole or not at all, and what room is left over is given back.
    pub(crate) fn append_end(&mut self, run: &JobMetadata) -> Result<(), LogError> {
        self.scratch.clear();
        let record = Record::End(Box::new(run.clone()));
        record.encode(self.end, &mut self.scratch).map_err(|error| self.unwritable(&error))?;
        self.write_scratch()?;
        if self.allocated > self.end
            && let Err(error) = self.file.cut(self.end)
        {
            tracing::warn!(%error, "room that was kept for the end of a run stays taken");
        }
        Ok(())
    }

    /// Appends arrivals in one write, all or none of them, and then tells of each where its record ends. With
    /// `last` they may use the room that is kept for the end.
    pub(crate) fn append_arrivals(
        &mut self,
        arrivals: &[Arrival],
        last: bool,
        mut written: impl FnMut(&Arrival, u64),
    ) -> Result<(), LogError> {
        let begin = self.end;
        self.scratch.clear();
        self.ends.clear();
        for arrival in arrivals {
            arrival.encode(begin + self.scratch.len() as u64, &mut self.scratch);
            self.ends.push(begin + self.scratch.len() as u64);
        }
        if !last {
            self.make_room(self.scratch.len() as u64)?;
        }
        self.write_scratch()?;
        for (arrival, &end) in arrivals.iter().zip(&self.ends) {
            written(arrival, end);
        }
        Ok(())
    }

    /// Appends what is given up of a log, whole or not at all; tells where the record ends.
    pub(crate) fn append_cut(&mut self, cut: &CutFurther) -> Result<u64, LogError> {
        self.scratch.clear();
        cut.encode(self.end, &mut self.scratch);
        self.make_room(self.scratch.len() as u64)?;
        self.write_scratch()?;
        Ok(self.end)
    }

    /// The length in bytes.
    pub(crate) const fn len(&self) -> u64 {
        self.end
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.file.path()
    }

    /// The file itself, to be synced while others go on appending.
    pub(crate) fn handle(&self) -> std::sync::Arc<std::fs::File> {
        self.file.handle()
    }

    /// Waits until the records are on the disk.
    pub(crate) fn sync(&self) -> Result<(), LogError> {
        self.file.sync()
    }

    /// Sees to it that so many bytes can be appended and leave room for the end.
    fn make_room(&mut self, bytes: u64) -> Result<(), LogError> {
        let needed = self.end + bytes + self.reserve;
        if self.reserve == 0 || needed <= self.allocated {
            return Ok(());
        }
        let wanted = needed + ALLOCATION_BYTES;
        if self.file.allocate(wanted)? {
            self.allocated = wanted;
        } else {
            self.reserve = 0;
        }
        Ok(())
    }

    fn write_scratch(&mut self) -> Result<(), LogError> {
        self.cut_torn_record()?;
        let written = self.file.append(&self.scratch);
        if written.is_ok() {
            self.end = self.file.len();
        } else if let Err(error) = self.cut_torn_record() {
            tracing::warn!(%error, "the beginning of a journal record stays until it can be cut off");
        }
        written
    }

    /// Nothing may stand behind a record that is torn: readers would never get to it.
    fn cut_torn_record(&mut self) -> Result<(), LogError> {
        if self.file.len() == self.end { Ok(()) } else { self.file.cut(self.end) }
    }

    fn unwritable(&self, error: &serde_json::Error) -> LogError {
        LogError::Corrupt {
            path: self.file.path().to_owned(),
            what: format!("a record can't be written: {error}"),
        }
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests;
