//! [`LogLine`](crate::LogLine)s as the data of events, byte for byte as serde would write them.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::sse::without_torn_character;
use crate::line::{Stream, UnixMicros};
use crate::store::{Batch, Line};

/// About what stands around the text of a line in its frame.
pub(super) const FRAME_BYTES: usize = 100;

/// Adds one `log` event a line.
pub(super) fn lines(out: &mut Vec<u8>, batch: &Batch) {
    let all_utf8 = std::str::from_utf8(&batch.bytes).is_ok();
    let unterminated = batch.bytes.last() != Some(&b'\n') && batch.cut.is_none();
    let mut origin = Origin::of(batch);
    let mut left = batch.lines;
    for line in batch.lines() {
        left -= 1;
        out.extend_from_slice(b"event: log\nid: ");
        out.extend_from_slice(Digits::of(line.position.0).as_bytes());
        out.extend_from_slice(b"\ndata: {\"n\":");
        out.extend_from_slice(Digits::of(line.number.0).as_bytes());
        out.extend_from_slice(origin.at(line.time));
        message(out, &line, all_utf8);
        if let Some(cut) = line.cut {
            out.extend_from_slice(b",\"cut\":");
            out.extend_from_slice(Digits::of(cut.full_bytes).as_bytes());
        }
        if unterminated && left == 0 {
            out.extend_from_slice(b",\"open\":true");
        }
        out.extend_from_slice(b"}\n\n");
    }
}

/// `m` if the line is UTF-8, else `b`.
fn message(out: &mut Vec<u8>, line: &Line<'_>, known_utf8: bool) {
    let text = if line.cut.is_some() { without_torn_character(line.text) } else { line.text };
    if known_utf8 || std::str::from_utf8(text).is_ok() {
        out.extend_from_slice(b",\"m\":\"");
        escaped(out, text);
    } else {
        out.extend_from_slice(b",\"b\":\"");
        let start = out.len();
        out.resize(start + text.len().div_ceil(3) * 4, 0);
        let encoded = STANDARD.encode_slice(text, &mut out[start..]);
        debug_assert_eq!(encoded.ok(), Some(out.len() - start), "four characters for each three bytes");
    }
    out.push(b'"');
}

/// Copies text that is UTF-8, escaping what JSON wants escaped. Most lines need none of it, so a line is first looked
/// at as a whole, and where it does, in pieces.
fn escaped(out: &mut Vec<u8>, text: &[u8]) {
    const PIECE: usize = 32;
    if !needs_escape(text) {
        out.extend_from_slice(text);
        return;
    }
    for piece in text.chunks(PIECE) {
        if needs_escape(piece) {
            for &byte in piece {
                escaped_byte(out, byte);
            }
        } else {
            out.extend_from_slice(piece);
        }
    }
}

/// Without an early end, so that the compiler looks at many bytes at once.
fn needs_escape(text: &[u8]) -> bool {
    text.iter().fold(false, |found, &byte| found | (byte < 0x20) | (byte == b'"') | (byte == b'\\'))
}

