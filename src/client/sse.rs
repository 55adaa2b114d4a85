//! An incremental parser of Server-Sent Events. Bytes may come in pieces of any size; the events are the same.

use std::time::Duration;

use memchr::{memchr, memchr2};

/// The most bytes of one event: 8 MiB, room for the longest line with every byte of it escaped.
pub(crate) const MAX_EVENT_BYTES: usize = 8 * 1024 * 1024;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Turns the bytes of an event stream into events.
#[derive(Debug)]
pub(crate) struct SseParser {
    buffer: Vec<u8>,
    /// What of `buffer` is parsed already.
    start: usize,
    /// How many bytes behind `start` are known to hold no line end.
    scanned: usize,
    /// The last line ended in CR: a LF that comes next belongs to it.
    skip_lf: bool,
    /// Whether the first line is still to come; only that one may begin with a byte order mark.
    at_start: bool,
    block: Block,
}

/// One event, borrowed from the parser until it is asked for the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SseEvent<'a> {
    /// The `event:` field; empty if there was none.
    pub(crate) kind: &'a [u8],
    /// The last `id:` of this event or of one before it.
    pub(crate) id: &'a [u8],
    /// The `data:` lines, joined with `\n`.
    pub(crate) data: &'a [u8],
}

/// An event is longer than [`MAX_EVENT_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {MAX_EVENT_BYTES} bytes")]
pub(crate) struct EventTooLong;

/// The fields of the event that is being read.
#[derive(Debug, Default)]
struct Block {
    kind: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// The id that holds once the event is complete.
    next_id: Vec<u8>,
    id: Vec<u8>,
    retry: Option<Duration>,
    /// The event was given out; its fields are cleared before the next line.
    given: bool,
}

impl Default for SseParser {
    fn default() -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            skip_lf: false,
            at_start: true,
            block: Block::default(),
        }
    }
}

impl SseParser {
    /// Takes the next bytes of the stream.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next event that is complete; `None` when more bytes are needed.
    pub(crate) fn next(&mut self) -> Result<Option<SseEvent<'_>>, EventTooLong> {
        self.block.clear_if_given();
        loop {
            let rest = &self.buffer[self.start..];
            if self.skip_lf && !rest.is_empty() {
                self.skip_lf = false;
                if rest[0] == b'\n' {
                    self.start += 1;
                    continue;
                }
            }
            let Some(found) = memchr2(b'\n', b'\r', &rest[self.scanned..]) else {
                self.scanned = rest.len();
                return if rest.len() > MAX_EVENT_BYTES { Err(EventTooLong) } else { Ok(None) };
            };
            let end = self.scanned + found;
            let mut line = &rest[..end];
            if std::mem::take(&mut self.at_start) {
                line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
            }
            self.skip_lf = rest[end] == b'\r';
            self.scanned = 0;
            self.start += end + 1;
            if line.is_empty() {
                if self.block.end() {
                    return Ok(Some(self.block.event()));
                }
            } else {
                self.block.line(line)?;
            }
        }
    }

    /// The id of the last event that was complete, one without data included.
    pub(crate) fn last_id(&self) -> &[u8] {
        &self.block.id
    }

    /// The delay before a reconnect that the server asked for last.
    pub(crate) fn retry(&self) -> Option<Duration> {
        self.block.retry
    }
}

impl Block {
    fn line(&mut self, line: &[u8]) -> Result<(), EventTooLong> {
        let (name, value) = match memchr(b':', line) {
            Some(colon) => {
                let value = &line[colon + 1..];
                (&line[..colon], value.strip_prefix(b" ").unwrap_or(value))
            }
            None => (line, &[][..]),
        };
        match name {
            b"data" => {
                if self.data.len() + value.len() >= MAX_EVENT_BYTES {
                    return Err(EventTooLong);
                }
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
            }
            b"event" => replace(&mut self.kind, value),
            b"id" if memchr(0, value).is_none() => replace(&mut self.next_id, value),
            b"retry" if value.iter().all(u8::is_ascii_digit) => {
                let millis = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                self.retry = millis.map(Duration::from_millis).or(self.retry);
            }
            _ => {}
        }
        Ok(())
    }

    /// Ends the block at its blank line; tells whether it was an event.
    fn end(&mut self) -> bool {
        if self.id != self.next_id {
            self.id.clone_from(&self.next_id);
        }
        self.given = true;
        if !self.has_data {
            self.clear_if_given();
        }
        self.has_data
    }

    fn event(&self) -> SseEvent<'_> {
        SseEvent { kind: &self.kind, id: &self.id, data: &self.data }
    }

    fn clear_if_given(&mut self) {
        if std::mem::take(&mut self.given) {
            self.kind.clear();
            self.data.clear();
            self.has_data = false;
        }
    }
}

