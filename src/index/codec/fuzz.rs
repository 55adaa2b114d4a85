//! Values of the index that are almost right.

use std::fmt::Debug;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::fuzz::{fixture, fuzz, in_bounded_memory, in_memory_of, mutated, rounds};
use crate::run::{MissingDeps, PartitionRef};

/// Of the row that every value here is of.
const NUMBER: RunNumber = 7;

/// The four kinds of values.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Run(Box<RunRecord>),
    Checkpoints(Vec<LineCheckpoint>),
    Progress(Progress),
    Tombstone(Tombstone),
}

/// A kind of value, with what else its row's key says.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Run,
    Checkpoints(Stream, u64),
    Progress,
    Tombstone(crate::run::JobRunId),
}

impl Value {
    fn kind(&self) -> Kind {
        match self {
            Self::Run(_) => Kind::Run,
            Self::Checkpoints(places) => Kind::Checkpoints(places[0].stream, places[0].line),
            Self::Progress(_) => Kind::Progress,
            Self::Tombstone(stone) => Kind::Tombstone(stone.id.clone()),
        }
    }

    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Run(record) => encode_run(NUMBER, record),
            Self::Checkpoints(places) => encode_checkpoints(NUMBER, places),
            Self::Progress(progress) => encode_progress(NUMBER, progress),
            Self::Tombstone(stone) => encode_tombstone(stone),
        }
    }
}

impl Kind {
    fn decode(&self, bytes: &[u8]) -> Result<Value, Damaged> {
        match self {
            Self::Run => decode_run(NUMBER, bytes).map(|record| Value::Run(Box::new(record))),
            Self::Checkpoints(stream, line) => {
                decode_checkpoints(NUMBER, *stream, *line, bytes).map(Value::Checkpoints)
            }
            Self::Progress => decode_progress(NUMBER, bytes).map(Value::Progress),
            Self::Tombstone(id) => decode_tombstone(id.clone(), bytes).map(Value::Tombstone),
        }
    }

    fn key(&self) -> Vec<u8> {
        match self {
            Self::Run | Self::Progress => NUMBER.to_le_bytes().to_vec(),
            Self::Checkpoints(stream, line) => checkpoints_key(NUMBER, *stream, *line).to_vec(),
            Self::Tombstone(id) => id.as_str().as_bytes().to_vec(),
        }
    }
}

fn stream() -> impl Strategy<Value = Stream> {
    any::<bool>().prop_map(|stderr| if stderr { Stream::Stderr } else { Stream::Stdout })
}

fn time() -> impl Strategy<Value = UnixMicros> {
    any::<u64>().prop_map(UnixMicros)
}

fn id() -> impl Strategy<Value = crate::run::JobRunId> {
    "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}".prop_map(|id| id.parse().unwrap())
}

fn state() -> impl Strategy<Value = RunState> {
    let exit = prop_oneof![any::<i32>().prop_map(Exit::Code), any::<i32>().prop_map(Exit::Signal)];
    prop_oneof![
        Just(RunState::Running),
        time().prop_map(|ended| RunState::Succeeded { ended }),
        (time(), exit.clone()).prop_map(|(ended, exit)| RunState::Failed { ended, exit }),
        (time(), exit).prop_map(|(ended, exit)| RunState::Cancelled { ended, exit }),
        time().prop_map(|ended| RunState::Lost { ended }),
    ]
}

fn gap() -> impl Strategy<Value = GapAt> {
    let reasons = [GapReason::DiskFull, GapReason::RunSizeCap, GapReason::Corrupt];
    (stream(), any::<[u64; 4]>(), proptest::sample::select(reasons.to_vec())).prop_map(
        |(stream, [after, lines, bytes, offset], reason)| GapAt {
            gap: Gap { stream, after: LineNumber(after), lines, bytes, reason },
            offset,
        },
    )
}

fn cuts() -> impl Strategy<Value = Cuts> {
    vec((stream(), any::<[u32; 4]>()), 0..3).prop_map(|found| {
        let mut cuts = Cuts::default();
        for (stream, numbers) in found {
            let [lines, offset, more_lines, more_bytes] = numbers.map(u64::from);
            let begin = Place { lines, offset };
            let end = Place { lines: lines + more_lines, offset: offset + more_bytes };
            cuts.take(Cut { stream, begin, end, by_others: lines % 2 == 0 });
        }
        cuts
    })
}

fn record() -> impl Strategy<Value = RunRecord> {
    let texts = || vec(any::<String>(), 0..4);
    let spec =
        (id(), texts(), texts(), btree_map(any::<String>(), any::<String>(), 0..4), any::<String>(), time());
    let totals = || {
        any::<[u64; 4]>().prop_map(|[bytes, lines, dropped_bytes, dropped_lines]| StreamTotals {
            bytes,
            lines,
            dropped_bytes,
            dropped_lines,
        })
    };
    let refs = || texts().prop_map(|names| names.into_iter().map(|name| PartitionRef { name }).collect());
    let deps = (refs(), refs()).prop_map(|(impacted, missing)| MissingDeps { impacted, missing });
    let run = (spec, time(), state(), totals(), totals(), vec(deps, 0..3), any::<Option<String>>(), texts());
    let rest = any::<(bool, u64, bool)>();
    (run, vec(gap(), 0..4), cuts(), rest).prop_map(
        |(run, gaps, cuts, (has_journal, disk_bytes, compressed))| {
            let (spec, started_at, state, stdout, stderr, missing_deps, note, other) = run;
            let (id, command, building_partitions, labels, host, created_at) = spec;
            let spec = RunSpec { id, command, building_partitions, labels, host, created_at };
            let other = other.into_iter().map(|name| (name.clone(), name.into())).collect();
            let run = JobMetadata { spec, started_at, state, stdout, stderr, missing_deps, note, other };
            RunRecord { run, gaps, cuts, has_journal, disk_bytes, compressed }
        },
    )
}