fn escaped_byte(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'"' | b'\\' => byte,
        b'\t' => b't',
        b'\r' => b'r',
        b'\n' => b'n',
        0x08 => b'b',
        0x0c => b'f',
        0..0x20 => {
            let (high, low) = (HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]);
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            return;
        }
        _ => {
            out.push(byte);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

/// When and where from, as `,"t":"…","s":"…"`. Made anew only when the time changes: lines that arrived together share
/// one.
struct Origin {
    stream: Stream,
    time: Option<UnixMicros>,
    text: Vec<u8>,
}

impl Origin {
    fn of(batch: &Batch) -> Self {
        let mut origin = Self { stream: batch.stream, time: None, text: Vec::new() };
        origin.put();
        origin
    }

    fn at(&mut self, time: Option<UnixMicros>) -> &[u8] {
        if self.time != time {
            self.time = time;
            self.put();
        }
        &self.text
    }

    fn put(&mut self) {
        self.text.clear();
        if let Some(time) = self.time {
            let _ = write!(self.text, ",\"t\":\"{time}\"");
        }
        let _ = write!(self.text, ",\"s\":\"{}\"", self.stream);
    }
}

/// A number in decimal.
pub(super) struct Digits {
    text: [u8; Self::MOST],
    start: usize,
}

impl Digits {
    const MOST: usize = 20;

    pub(super) fn of(mut number: u64) -> Self {
        let mut digits = Self { text: [b'0'; Self::MOST], start: Self::MOST };
        loop {
            digits.start -= 1;
            digits.text[digits.start] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                return digits;
            }
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.text[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::line::LineNumber;
    use crate::store::{CutLine, LineTime};
    use crate::wire::LogLine;

    /// What serde makes of a batch, the lines told apart by nobody's code but this.
    fn by_serde(batch: &Batch) -> String {
        let mut frames = String::new();
        for (index, bytes) in batch.bytes.split_inclusive(|&b| b == b'\n').enumerate() {
            let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
            let n = batch.first_line.plus(index as u64);
            let m = String::from_utf8(text.to_vec()).ok();
            let line = LogLine {
                n,
                t: batch.times.iter().rev().find(|entry| entry.from <= n).map(|entry| entry.time),
                s: batch.stream,
                b: if m.is_none() { Some(STANDARD.encode(text)) } else { None },
                m,
                cut: batch.cut.map(|cut| cut.full_bytes),
                open: bytes.last() != Some(&b'\n') && batch.cut.is_none(),
            };
            let id = batch.first_position.plus(index as u64);
            let data = serde_json::to_string(&line).unwrap();
            frames += &format!("event: log\nid: {id}\ndata: {data}\n\n");
        }
        frames
    }

    fn batch(bytes: Vec<u8>, first: u64, times: Vec<LineTime>) -> Batch {
        Batch {
            stream: Stream::Stderr,
            first_line: LineNumber(first),
            first_position: LineNumber(first + 7),
            lines: bytes.split_inclusive(|&b| b == b'\n').count() as u64,
            bytes: Bytes::from(bytes),
            times,
            cut: None,
        }
    }

    fn ours(batch: &Batch) -> String {
        let mut out = Vec::new();
        lines(&mut out, batch);
        String::from_utf8(out).unwrap()
    }

    proptest! {
        #[test]
        fn lines_are_what_serde_makes_of_them(
            bytes in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), 32..127u8], 1..300),
            first in 1..=u64::MAX / 2,
            time: u32,
        ) {
            let times = vec![
                LineTime { from: LineNumber(first), time: UnixMicros(time.into()) },
                LineTime { from: LineNumber(first + 1), time: UnixMicros(u64::from(time) + 1) },
            ];
            let batch = batch(bytes, first, times);
            prop_assert_eq!(ours(&batch), by_serde(&batch));
        }

        #[test]
        fn text_is_what_serde_makes_of_it(text in "[^\n]{1,100}") {
            let batch = batch(format!("{text}\n").into_bytes(), 1, Vec::new());
            prop_assert_eq!(ours(&batch), by_serde(&batch));
        }

        #[test]
        fn numbers_are_decimal(number: u64) {
            let (digits, text) = (Digits::of(number), number.to_string());
            prop_assert_eq!(digits.as_bytes(), text.as_bytes());
        }
    }

    #[test]
    fn a_line_that_was_cut_says_so_and_ends_with_a_whole_character() {
        let cut = Some(CutLine { full_bytes: 5_000_000 });
        let torn = Batch { cut, ..batch(b"gr\xc3\xbcn und gr\xc3".to_vec(), 1, Vec::new()) };
        let whole = Batch { cut, ..batch("grün und gr".into(), 1, Vec::new()) };
        assert_eq!(ours(&torn), by_serde(&whole));
        assert!(ours(&torn).contains(r#""m":"grün und gr","cut":5000000}"#));
    }
}
