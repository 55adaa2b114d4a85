//! Journals that are almost right.

use super::*;
use crate::fuzz::{fixture, fuzz, in_bounded_memory, mutated, rounds};
use crate::index::progress::{Checkpointer, Progress};
use crate::line::UnixMicros;

fn journals() -> Vec<Vec<u8>> {
    let mut with_gaps = HEADER.to_vec();
    for (kind, after_micros, bytes) in [(0x20, 1, 300), (0x11, 70_000, u64::MAX), (0x01, u64::MAX, 1)] {
        let what = if kind & 0x20 == 0 {
            What::Gap(GapReason::RunSizeCap)
        } else {
            What::Mark { unterminated: 200 }
        };
        let stream = if kind & 0x10 == 0 { Stream::Stdout } else { Stream::Stderr };
        let arrival = Arrival { after_micros, stream, lines: 300, bytes, what };
        arrival.encode(with_gaps.len() as u64, &mut with_gaps);
    }
    for (stream, lines) in [(Stream::Stdout, 3), (Stream::Stderr, 1 << 40)] {
        let (begin, end) = (Place { lines: 1, offset: 7 }, Place { lines: 1 + lines, offset: 70_000 });
        let further =
            CutFurther { cut: Cut { stream, begin, end, by_others: lines == 3 }, lines, bytes: 69_993 };
        further.encode(with_gaps.len() as u64, &mut with_gaps);
    }
    let fixtures = ["ok", "failed", "lost"].map(|run| fixture(&format!("v1/job_runs/{run}/journal")));
    [with_gaps].into_iter().chain(fixtures).collect()
}

/// The body of the record that stands at `offset`, and how many bytes the record has: as the format's page says, and
/// with nothing of the parser. `None` where there is none whose checksum is right.
fn by_the_page(bytes: &[u8], offset: u64) -> Option<(&[u8], usize)> {
    let mut length = 0_u128;
    let mut at = 0;
    loop {
        let byte = *bytes.get(at).filter(|_| at < 10)?;
        length |= u128::from(byte % 0x80) << (7 * at);
        at += 1;
        if byte < 0x80 {
            break;
        }
    }
    let end = usize::try_from(length).ok()?.checked_add(at + 4)?;
    let body = bytes.get(at + 4..end)?;
    let sum = crc32fast::hash(&[&offset.to_le_bytes(), body].concat());
    (bytes[at..at + 4] == sum.to_le_bytes()).then_some((body, end))
}

/// What was read is written, and read again.
fn survives_its_bytes(record: &Record) {
    let mut bytes = Vec::new();
    record.encode(9, &mut bytes).unwrap();
    let Parsed::Record(again, length) = parse(&bytes, 9) else { panic!("{record:?} is not read again") };
    assert_eq!((&again, length), (record, bytes.len()));
}

/// Reads a journal up to where it is sound no more, and checks every record.
fn check_journal(bytes: &[u8]) {
    let mut at = 0;
    let mut progress = Progress::start(UnixMicros(1 << 50), 0);
    let mut checkpointer = Checkpointer::new();
    while let Parsed::Record(record, length) = in_bounded_memory(&bytes[at..], |rest| parse(rest, at as u64))
    {
        let rest = &bytes[at..];
        let header = if at == 0 { HEADER.len() } else { 0 };
        assert_eq!(rest[..header], HEADER[..header]);
        let framed = by_the_page(&rest[header..], (at + header) as u64);
        let (body, framed) = framed.expect("a record is read whose checksum is wrong");
        assert_eq!(length, header + framed);
        let kind = match &record {
            Record::Start(_) => START,
            Record::End(_) => END,
            Record::Cut(_) => CUT,
            Record::Arrival(Arrival { what: What::Mark { .. }, .. }) => MARK,
            Record::Arrival(Arrival { what: What::Gap(_), .. }) => GAP,
        };
        assert_eq!(body[0] & KIND, kind);
        for cut in [0, 1, length / 3, length / 2, length - 1] {
            let torn = parse(&rest[..cut], at as u64);
            assert!(matches!(torn, Parsed::Incomplete), "{torn:?} of {cut} of {length} bytes");
        }
        survives_its_bytes(&record);
        match record {
            Record::Arrival(arrival) => follows(&mut progress, &mut checkpointer, &arrival),
            Record::Cut(further) => gives_up(&mut progress, &further),
            Record::Start(_) | Record::End(_) => {}
        }
        at += length;
    }
}

/// Whatever numbers a journal has, who follows it goes forward only.
fn follows(progress: &mut Progress, checkpointer: &mut Checkpointer, arrival: &Arrival) {
    let before = *progress;
    if !progress.advance(arrival) {
        assert_eq!(*progress, before, "what contradicts itself changes nothing");
        return;
    }
    let (at, was) = (progress.of(arrival.stream), before.of(arrival.stream));
    assert!(progress.time >= before.time && at.lines >= was.lines && at.line_start >= was.line_start);
    assert!(at.line_start <= at.bytes && at.totals().lines >= at.lines && progress.lines() >= at.lines);
    let found = checkpointer.after(arrival.stream, progress);
    assert!(found.line.is_none_or(|place| (place.line, place.offset) == (at.lines, at.line_start)));
}

/// Nothing is given up that was not there.
fn gives_up(progress: &mut Progress, further: &CutFurther) {
    let before = *progress;
    let at = before.of(further.cut.stream);
    let is_there = further.cut.end.offset <= at.line_start && further.cut.end.lines <= at.lines;
    assert_eq!(progress.give_up(further), is_there);
    assert!(is_there || *progress == before, "what contradicts itself changes nothing");
}

#[test]
fn no_journal_gives_a_record_that_is_not_sound() {
    fuzz(rounds(), mutated(journals(), &["DBJRNL\x01\0"]), |bytes| check_journal(&bytes));
}

/// A checksum that is right says nothing of what is under it.
#[test]
fn a_body_under_a_right_checksum_is_a_record_or_damage() {
    let mut bodies = Vec::new();
    for journal in journals() {
        let mut at = HEADER.len();
        while let Some((body, length)) = by_the_page(&journal[at..], at as u64) {
            bodies.push(body.to_vec());
            at += length;
        }
    }
    assert!(bodies.len() > 10, "{} bodies", bodies.len());
    let words =
        ["\x01", "\x12", "\x23", "\x04", "null", "-1", "1e99", "18446744073709551615", "\"lost\"", "[", "{"];
    fuzz(rounds(), mutated(bodies, &words), |body| {
        let mut bytes = HEADER.to_vec();
        frame(&body, HEADER.len() as u64, &mut bytes);
        let parsed = parse(&bytes, 0);
        assert!(!matches!(parsed, Parsed::Incomplete), "{} bytes are all there", body.len());
        check_journal(&bytes);
    });
}