fn value() -> impl Strategy<Value = Value> {
    let places = (stream(), vec(any::<[u64; 3]>(), 1..18)).prop_map(|(stream, places)| {
        places
            .into_iter()
            .map(|[line, offset, time]| LineCheckpoint { stream, line, offset, time: UnixMicros(time) })
            .collect()
    });
    let of_stream = any::<[u64; 5]>().prop_map(|[one, other, lines, dropped_bytes, dropped_lines]| {
        let (line_start, bytes) = (one.min(other), one.max(other));
        StreamProgress { bytes, lines, line_start, dropped_bytes, dropped_lines }
    });
    let progress = (time(), any::<u64>(), [of_stream.clone(), of_stream])
        .prop_map(|(time, journal, streams)| Progress { time, journal, streams });
    let stone = (id(), time(), any::<String>(), any::<u64>(), any::<u64>()).prop_map(
        |(id, evicted_at, reason, lines, bytes)| Tombstone { id, evicted_at, reason, lines, bytes },
    );
    prop_oneof![
        record().prop_map(|record| Value::Run(Box::new(record))),
        places.prop_map(Value::Checkpoints),
        progress.prop_map(Value::Progress),
        stone.prop_map(Value::Tombstone),
    ]
}

/// Values of all kinds, with the fixture's documents among them.
fn samples() -> Vec<Value> {
    let mut samples: Vec<_> = ["ok", "failed", "plain"]
        .map(|run| {
            let run = serde_json::from_slice(&fixture(&format!("v1/job_runs/{run}/metadata.json"))).unwrap();
            Value::Run(Box::new(RunRecord {
                run,
                gaps: Vec::new(),
                cuts: Cuts::default(),
                has_journal: true,
                disk_bytes: 4096,
                compressed: false,
            }))
        })
        .into();
    let place =
        |line, offset| LineCheckpoint { stream: Stream::Stderr, line, offset, time: UnixMicros(offset) };
    samples.push(Value::Checkpoints(vec![place(700, 65_540), place(1_400, 131_080), place(1_401, 1 << 40)]));
    let mut progress = Progress::start(UnixMicros(5), 100);
    progress.streams[0] =
        StreamProgress { bytes: 1 << 33, lines: 300, line_start: 44, ..StreamProgress::default() };
    samples.push(Value::Progress(progress));
    let reason = "older than runs are kept".to_owned();
    let (id, evicted_at) = ("x".parse().unwrap(), UnixMicros(1 << 50));
    samples.push(Value::Tombstone(Tombstone { id, evicted_at, reason, lines: 2, bytes: 300 }));
    samples
}

#[test]
fn every_value_is_read_as_it_was_written() {
    fuzz(rounds() / 4, value(), |value| {
        let bytes = value.encode();
        assert_eq!(value.kind().decode(&bytes), Ok(value));
    });
}

/// No change is taken for a value; not even one for another kind's.
#[test]
fn a_changed_value_is_damaged() {
    let samples = samples();
    let kinds: Vec<_> = samples.iter().map(Value::kind).collect();
    let sound: Vec<_> = samples.iter().map(Value::encode).collect();
    let inputs = (mutated(sound.clone(), &[]), proptest::sample::select(kinds));
    fuzz(rounds(), inputs, |(bytes, kind)| {
        let decoded = in_bounded_memory(&bytes, |bytes| kind.decode(bytes));
        let is_sound =
            sound.iter().zip(&samples).any(|(sound, of)| *sound == bytes && of.kind().key() == kind.key());
        assert!(is_sound || decoded == Err(Damaged), "{decoded:?}");
    });
}

/// A checksum that is right says nothing of what is under it: any fields are a value that survives, or damaged. A length
/// among them is believed up to [`LIMIT`], and no further.
#[test]
fn fields_under_a_right_checksum_are_a_value_or_damaged() {
    let samples = samples();
    let kinds: Vec<_> = samples.iter().map(Value::kind).collect();
    let fields = samples.iter().map(|sample| {
        let bytes = sample.encode();
        bytes[1..bytes.len() - CHECKSUM].to_vec()
    });
    // Lengths of up to 2, 4 and 8 bytes.
    let words = ["\u{fb}\x7f\x7f", "\x7f\x7f\x7f\x7f\x7f"];
    let inputs = (mutated(fields.collect(), &words), proptest::sample::select(kinds));
    fuzz(rounds(), inputs, |(fields, kind)| {
        let mut bytes = vec![VERSION];
        bytes.extend(&fields);
        bytes.extend(checksum(&kind.key(), &bytes).to_le_bytes());
        let Ok(value) = in_memory_of(LIMIT + 128 * bytes.len(), || kind.decode(&bytes)) else { return };
        if value != Value::Checkpoints(Vec::new()) {
            assert_eq!(value.kind().decode(&value.encode()), Ok(value));
        }
    });
}
