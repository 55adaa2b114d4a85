//! The frames of Server-Sent Events, as bytes.
//!
//! A batch of lines becomes one run of bytes: what has to be known of a line's bytes (that they are UTF-8, that
//! there is no CR and no NUL) is asked once for the whole batch, and only a batch that fails is looked at line by
//! line. With one `Event` a line in place of this, a client gets less than a tenth of the lines a second: see
//! `benches/sse.rs`.

use std::io::Write;

use memchr::{memchr, memchr2};
use serde::Serialize;

use super::json;
use crate::line::{LineNumber, View};
use crate::store::{Batch, ReadEnd, ReadEvent};
use crate::wire::{Cursor, Eof, GapNotice, Problem};

/// How lines are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The line's text as it is.
    Text,
    /// A [`LogLine`](crate::LogLine).
    Json,
}

/// Turns the events of a read into frames.
#[derive(Debug)]
pub(super) struct Frames {
    view: View,
    format: Format,
    /// What the first event still has to say: how long to wait before reconnecting, in milliseconds.
    retry: Option<u128>,
    /// The position behind the last event, where it is known.
    at: Option<LineNumber>,
    bytes: Vec<u8>,
}

impl Frames {
    /// Frames of a read that starts behind `at`, if that is a line.
    pub(super) fn new(
        view: View,
        format: Format,
        retry: std::time::Duration,
        at: Option<LineNumber>,
    ) -> Self {
        Self { view, format, retry: Some(retry.as_millis()), at, bytes: Vec::new() }
    }

    /// Says where the read starts, in a block without data: it is no event, but a client keeps the id.
    pub(super) fn tell_position(&mut self) {
        if let Some(at) = self.at {
            let _ = write!(self.bytes, "id: {}\n\n", Cursor::After(at));
        }
    }

    /// How many bytes wait to be taken.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The frames so far.
    pub(super) fn take(&mut self) -> bytes::Bytes {
        std::mem::take(&mut self.bytes).into()
    }

    /// Adds an event of a read.
    pub(super) fn event(&mut self, event: &ReadEvent) {
        match event {
            ReadEvent::Lines(batch) => self.lines(batch),
            ReadEvent::Gap { gap, next } => {
                self.at = Some(*next);
                self.frame("gap", Some(Cursor::After(*next)), &GapNotice::from(*gap));
            }
            ReadEvent::End(end) => self.end(end),
        }
    }

    /// Adds what went wrong after the response had begun. The id stays, so a client that reconnects goes on.
    pub(super) fn error(&mut self, problem: &Problem) {
        self.frame("error", None, problem);
    }

    fn end(&mut self, end: &ReadEnd) {
        match end {
            ReadEnd::Complete(run) => {
                let completion = run.completion();
                let last = self.at.unwrap_or(LineNumber(match self.view {
                    View::One(stream) => run.totals(stream).lines,
                    View::All => completion.lines,
                }));
                self.frame("complete", Some(Cursor::Ended(last)), &completion);
            }
            ReadEnd::Running { next } => {
                let eof = Eof { next: *next, state: crate::run::StateKind::Running };
                self.frame("eof", Some(Cursor::Ended(*next)), &eof);
            }
            ReadEnd::Evicted(tombstone) => {
                let last = self.at.unwrap_or_default();
                self.frame("evicted", Some(Cursor::Ended(last)), tombstone);
            }
            ReadEnd::Shutdown => self.frame("shutdown", None, &serde_json::Map::new()),
        }
    }

    fn frame(&mut self, name: &str, id: Option<Cursor>, data: &impl Serialize) {
        self.begin();
        // Writing to memory does not fail, and neither do our own shapes as JSON.
        let _ = writeln!(self.bytes, "event: {name}");
        if let Some(id) = id {
            let _ = writeln!(self.bytes, "id: {id}");
        }
        self.bytes.extend_from_slice(b"data: ");
        let _ = serde_json::to_writer(&mut self.bytes, data);
        self.bytes.extend_from_slice(b"\n\n");
    }

    /// `retry` goes inside the first event: as a block of its own it would be an event without data to some.
    fn begin(&mut self) {
        if let Some(retry) = self.retry.take() {
            let _ = writeln!(self.bytes, "retry: {retry}");
        }
    }

    fn lines(&mut self, batch: &Batch) {
        self.begin();
        self.at = Some(batch.last_position());
        let lines = usize::try_from(batch.lines).unwrap_or_default();
        match self.format {
            Format::Json => {
                self.bytes.reserve(batch.bytes.len() + lines * json::FRAME_BYTES);
                json::lines(&mut self.bytes, batch);
            }
            Format::Text => {
                let name = match self.view {
                    View::One(_) => "log",
                    View::All => batch.stream.as_str(),
                };
                let head = Head::new(name, batch.first_position);
                self.bytes.reserve(batch.bytes.len() + lines * (head.len() + 3));
                if is_plain(batch) {
                    plain_lines(&mut self.bytes, head, batch);
                } else {
                    any_lines(&mut self.bytes, head, batch);
                }
            }
        }
    }
}

