//! The service's events, back in the form in which a store gives them: batches of whole lines.

use std::borrow::Cow;
use std::collections::VecDeque;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use memchr::memchr;
use serde::Deserialize;

use super::sse::SseEvent;
use super::{ClientEnd, ClientEvent};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::run::{Completion, Tombstone};
use crate::store::{Batch, CutLine, LineTime};
use crate::wire::{Cursor, Eof, GapNotice, Problem};

/// A batch is given out when it has this many bytes.
const BATCH_BYTES: usize = 256 * 1024;

/// Gathers events; complete ones wait in `ready`.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    batch: Option<Batch>,
    text: Vec<u8>,
    /// Whether a line can still follow in the batch.
    open: bool,
    times: TimeMemo,
    pub(super) ready: VecDeque<Decoded>,
}

/// An event, or what is none to the reader of a log.
#[derive(Debug)]
pub(super) enum Decoded {
    /// For the reader; and where to go on behind it.
    Event(ClientEvent, Option<LineNumber>),
    /// The service goes away; another one may come.
    Shutdown,
    /// The service can't go on.
    Failed(Box<Problem>),
}

/// The same as [`LogLine`](crate::wire::LogLine), borrowed.
#[derive(Deserialize)]
struct LineJson<'a> {
    n: LineNumber,
    #[serde(borrow, default)]
    t: Option<Text<'a>>,
    s: Stream,
    #[serde(borrow, default)]
    m: Option<Text<'a>>,
    #[serde(borrow, default)]
    b: Option<Text<'a>>,
    #[serde(default)]
    cut: Option<u64>,
    #[serde(default)]
    open: bool,
}

/// A string that is borrowed if it has no escapes. (A `Cow` inside an `Option` would always be copied.)
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Lines that arrived together have the same time: its text is read once.
#[derive(Debug, Default)]
struct TimeMemo {
    text: String,
    time: UnixMicros,
}

impl TimeMemo {
    fn parse(&mut self, text: &str) -> Result<UnixMicros, String> {
        if self.text != text {
            self.time = text.parse().map_err(|error| format!("{text:?} as a time: {error}"))?;
            text.clone_into(&mut self.text);
        }
        Ok(self.time)
    }
}

impl Decoder {
    /// Takes an event. Kinds that are not known are skipped: services gain events.
    pub(super) fn event(&mut self, event: SseEvent<'_>) -> Result<(), String> {
        match event.kind {
            b"log" => return self.line(event),
            b"gap" => {
                let position = position(event.id)?;
                self.push(ClientEvent::Gap(json::<GapNotice>(event.data)?), Some(position));
            }
            b"complete" => self.end(ClientEnd::Complete(json::<Completion>(event.data)?)),
            b"eof" => self.end(ClientEnd::Running { next: json::<Eof>(event.data)?.next }),
            b"evicted" => self.end(ClientEnd::Evicted(Box::new(json::<Tombstone>(event.data)?))),
            b"shutdown" => self.other(Decoded::Shutdown),
            b"error" => self.other(Decoded::Failed(Box::new(json(event.data)?))),
            _ => {}
        }
        Ok(())
    }

    /// Makes an event of the lines gathered so far.
    pub(super) fn flush(&mut self) {
        if let Some(mut batch) = self.batch.take() {
            batch.bytes = std::mem::take(&mut self.text).into();
            let position = batch.last_position();
            self.ready.push_back(Decoded::Event(ClientEvent::Lines(batch), Some(position)));
        }
    }

    fn line(&mut self, event: SseEvent<'_>) -> Result<(), String> {
        let position = position(event.id)?;
        let line: LineJson<'_> = json(event.data)?;
        let time = line.t.as_ref().map(|text| self.times.parse(&text.0)).transpose()?;
        if !self.takes(&line, position) {
            self.flush();
        }
        let batch = self.batch.get_or_insert_with(|| Batch {
            stream: line.s,
            first_line: line.n,
            first_position: position,
            lines: 0,
            bytes: bytes::Bytes::new(),
            times: Vec::new(),
            cut: None,
        });
        let before = self.text.len();
        match (&line.m, &line.b) {
            (Some(text), None) => self.text.extend_from_slice(text.0.as_bytes()),
            (None, Some(base64)) => STANDARD
                .decode_vec(base64.0.as_bytes(), &mut self.text)
                .map_err(|error| format!("the bytes of line {position}: {error}"))?,
            _ => return Err(format!("line {position} has not one of \"m\" and \"b\"")),
        }
        if memchr(b'\n', &self.text[before..]).is_some() {
            return Err(format!("line {position} is more than one line"));
        }
        batch.lines += 1;
        batch.cut = line.cut.map(|full_bytes| CutLine { full_bytes });
        if let Some(time) = time.filter(|time| batch.times.last().is_none_or(|last| last.time != *time)) {
            batch.times.push(LineTime { from: line.n, time });
        }
        self.open = !line.open && line.cut.is_none();
        if self.open {
            self.text.push(b'\n');
        }
        Ok(())
    }

