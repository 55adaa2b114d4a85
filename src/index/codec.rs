//! The bytes of the index's record values: a version, the fields in bincode, a CRC32. Nothing else knows bincode.

use bincode::enc::Encoder;
use bincode::error::EncodeError;
use bincode::{Decode, Encode};

use crate::index::RunNumber;
use crate::index::progress::{Cuts, GapAt, LineCheckpoint, Progress, StreamProgress};
use crate::journal::{Cut, Place};
use crate::line::{LineNumber, Stream, UnixMicros};
use crate::run::{Exit, Gap, GapReason, JobMetadata, RunSpec, RunState, StreamTotals, Tombstone};

const VERSION: u8 = 1;
const CHECKSUM: usize = 4;
/// The most bytes that decoding may ask for: without it a damaged length aborts the process.
const LIMIT: usize = 16 * 1024 * 1024;

/// Everything the index keeps of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RunRecord {
    pub(crate) run: JobMetadata,
    pub(crate) gaps: Vec<GapAt>,
    pub(crate) cuts: Cuts,
    /// Whether the run has a journal; a folder by another tool has none.
    pub(crate) has_journal: bool,
    /// Bytes that the run's folder takes up on disk.
    pub(crate) disk_bytes: u64,
    /// Whether nothing of its logs and its journal is left to be compressed.
    pub(crate) compressed: bool,
}

/// A value that can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a value in the index is damaged")]
pub(crate) struct Damaged;

pub(crate) fn encode_run(number: RunNumber, record: &RunRecord) -> Vec<u8> {
    seal(&number.to_le_bytes(), &StoredRun::from(record))
}

pub(crate) fn decode_run(number: RunNumber, bytes: &[u8]) -> Result<RunRecord, Damaged> {
    unseal::<StoredRun>(&number.to_le_bytes(), bytes)?.try_into()
}

/// Places of one stream, in rising order. Of each but the first only what it adds to the one before is kept.
pub(crate) fn encode_checkpoints(number: RunNumber, places: &[LineCheckpoint]) -> Vec<u8> {
    let Some(first) = places.first() else { return Vec::new() };
    seal(&checkpoints_key(number, first.stream, first.line), &Steps(places))
}

pub(crate) fn decode_checkpoints(
    number: RunNumber,
    stream: Stream,
    line: u64,
    bytes: &[u8],
) -> Result<Vec<LineCheckpoint>, Damaged> {
    let stored: Vec<StoredCheckpoint> = unseal(&checkpoints_key(number, stream, line), bytes)?;
    let mut at = LineCheckpoint { stream, line, offset: 0, time: UnixMicros(0) };
    let mut places = Vec::with_capacity(stored.len());
    for step in stored {
        at.line = at.line.wrapping_add(step.lines);
        at.offset = at.offset.wrapping_add(step.bytes);
        at.time = UnixMicros(at.time.0.wrapping_add(step.micros));
        places.push(at);
    }
    Ok(places)
}

fn checkpoints_key(number: RunNumber, stream: Stream, line: u64) -> [u8; 24] {
    let mut key = [0; 24];
    for (part, field) in key.chunks_exact_mut(8).zip([number, stream.index() as u64, line]) {
        part.copy_from_slice(&field.to_le_bytes());
    }
    key
}

pub(crate) fn encode_progress(number: RunNumber, progress: &Progress) -> Vec<u8> {
    let streams = progress.streams.map(|at| StoredStream {
        bytes: at.bytes,
        lines: at.lines,
        unterminated: at.unterminated(),
        dropped_bytes: at.dropped_bytes,
        dropped_lines: at.dropped_lines,
    });
    seal(&number.to_le_bytes(), &StoredProgress { time: progress.time.0, journal: progress.journal, streams })
}

pub(crate) fn decode_progress(number: RunNumber, bytes: &[u8]) -> Result<Progress, Damaged> {
    let stored = unseal::<StoredProgress>(&number.to_le_bytes(), bytes)?;
    let stream = |at: &StoredStream| {
        Ok(StreamProgress {
            bytes: at.bytes,
            lines: at.lines,
            line_start: at.bytes.checked_sub(at.unterminated).ok_or(Damaged)?,
            dropped_bytes: at.dropped_bytes,
            dropped_lines: at.dropped_lines,
        })
    };
    let [stdout, stderr] = &stored.streams;
    Ok(Progress {
        time: UnixMicros(stored.time),
        journal: stored.journal,
        streams: [stream(stdout)?, stream(stderr)?],
    })
}