/// Whether each line of the batch can be copied as it is.
fn is_plain(batch: &Batch) -> bool {
    let bytes = &batch.bytes;
    memchr2(b'\r', 0, bytes).is_none() && std::str::from_utf8(bytes).is_ok() && batch.cut.is_none()
}

fn plain_lines(out: &mut Vec<u8>, mut head: Head, batch: &Batch) {
    let mut rest = &batch.bytes[..];
    for _ in 0..batch.lines {
        out.extend_from_slice(head.as_bytes());
        match memchr(b'\n', rest) {
            Some(end) => {
                let (line, behind) = rest.split_at(end + 1);
                out.extend_from_slice(line);
                out.push(b'\n');
                rest = behind;
            }
            None => {
                out.extend_from_slice(rest);
                out.extend_from_slice(b"\n\n");
                rest = &[];
            }
        }
        head.next();
    }
}

/// Lines of any bytes: CR of CRLF dropped, every other CR starts a `data:` line of its own, what is not UTF-8 and NUL
/// become U+FFFD.
fn any_lines(out: &mut Vec<u8>, mut head: Head, batch: &Batch) {
    let unterminated = batch.bytes.last() != Some(&b'\n');
    let mut left = batch.lines;
    for line in batch.lines() {
        left -= 1;
        let mut text = line.text;
        if let Some(cut) = line.cut {
            text = without_torn_character(text);
            let _ = writeln!(out, ": cut {}", cut.full_bytes);
        } else if !(unterminated && left == 0) {
            text = text.strip_suffix(b"\r").unwrap_or(text);
        }
        out.extend_from_slice(head.as_bytes());
        for chunk in text.utf8_chunks() {
            valid_text(out, chunk.valid().as_bytes());
            if !chunk.invalid().is_empty() {
                out.extend_from_slice("\u{FFFD}".as_bytes());
            }
        }
        out.extend_from_slice(b"\n\n");
        head.next();
    }
}

fn valid_text(out: &mut Vec<u8>, mut text: &[u8]) {
    while let Some(place) = memchr2(b'\r', 0, text) {
        out.extend_from_slice(&text[..place]);
        out.extend_from_slice(if text[place] == 0 { "\u{FFFD}".as_bytes() } else { b"\ndata: " });
        text = &text[place + 1..];
    }
    out.extend_from_slice(text);
}

/// A line that was cut may end inside a character, which is then not there, rather than wrong.
pub(super) fn without_torn_character(text: &[u8]) -> &[u8] {
    match std::str::from_utf8(text) {
        Err(error) if error.error_len().is_none() => &text[..error.valid_up_to()],
        _ => text,
    }
}

/// What stands before a line's text: `event: log\nid: 7\ndata: `. The number is counted up in place.
#[derive(Clone, Copy, Debug)]
struct Head {
    text: [u8; Self::MOST],
    digits: usize,
    digits_end: usize,
    number: u64,
}

impl Head {
    /// `event: stdout`, `id: ` with 20 digits, `data: ` and the two ends of line need 45.
    const MOST: usize = 48;
    const BEHIND: &'static [u8] = b"\ndata: ";

    fn new(event: &str, first: LineNumber) -> Self {
        let mut head = Self { text: [0; Self::MOST], digits: 0, digits_end: 0, number: first.0 };
        head.put(b"event: ");
        head.put(event.as_bytes());
        head.put(b"\nid: ");
        head.digits = head.digits_end;
        head.put_number();
        head
    }

    const fn len(&self) -> usize {
        self.digits_end + Self::BEHIND.len()
    }

    fn as_bytes(&self) -> &[u8] {
        &self.text[..self.len()]
    }

    fn next(&mut self) {
        self.number = self.number.saturating_add(1);
        for digit in self.text[self.digits..self.digits_end].iter_mut().rev() {
            if *digit != b'9' {
                *digit += 1;
                return;
            }
            *digit = b'0';
        }
        self.put_number();
    }

    fn put_number(&mut self) {
        self.digits_end = self.digits;
        self.put(json::Digits::of(self.number).as_bytes());
        self.text[self.digits_end..self.digits_end + Self::BEHIND.len()].copy_from_slice(Self::BEHIND);
    }

    fn put(&mut self, text: &[u8]) {
        self.text[self.digits_end..self.digits_end + text.len()].copy_from_slice(text);
        self.digits_end += text.len();
    }
}
