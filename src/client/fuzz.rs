//! Event streams that are almost right.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::ClientEvent;
use super::decode::{Decoded, Decoder};
use super::sse::SseParser;
use crate::fuzz::{fuzz, in_bounded_memory, mutated, rounds};
use crate::wire::Cursor;

const STREAMS: [&str; 3] = [
    concat!(
        "retry: 1000\nid: 0\n\n",
        "event: log\nid: 1\ndata: {\"n\":1,\"t\":\"2026-01-01T00:00:00.000001Z\",\"s\":\"stdout\",\"m\":\"a \\\"b\\\"\"}\n\n",
        ":\n\n",
        "event: log\nid: 2\ndata: {\"n\":2,\"t\":\"2026-01-01T00:00:00.000001Z\",\"s\":\"stdout\",\"b\":\"/wA=\"}\n\n",
        "event: log\nid: 3\ndata: {\"n\":1,\"s\":\"stderr\",\"m\":\"cut\",\"cut\":1048577}\n\n",
        "event: gap\nid: 6\ndata: {\"stream\":\"stdout\",\"from\":3,\"lines\":3,\"bytes\":99,\"reason\":\"disk_full\"}\n\n",
        "event: log\nid: 7\ndata: {\"n\":6,\"s\":\"stdout\",\"m\":\"end\",\"open\":true}\n\n",
        "event: complete\nid: 7!\ndata: {\"exit_code\":0,\"duration_ms\":1234,\"state\":\"succeeded\",\"lines\":7,\"dropped_bytes\":99}\n\n",
    ),
    concat!(
        "\u{feff}event: log\r\nid: 18446744073709551615\r\ndata: {\"n\":18446744073709551615,\"s\":\"stdout\",\"m\":\"x\"}\r\n\r\n",
        "event: eof\rid: 5!\rdata: {\"next\":5,\"state\":\"running\"}\r\r",
    ),
    concat!(
        "event: evicted\ndata: {\"job_run_id\":\"r\",\ndata: \"evicted_at\":\"2026-01-01T00:00:00Z\",\"reason\":\"old\",\"lines\":1,\"bytes\":2}\n\n",
        "event: error\ndata: {\"type\":\"internal\",\"title\":\"x\",\"status\":500,\"detail\":\"y\"}\n\n",
        "event: shutdown\ndata: {}\n\n",
    ),
];

const WORDS: [&str; 16] = [
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "data: ",
    "event: log\n",
    "id: ",
    "id\n",
    "retry: 5\n",
    ":",
    "\0",
    "\u{feff}",
    "18446744073709551615",
    "-1",
    "\"m\":\"\",",
    "\"open\":true,",
];

fn streams() -> impl Strategy<Value = Vec<u8>> {
    mutated(STREAMS.map(|text| text.as_bytes().to_vec()).into(), &WORDS)
}

/// Kind, id and data.
type Owned = (Vec<u8>, Vec<u8>, Vec<u8>);

/// All events of a stream that comes in these pieces, and what the parser remembers behind them.
fn parse<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Owned>, Vec<u8>, Option<std::time::Duration>) {
    let mut parser = SseParser::default();
    let mut events = Vec::new();
    for piece in pieces {
        parser.push(piece);
        while let Some(event) = parser.next().unwrap() {
            events.push((event.kind.to_vec(), event.id.to_vec(), event.data.to_vec()));
        }
    }
    (events, parser.last_id().to_vec(), parser.retry())
}

#[test]
fn however_a_stream_is_cut_into_pieces_its_events_are_the_same() {
    fuzz(rounds(), (streams(), vec(any::<Index>(), 0..8)), |(bytes, cuts)| {
        let whole = in_bounded_memory(&bytes, |bytes| parse([bytes]));
        let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        assert_eq!(parse(at.windows(2).map(|cut| &bytes[cut[0]..cut[1]])), whole);
        assert_eq!(parse(bytes.chunks(1)), whole);
        for (_, id, data) in &whole.0 {
            assert!(!id.contains(&b'\n') && !id.contains(&0) && !data.contains(&b'\r'));
        }
        // What is in all the events was in the stream.
        let given: usize = whole.0.iter().map(|(kind, _, data)| kind.len() + data.len()).sum();
        assert!(given <= bytes.len());
    });
}

#[test]
fn batches_are_whole_lines_in_a_row_and_what_breaks_the_protocol_is_refused() {
    fuzz(rounds(), streams(), |bytes| in_bounded_memory(&bytes, check_batches));
}

fn check_batches(bytes: &[u8]) {
    let mut parser = SseParser::default();
    let mut decoder = Decoder::default();
    let mut refused = false;
    parser.push(bytes);
    while let Some(event) = parser.next().unwrap() {
        let is_line_without_position = event.kind == b"log"
            && !std::str::from_utf8(event.id).is_ok_and(|id| matches!(id.parse(), Ok(Cursor::After(_))));
        let taken = decoder.event(event);
        assert!(!is_line_without_position || taken.is_err());
        refused = taken.is_err();
        if refused {
            break;
        }
    }
    // What was gathered of a batch goes with what broke it.
    if !refused {
        decoder.flush();
    }
    for decoded in &decoder.ready {
        let Decoded::Event(ClientEvent::Lines(batch), position) = decoded else { continue };
        assert_eq!(*position, Some(batch.last_position()));
        let lines: Vec<_> = batch.lines().collect();
        assert_eq!((lines.len() as u64, lines[0].position), (batch.lines, batch.first_position));
        assert!(lines.windows(2).all(|pair| pair[1].number.0 == pair[0].number.0 + 1));
        let text: Vec<_> = lines.iter().map(|line| line.text).collect();
        let joined = text.join(&b'\n');
        assert_eq!(batch.bytes.strip_suffix(b"\n").unwrap_or(&batch.bytes), joined);
        assert!(batch.times.is_empty() || lines.iter().all(|line| line.time.is_some()));
    }
}
