//! The run journal: what happened to a run and when, in one append-only file. `migrations-docs/0001-format-v1.md`
//! has the byte tables.

mod writer;

use crate::line::Stream;
use crate::run::{FORMAT_VERSION, GapReason, JobMetadata};

pub(crate) use writer::JournalWriter;

/// The first bytes of every journal; the two last ones are the format version, little-endian.
const HEADER: [u8; 8] = {
    let version = (FORMAT_VERSION as u16).to_le_bytes();
    [b'D', b'B', b'J', b'R', b'N', b'L', version[0], version[1]]
};

/// The most bytes that a record's body may have; commands can be up to 2 MiB long.
const MAX_BODY: u64 = 16 * 1024 * 1024;
const CHECKSUM: usize = 4;

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
/// Set in the kind byte of a cut that somebody else made.
const BY_OTHERS: u8 = 0x40;

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

/// The part of a log that was given up because the run is larger than it may be, or because somebody else took it away.
/// The log is as long as it was, and what stands in it from the beginning to the end of the cut means nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) stream: Stream,
    pub(crate) begin: Place,
    pub(crate) end: Place,
    /// Whether it was taken away by somebody else, and not given up by the run's writer.
    pub(crate) by_others: bool,
}

impl Cut {
    /// What readers are told of why those lines are missing.
    pub(crate) const fn reason(&self) -> GapReason {
        if self.by_others { GapReason::Corrupt } else { GapReason::RunSizeCap }
    }

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

    #[inline]
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

    #[inline]
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
        let by_others = if self.cut.by_others { BY_OTHERS } else { 0 };
        body.push(CUT | stream_flag(stream) | by_others);
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
        let cut = Cut { stream: stream_of(kind), begin, end, by_others: kind & BY_OTHERS != 0 };
        rest.is_empty().then_some(Self { cut, lines, bytes })
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

#[inline]
fn checksum(body: &[u8], offset: u64) -> u32 {
    let offset = offset.to_le_bytes();
    // Most records are marks of a few bytes: summing both at once is faster.
    let mut both = [0; 32];
    if let Some(room) = both.get_mut(offset.len()..offset.len() + body.len()) {
        room.copy_from_slice(body);
        both[..offset.len()].copy_from_slice(&offset);
        return crc32fast::hash(&both[..offset.len() + body.len()]);
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&offset);
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

#[inline]
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
#[inline]
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

#[inline]
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

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests;