fn replace(field: &mut Vec<u8>, value: &[u8]) {
    field.clear();
    field.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Owned = (String, String, String);

    fn owned(event: SseEvent<'_>) -> Owned {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (text(event.kind), text(event.id), text(event.data))
    }

    fn parse_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Owned> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(piece);
            while let Some(event) = parser.next().unwrap() {
                events.push(owned(event));
            }
        }
        events
    }

    fn parse(text: &str) -> Vec<Owned> {
        parse_pieces([text.as_bytes()])
    }

    fn event(kind: &str, id: &str, data: &str) -> Owned {
        (kind.to_owned(), id.to_owned(), data.to_owned())
    }

    #[test]
    fn fields_are_read_with_and_without_the_space() {
        assert_eq!(parse("event: log\nid:7\ndata: a: b\n\n"), [event("log", "7", "a: b")]);
        assert_eq!(parse("data:  two spaces\n\n"), [event("", "", " two spaces")]);
        assert_eq!(parse("data\n\n"), [event("", "", "")]);
    }

    #[test]
    fn data_lines_are_joined_and_an_event_without_data_is_none() {
        assert_eq!(parse("data: a\ndata:\ndata: b\n\n"), [event("", "", "a\n\nb")]);
        assert_eq!(parse("event: log\n\ndata: x\n\n"), [event("", "", "x")]);
        assert_eq!(parse(":\n\n: a comment\nunknown: x\ndata: y\n\n"), [event("", "", "y")]);
    }

    #[test]
    fn an_id_holds_until_the_next_and_only_when_its_event_is_complete() {
        let mut parser = SseParser::default();
        parser.push(b"id: 1\ndata: a\n\ndata: b\n\nid: 2\n\nid: 3\ndata: cut off\n");
        assert_eq!(owned(parser.next().unwrap().unwrap()), event("", "1", "a"));
        assert_eq!(owned(parser.next().unwrap().unwrap()), event("", "1", "b"));
        assert_eq!(parser.next().unwrap(), None);
        assert_eq!(parser.last_id(), b"2");
    }

    #[test]
    fn an_id_with_nul_is_ignored_and_an_empty_one_resets() {
        assert_eq!(
            parse("id: 1\ndata: a\n\nid: 2\0\ndata: b\n\nid\ndata: c\n\n"),
            [event("", "1", "a"), event("", "1", "b"), event("", "", "c")]
        );
    }

    #[test]
    fn lines_end_in_lf_cr_or_both() {
        for end in ["\n", "\r", "\r\n"] {
            let text = format!("event: log{end}data: a{end}data: b{end}{end}data: c{end}{end}");
            assert_eq!(parse(&text), [event("log", "", "a\nb"), event("", "", "c")], "{end:?}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_skipped_once() {
        assert_eq!(parse("\u{FEFF}data: a\n\n"), [event("", "", "a")]);
        assert_eq!(
            parse("data: a\n\n\u{FEFF}data: b\n\ndata: c\n\n"),
            [event("", "", "a"), event("", "", "c")]
        );
    }

    #[test]
    fn retry_is_digits_or_nothing() {
        let mut parser = SseParser::default();
        parser.push(b"retry: 1500\ndata: a\n\nretry: soon\nretry: 99999999999999999999\ndata: b\n\n");
        while parser.next().unwrap().is_some() {}
        assert_eq!(parser.retry(), Some(Duration::from_millis(1500)));
    }

    #[test]
    fn an_endless_event_is_refused_in_one_line_and_in_many() {
        let mut one = SseParser::default();
        one.push(&vec![b'x'; MAX_EVENT_BYTES + 1]);
        assert_eq!(one.next(), Err(EventTooLong));
        let mut many = SseParser::default();
        let line = [b"data: ".as_slice(), &[b'x'; 1 << 20], b"\n"].concat();
        let refused = (0..16).any(|_| {
            many.push(&line);
            many.next().is_err()
        });
        assert!(refused);
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_events(
            text in r"(\u{FEFF})?((event|id|data|retry|x|)(: ?)?[a-z1:\u{0}é]{0,4}(\n|\r|\r\n|\n\n|\r\n\r\n|\r\r)){0,20}",
            mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let bytes = text.as_bytes();
            let whole = parse_pieces([bytes]);
            let mut at: Vec<usize> = cuts.drain(..).map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            prop_assert_eq!(&parse_pieces(at.windows(2).map(|w| &bytes[w[0]..w[1]])), &whole);
            prop_assert_eq!(&parse_pieces(bytes.chunks(1)), &whole);
        }

        #[test]
        fn no_bytes_panic_the_parser(bytes: Vec<u8>) {
            parse_pieces([bytes.as_slice()]);
        }
    }
}
