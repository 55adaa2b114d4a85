//! The bytes of records, as they are on disks already.

use super::*;
use crate::line::UnixMicros;
use crate::logfile::AppendFile;
use crate::run::RunSpec;
use proptest::prelude::*;

fn arrival() -> impl Strategy<Value = Arrival> {
    let reasons = [GapReason::DiskFull, GapReason::RunSizeCap, GapReason::Corrupt];
    let what = prop_oneof![
        any::<u64>().prop_map(|unterminated| What::Mark { unterminated }),
        proptest::sample::select(reasons.to_vec()).prop_map(What::Gap),
    ];
    (any::<u64>(), any::<bool>(), any::<u64>(), any::<u64>(), what).prop_map(
        |(after_micros, stderr, lines, bytes, what)| {
            let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
            Arrival { after_micros, stream, lines, bytes, what }
        },
    )
}

fn cut() -> impl Strategy<Value = CutFurther> {
    let half = u64::MAX / 2;
    (any::<[bool; 2]>(), [0..half, 0..half, 0..half, 0..half], any::<u64>(), any::<u64>()).prop_map(
        |([stderr, by_others], [line, offset, more_lines, more_bytes], lines, bytes)| {
            let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
            let begin = Place { lines: line, offset };
            let end = Place { lines: line + more_lines, offset: offset + more_bytes };
            CutFurther { cut: Cut { stream, begin, end, by_others }, lines, bytes }
        },
    )
}

fn encoded(record: &Record, offset: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    record.encode(offset, &mut bytes).unwrap();
    bytes
}

proptest! {
    #[test]
    fn arrivals_survive_their_bytes(arrival in arrival(), offset in 1..u64::MAX) {
        let bytes = encoded(&Record::Arrival(arrival), offset);
        let Parsed::Record(record, length) = parse(&bytes, offset) else { panic!("not parsed") };
        prop_assert_eq!((record, length), (Record::Arrival(arrival), bytes.len()));
    }

    #[test]
    fn a_torn_record_is_incomplete_and_a_flipped_bit_is_noticed(arrival in arrival(), bit in 0usize..400) {
        let bytes = encoded(&Record::Arrival(arrival), 77);
        for length in 0..bytes.len() {
            prop_assert!(matches!(parse(&bytes[..length], 77), Parsed::Incomplete));
        }
        let mut flipped = bytes.clone();
        let bit = bit % (bytes.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(!matches!(parse(&flipped, 77), Parsed::Record(..)));
        prop_assert!(matches!(parse(&bytes, 78), Parsed::Damaged), "a record elsewhere is not one here");
    }

    #[test]
    fn cuts_survive_their_bytes_and_no_flipped_bit_does(cut in cut(), offset in 1..u64::MAX, bit in 0usize..800) {
        let mut bytes = encoded(&Record::Cut(cut), offset);
        let Parsed::Record(record, length) = parse(&bytes, offset) else { panic!("not parsed") };
        prop_assert_eq!((record, length), (Record::Cut(cut), bytes.len()));
        for length in 0..bytes.len() {
            prop_assert!(matches!(parse(&bytes[..length], offset), Parsed::Incomplete));
        }
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(!matches!(parse(&bytes, offset), Parsed::Record(..)));
    }

    #[test]
    fn no_bytes_panic_the_parser(bytes: Vec<u8>, offset: u64) {
        parse(&bytes, offset);
    }
}

/// The format is what is on disks already: these bytes never change.
#[test]
fn golden_bytes_of_a_mark() {
    let mark = Arrival {
        after_micros: 1000,
        stream: Stream::Stderr,
        lines: 1,
        bytes: 100,
        what: What::Mark { unterminated: 0 },
    };
    let bytes = encoded(&Record::Arrival(mark), 8);
    assert_eq!(bytes[..1], [5]);
    assert_eq!(bytes[1..5], checksum(&bytes[5..], 8).to_le_bytes());
    assert_eq!(bytes[5..], [0x12, 0xe8, 0x07, 1, 100]);
    assert_eq!(checksum(&[0x12, 0xe8, 0x07, 1, 100], 8), GOLDEN_CHECKSUM);
}

const GOLDEN_CHECKSUM: u32 = 0x0a17_ba5f;

/// As above: these bytes never change.
#[test]
fn golden_bytes_of_a_cut() {
    let begin = Place { lines: 5, offset: 300 };
    let end = Place { lines: 25, offset: 1300 };
    let cut = Cut { stream: Stream::Stderr, begin, end, by_others: false };
    let bytes = encoded(&Record::Cut(CutFurther { cut, lines: 9, bytes: 500 }), 8);
    let body = [0x15, 5, 0xac, 0x02, 20, 0xe8, 0x07, 9, 0xf4, 0x03];
    assert_eq!((bytes[0], &bytes[5..]), (10, &body[..]));
    assert_eq!(bytes[1..5], GOLDEN_CHECKSUM_OF_CUT.to_le_bytes());
    let by_others = Cut { by_others: true, ..cut };
    let bytes = encoded(&Record::Cut(CutFurther { cut: by_others, lines: 9, bytes: 500 }), 8);
    assert_eq!((bytes[5], &bytes[6..]), (0x55, &body[1..]));
}

const GOLDEN_CHECKSUM_OF_CUT: u32 = 0x6a1b_37ee;

#[test]
fn a_journal_is_read_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let run = JobMetadata::started(RunSpec::new("x".parse().unwrap()), UnixMicros(5));
    let mut writer = JournalWriter::begin(AppendFile::create(path.clone()).unwrap(), &run).unwrap();
    let mark = Arrival {
        after_micros: 1,
        stream: Stream::Stdout,
        lines: 2,
        bytes: 30,
        what: What::Mark { unterminated: 4 },
    };
    let mut end = 0;
    writer.append_arrivals(&[mark], false, |_, at| end = at).unwrap();
    assert_eq!(end, writer.len());
    writer.append_end(&run).unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() as u64, writer.len());
    let mut records = Vec::new();
    let mut offset = 0;
    while let Parsed::Record(record, length) = parse(&bytes[offset..], offset as u64) {
        records.push(record);
        offset += length;
    }
    assert_eq!(
        records,
        [Record::Start(Box::new(run.clone())), Record::Arrival(mark), Record::End(Box::new(run))]
    );
    assert_eq!(offset, bytes.len());
}