pub(crate) fn encode_tombstone(stone: &Tombstone) -> Vec<u8> {
    let stored = StoredTombstone {
        evicted_at: stone.evicted_at.0,
        reason: stone.reason.clone(),
        lines: stone.lines,
        bytes: stone.bytes,
    };
    seal(stone.id.as_str().as_bytes(), &stored)
}

pub(crate) fn decode_tombstone(id: crate::run::JobRunId, bytes: &[u8]) -> Result<Tombstone, Damaged> {
    let stored = unseal::<StoredTombstone>(id.as_str().as_bytes(), bytes)?;
    Ok(Tombstone {
        id,
        evicted_at: UnixMicros(stored.evicted_at),
        reason: stored.reason,
        lines: stored.lines,
        bytes: stored.bytes,
    })
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

fn seal(key: &[u8], value: &impl Encode) -> Vec<u8> {
    // Most values fit into that.
    let mut bytes = Vec::with_capacity(256);
    bytes.push(VERSION);
    bincode::encode_into_std_write(value, &mut bytes, config()).expect("writing to memory does not fail");
    bytes.extend_from_slice(&checksum(key, &bytes).to_le_bytes());
    bytes
}

/// The key is covered too: a sound value under another key is not taken for that key's.
fn checksum(key: &[u8], content: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(key);
    crc.update(content);
    crc.finalize()
}

fn unseal<T: Decode<()>>(key: &[u8], bytes: &[u8]) -> Result<T, Damaged> {
    let (content, sum) = bytes.split_at_checked(bytes.len().wrapping_sub(CHECKSUM)).ok_or(Damaged)?;
    if sum != checksum(key, content).to_le_bytes() {
        return Err(Damaged);
    }
    let Some((&VERSION, fields)) = content.split_first() else { return Err(Damaged) };
    match bincode::decode_from_slice(fields, config()) {
        Ok((value, length)) if length == fields.len() => Ok(value),
        _ => Err(Damaged),
    }
}

#[derive(Encode, Decode)]
struct StoredRun {
    id: String,
    command: Vec<String>,
    building_partitions: Vec<String>,
    labels: Vec<(String, String)>,
    host: String,
    created_at: u64,
    started_at: u64,
    state: StoredState,
    totals: [StoredTotals; 2],
    note: Option<String>,
    /// Missing dependencies and fields unknown to this version, as JSON; empty when there are none.
    documents: String,
    gaps: Vec<StoredGap>,
    /// [`HAS_JOURNAL`] and [`COMPRESSED`].
    flags: u8,
    disk_bytes: u64,
}

/// The run has a journal.
const HAS_JOURNAL: u8 = 1;
/// Its logs and its journal are compressed.
const COMPRESSED: u8 = 2;

#[derive(Encode, Decode)]
enum StoredState {
    Running,
    Succeeded { ended: u64 },
    Failed { ended: u64, exit: StoredExit },
    Cancelled { ended: u64, exit: StoredExit },
    Lost { ended: u64 },
}

#[derive(Encode, Decode)]
enum StoredExit {
    Code(i32),
    Signal(i32),
}

#[derive(Encode, Decode)]
struct StoredTotals {
    bytes: u64,
    lines: u64,
    dropped_bytes: u64,
    dropped_lines: u64,
}

#[derive(Encode, Decode)]
struct StoredGap {
    stderr: bool,
    after: u64,
    lines: u64,
    bytes: u64,
    reason: StoredReason,
    offset: u64,
}

#[derive(Encode, Decode)]
enum StoredReason {
    DiskFull,
    RunSizeCap,
    Corrupt,
    /// Not a hole but a cut: the bytes are those of the log that it covers.
    Cut,
    /// The same of one that somebody else made.
    CutByOthers,
}

/// What a place adds to the one before it; the first of a row adds its lines to the row's key, and the rest to 0.
#[derive(Encode, Decode)]
struct StoredCheckpoint {
    lines: u64,
    bytes: u64,
    micros: u64,
}

/// Places as the steps between them, which is a `Vec<StoredCheckpoint>` once it is read.
struct Steps<'a>(&'a [LineCheckpoint]);