    /// Whether this line can be the next of the batch.
    fn takes(&self, line: &LineJson<'_>, position: LineNumber) -> bool {
        self.open
            && line.cut.is_none()
            && self.text.len() < BATCH_BYTES
            && self.batch.as_ref().is_some_and(|batch| {
                batch.stream == line.s
                    && batch.first_line.0.checked_add(batch.lines) == Some(line.n.0)
                    && batch.first_position.0.checked_add(batch.lines) == Some(position.0)
                    // Times hold until the next one: a line without would get that of the line before it.
                    && batch.times.is_empty() == line.t.is_none()
            })
    }

    fn end(&mut self, end: ClientEnd) {
        self.push(ClientEvent::End(end), None);
    }

    fn push(&mut self, event: ClientEvent, position: Option<LineNumber>) {
        self.other(Decoded::Event(event, position));
    }

    fn other(&mut self, decoded: Decoded) {
        self.flush();
        self.ready.push_back(decoded);
    }
}

fn position(id: &[u8]) -> Result<LineNumber, String> {
    match std::str::from_utf8(id).ok().and_then(|text| text.parse().ok()) {
        Some(Cursor::After(line)) => Ok(line),
        _ => Err(format!("the id {:?} of an event is no line number", String::from_utf8_lossy(id))),
    }
}

fn json<'a, T: Deserialize<'a>>(data: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(data).map_err(|error| {
        let beginning = String::from_utf8_lossy(&data[..data.len().min(100)]);
        format!("{beginning:?} in an event: {error}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(events: &[(&str, &str, &str)]) -> Result<Vec<Decoded>, String> {
        let mut decoder = Decoder::default();
        for (kind, id, data) in events {
            decoder.event(SseEvent { kind: kind.as_bytes(), id: id.as_bytes(), data: data.as_bytes() })?;
        }
        decoder.flush();
        Ok(decoder.ready.into())
    }

    fn batches(events: &[(&str, &str, &str)]) -> Vec<Batch> {
        let batch = |decoded| match decoded {
            Decoded::Event(ClientEvent::Lines(batch), Some(position)) => {
                assert_eq!(position, batch.last_position());
                batch
            }
            other => panic!("{other:?}"),
        };
        decode(events).unwrap().into_iter().map(batch).collect()
    }

    #[test]
    fn lines_in_a_row_become_one_batch() {
        let got = batches(&[
            ("log", "3", r#"{"n":3,"t":"2026-01-01T00:00:00.000001Z","s":"stdout","m":"a \"b\""}"#),
            ("log", "4", r#"{"n":4,"t":"2026-01-01T00:00:00.000001Z","s":"stdout","b":"/wA="}"#),
            ("log", "5", r#"{"n":5,"t":"2026-01-01T00:00:00.000002Z","s":"stdout","m":"end","open":true}"#),
        ]);
        assert_eq!(got.len(), 1);
        assert_eq!(&got[0].bytes[..], b"a \"b\"\n\xff\x00\nend");
        let times: Vec<_> = got[0].lines().map(|line| line.time.unwrap().0 % 10).collect();
        assert_eq!(times, [1, 1, 2]);
    }

    #[test]
    fn another_stream_a_hole_and_a_cut_line_begin_another_batch() {
        let got = batches(&[
            ("log", "1", r#"{"n":1,"s":"stdout","m":"a"}"#),
            ("log", "2", r#"{"n":1,"s":"stderr","m":"b"}"#),
            ("log", "5", r#"{"n":4,"s":"stderr","m":"c"}"#),
            ("log", "6", r#"{"n":5,"s":"stderr","m":"d","cut":9}"#),
            ("log", "7", r#"{"n":6,"s":"stderr","m":"e"}"#),
        ]);
        let firsts: Vec<_> = got.iter().map(|batch| (batch.first_position.0, batch.first_line.0)).collect();
        assert_eq!(firsts, [(1, 1), (2, 1), (5, 4), (6, 5), (7, 6)]);
        assert_eq!(got[3].cut, Some(CutLine { full_bytes: 9 }));
        assert_eq!(&got[3].bytes[..], b"d");
    }

    #[test]
    fn what_breaks_the_protocol_is_refused() {
        for (id, data) in [
            ("", r#"{"n":1,"s":"stdout","m":"a"}"#),
            ("1!", r#"{"n":1,"s":"stdout","m":"a"}"#),
            ("1", r#"{"n":1,"s":"stdout"}"#),
            ("1", r#"{"n":1,"s":"stdout","m":"a","b":"YQ=="}"#),
            ("1", r#"{"n":1,"s":"stdout","m":"a\nb"}"#),
            ("1", r#"{"n":1,"s":"stdout","b":"?"}"#),
            ("1", r#"{"n":1,"s":"stdout","m":"a","t":"noon"}"#),
            ("1", "plain text"),
        ] {
            assert!(decode(&[("log", id, data)]).is_err(), "{id} {data}");
        }
    }

    #[test]
    fn events_of_another_kind_are_skipped() {
        assert!(decode(&[("news", "", "?"), ("", "", "?")]).unwrap().is_empty());
    }
}
