//! The bytes of rows, as they are in indexes already.

use super::*;
use crate::run::{MissingDeps, PartitionRef};

fn record() -> RunRecord {
    let mut spec = RunSpec::new("run-1".parse().unwrap()).command(["make", "-j2"]);
    spec.building_partitions.push("data/alpha".into());
    spec.labels.insert("branch".into(), "main".into());
    spec.host = "builder".into();
    spec.created_at = UnixMicros(7);
    let mut run = JobMetadata::started(spec, UnixMicros(1_000));
    run.state = RunState::Failed { ended: UnixMicros(9_000), exit: Exit::Signal(9) };
    run.stdout = StreamTotals { bytes: 10, lines: 2, dropped_bytes: 5, dropped_lines: 1 };
    run.missing_deps =
        vec![MissingDeps { impacted: vec![], missing: vec![PartitionRef { name: "b".into() }] }];
    run.other.insert("cost".into(), 3.into());
    let gap =
        Gap { stream: Stream::Stderr, after: LineNumber(1), lines: 1, bytes: 5, reason: GapReason::DiskFull };
    let gaps = vec![GapAt { gap, offset: 4 }];
    RunRecord { run, gaps, cuts: Cuts::default(), has_journal: true, disk_bytes: 8192, compressed: false }
}

fn cut_record(by_others: bool) -> RunRecord {
    let mut record = record();
    for stream in Stream::BOTH {
        let begin = Place { lines: 3, offset: 90 };
        let end = Place { lines: 7, offset: 500 };
        record.cuts.take(Cut { stream, begin, end, by_others });
    }
    record
}

#[test]
fn a_record_survives_its_bytes() {
    assert_eq!(decode_run(1, &encode_run(1, &record())), Ok(record()));
    for by_others in [false, true] {
        assert_eq!(decode_run(1, &encode_run(1, &cut_record(by_others))), Ok(cut_record(by_others)));
    }
    for (has_journal, compressed) in [(false, false), (false, true), (true, true)] {
        let record = RunRecord { has_journal, compressed, ..record() };
        assert_eq!(decode_run(1, &encode_run(1, &record)), Ok(record));
    }
}

#[test]
fn golden_bytes_of_a_record() {
    let mut record = record();
    record.run.missing_deps.clear();
    record.run.other.clear();
    let hex: String = encode_run(1, &record).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN_RUN);
    record.cuts = cut_record(false).cuts;
    let hex: String = encode_run(1, &record).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN_RUN_WITH_CUTS);
}

/// As above: these bytes never change.
const GOLDEN_RUN_WITH_CUTS: &str = "010572756e2d3102046d616b65032d6a32010a646174612f616c7068610106\
    6272616e6368046d61696e076275696c64657207fbe80302fb282301120a02050100000000000003010101050004000304fb9a01\
    035a010304fb9a01035a01fb00202115fa41";

/// The format is what is on disks already: these bytes never change.
const GOLDEN_RUN: &str = "010572756e2d3102046d616b65032d6a32010a646174612f616c7068610106\
    6272616e6368046d61696e076275696c64657207fbe80302fb282301120a0205010000000000000101010105000401fb0020\
    d537606e";

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let bytes = encode_run(1, &record());
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(decode_run(1, &flipped), Err(Damaged));
    }
    assert_eq!(decode_run(2, &bytes), Err(Damaged), "the row of another run");
    for length in 0..bytes.len() {
        assert_eq!(decode_run(1, &bytes[..length]), Err(Damaged));
    }
}

#[test]
fn a_length_that_asks_for_all_memory_is_refused() {
    let mut bytes = vec![VERSION, 253, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
    bytes.extend_from_slice(&checksum(&1u64.to_le_bytes(), &bytes).to_le_bytes());
    assert_eq!(decode_run(1, &bytes), Err(Damaged));
}

#[test]
fn golden_bytes_of_checkpoints() {
    let at =
        |line, offset, time| LineCheckpoint { stream: Stream::Stderr, line, offset, time: UnixMicros(time) };
    let places =
        [at(700, 65_540, 0x1122_3344_5566), at(1_400, 131_080, 0x1122_3344_5570), at(1_401, 200_000, 0)];
    let bytes = encode_checkpoints(3, &places);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN_CHECKPOINTS);
    assert_eq!(decode_checkpoints(3, Stream::Stderr, 700, &bytes), Ok(places.to_vec()));
    for (number, stream, line) in
        [(4, Stream::Stderr, 700), (3, Stream::Stdout, 700), (3, Stream::Stderr, 701)]
    {
        assert_eq!(
            decode_checkpoints(number, stream, line, &bytes),
            Err(Damaged),
            "the row of another place"
        );
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(decode_checkpoints(3, Stream::Stderr, 700, &flipped), Err(Damaged));
    }
}

/// As above: these bytes never change.
const GOLDEN_CHECKPOINTS: &str =
    "010300fc04000100fd6655443322110000fbbc02fc040001000a01fc380d0100fd90aabbccddeeffffaec9868f";

#[test]
fn progress_and_tombstones_survive_their_bytes() {
    let mut progress = Progress::start(UnixMicros(5), 100);
    progress.streams[1] =
        StreamProgress { bytes: 50, lines: 3, line_start: 44, dropped_bytes: 1, dropped_lines: 1 };
    assert_eq!(decode_progress(4, &encode_progress(4, &progress)), Ok(progress));
    let stone = Tombstone {
        id: "x".parse().unwrap(),
        evicted_at: UnixMicros(1),
        reason: "older than 7 days".into(),
        lines: 2,
        bytes: 3,
    };
    assert_eq!(decode_tombstone(stone.id.clone(), &encode_tombstone(&stone)), Ok(stone));
}