impl Encode for Steps<'_> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        let Some(first) = self.0.first() else { return 0u64.encode(encoder) };
        (self.0.len() as u64).encode(encoder)?;
        let mut before = LineCheckpoint { offset: 0, time: UnixMicros(0), ..*first };
        for at in self.0 {
            let step = StoredCheckpoint {
                lines: at.line.wrapping_sub(before.line),
                bytes: at.offset.wrapping_sub(before.offset),
                micros: at.time.0.wrapping_sub(before.time.0),
            };
            step.encode(encoder)?;
            before = *at;
        }
        Ok(())
    }
}

#[derive(Encode, Decode)]
struct StoredProgress {
    time: u64,
    journal: u64,
    streams: [StoredStream; 2],
}

#[derive(Encode, Decode)]
struct StoredStream {
    bytes: u64,
    lines: u64,
    unterminated: u64,
    dropped_bytes: u64,
    dropped_lines: u64,
}

#[derive(Encode, Decode)]
struct StoredTombstone {
    evicted_at: u64,
    reason: String,
    lines: u64,
    bytes: u64,
}

/// The rarely used parts of a run's document.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Documents {
    missing_deps: Vec<crate::run::MissingDeps>,
    other: serde_json::Map<String, serde_json::Value>,
}

impl From<&RunRecord> for StoredRun {
    fn from(record: &RunRecord) -> Self {
        let run = &record.run;
        let documents = if run.missing_deps.is_empty() && run.other.is_empty() {
            String::new()
        } else {
            let documents = Documents { missing_deps: run.missing_deps.clone(), other: run.other.clone() };
            serde_json::to_string(&documents).expect("strings and numbers are always JSON")
        };
        Self {
            id: run.id().to_string(),
            command: run.spec.command.clone(),
            building_partitions: run.spec.building_partitions.clone(),
            labels: run.spec.labels.clone().into_iter().collect(),
            host: run.spec.host.clone(),
            created_at: run.spec.created_at.0,
            started_at: run.started_at.0,
            state: run.state.into(),
            totals: [run.stdout.into(), run.stderr.into()],
            note: run.note.clone(),
            documents,
            gaps: record
                .gaps
                .iter()
                .map(StoredGap::from)
                .chain(record.cuts.iter().map(StoredGap::from))
                .collect(),
            flags: HAS_JOURNAL * u8::from(record.has_journal) + COMPRESSED * u8::from(record.compressed),
            disk_bytes: record.disk_bytes,
        }
    }
}

impl TryFrom<StoredRun> for RunRecord {
    type Error = Damaged;

    fn try_from(stored: StoredRun) -> Result<Self, Damaged> {
        let documents: Documents = if stored.documents.is_empty() {
            Documents::default()
        } else {
            serde_json::from_str(&stored.documents).map_err(|_| Damaged)?
        };
        let [stdout, stderr] = stored.totals;
        let run = JobMetadata {
            spec: RunSpec {
                id: stored.id.parse().map_err(|_| Damaged)?,
                command: stored.command,
                building_partitions: stored.building_partitions,
                labels: stored.labels.into_iter().collect(),
                host: stored.host,
                created_at: UnixMicros(stored.created_at),
            },
            started_at: UnixMicros(stored.started_at),
            state: stored.state.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            missing_deps: documents.missing_deps,
            note: stored.note,
            other: documents.other,
        };
        let (mut gaps, mut cuts) = (Vec::new(), Cuts::default());
        for stored in stored.gaps {
            match GapOrCut::try_from(stored)? {
                GapOrCut::Gap(gap) => gaps.push(gap),
                GapOrCut::Cut(cut) => cuts.take(cut),
            }
        }
        if stored.flags > HAS_JOURNAL + COMPRESSED {
            return Err(Damaged);
        }
        let has = |flag| stored.flags & flag != 0;
        let (has_journal, compressed) = (has(HAS_JOURNAL), has(COMPRESSED));
        Ok(Self { run, gaps, cuts, has_journal, disk_bytes: stored.disk_bytes, compressed })
    }
}

impl From<RunState> for StoredState {
    fn from(state: RunState) -> Self {
        match state {
            RunState::Running => Self::Running,
            RunState::Succeeded { ended } => Self::Succeeded { ended: ended.0 },
            RunState::Failed { ended, exit } => Self::Failed { ended: ended.0, exit: exit.into() },
            RunState::Cancelled { ended, exit } => Self::Cancelled { ended: ended.0, exit: exit.into() },
            RunState::Lost { ended } => Self::Lost { ended: ended.0 },
        }
    }
}

impl From<StoredState> for RunState {
    fn from(state: StoredState) -> Self {
        match state {
            StoredState::Running => Self::Running,
            StoredState::Succeeded { ended } => Self::Succeeded { ended: UnixMicros(ended) },
            StoredState::Failed { ended, exit } => {
                Self::Failed { ended: UnixMicros(ended), exit: exit.into() }
            }
            StoredState::Cancelled { ended, exit } => {
                Self::Cancelled { ended: UnixMicros(ended), exit: exit.into() }
            }
            StoredState::Lost { ended } => Self::Lost { ended: UnixMicros(ended) },
        }
    }
}

impl From<Exit> for StoredExit {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Code(code) => Self::Code(code),
            Exit::Signal(signal) => Self::Signal(signal),
        }
    }
}

impl From<StoredExit> for Exit {
    fn from(exit: StoredExit) -> Self {
        match exit {
            StoredExit::Code(code) => Self::Code(code),
            StoredExit::Signal(signal) => Self::Signal(signal),
        }
    }
}

impl From<StreamTotals> for StoredTotals {
    fn from(totals: StreamTotals) -> Self {
        let StreamTotals { bytes, lines, dropped_bytes, dropped_lines } = totals;
        Self { bytes, lines, dropped_bytes, dropped_lines }
    }
}

impl From<StoredTotals> for StreamTotals {
    fn from(totals: StoredTotals) -> Self {
        let StoredTotals { bytes, lines, dropped_bytes, dropped_lines } = totals;
        Self { bytes, lines, dropped_bytes, dropped_lines }
    }
}

impl From<&GapAt> for StoredGap {
    fn from(at: &GapAt) -> Self {
        Self {
            stderr: at.gap.stream == Stream::Stderr,
            after: at.gap.after.0,
            lines: at.gap.lines,
            bytes: at.gap.bytes,
            reason: match at.gap.reason {
                GapReason::DiskFull => StoredReason::DiskFull,
                GapReason::RunSizeCap => StoredReason::RunSizeCap,
                GapReason::Corrupt => StoredReason::Corrupt,
            },
            offset: at.offset,
        }
    }
}

impl From<Cut> for StoredGap {
    fn from(cut: Cut) -> Self {
        Self {
            stderr: cut.stream == Stream::Stderr,
            after: cut.begin.lines,
            lines: cut.lines(),
            bytes: cut.bytes(),
            reason: if cut.by_others { StoredReason::CutByOthers } else { StoredReason::Cut },
            offset: cut.begin.offset,
        }
    }
}

enum GapOrCut {
    Gap(GapAt),
    Cut(Cut),
}

impl TryFrom<StoredGap> for GapOrCut {
    type Error = Damaged;

    fn try_from(stored: StoredGap) -> Result<Self, Damaged> {
        let StoredGap { stderr, after, lines, bytes, reason, offset } = stored;
        let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
        let reason = match reason {
            StoredReason::DiskFull => GapReason::DiskFull,
            StoredReason::RunSizeCap => GapReason::RunSizeCap,
            StoredReason::Corrupt => GapReason::Corrupt,
            StoredReason::Cut | StoredReason::CutByOthers => {
                let by_others = matches!(reason, StoredReason::CutByOthers);
                let begin = Place { lines: after, offset };
                let end = Place {
                    lines: after.checked_add(lines).ok_or(Damaged)?,
                    offset: offset.checked_add(bytes).ok_or(Damaged)?,
                };
                return Ok(Self::Cut(Cut { stream, begin, end, by_others }));
            }
        };
        let gap = Gap { stream, after: LineNumber(after), lines, bytes, reason };
        Ok(Self::Gap(GapAt { gap, offset }))
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests;
