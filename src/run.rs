//! A job run: its id, what was asked for, how it ended, and the document that says so.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::line::{LineNumber, Stream, UnixMicros};

/// The version of the on-disk format that this build writes.
pub const FORMAT_VERSION: u32 = 1;

/// The name of a run: 1 to 128 characters of `[A-Za-z0-9._-]`, not starting with `.` or `-`.
///
/// It can only be built valid, and it is the only thing given from outside that ever becomes part of a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobRunId(Arc<str>);

impl JobRunId {
    /// The longest id, in characters.
    pub const MAX_LENGTH: usize = 128;

    /// A new id that sorts after those made before it (UUIDv7).
    #[must_use]
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().hyphenated().to_string().into())
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is not a valid run id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a run id: {reason}")]
pub struct InvalidId {
    /// The text as it was given, cut to a printable length.
    pub given: String,
    /// The rule that it breaks.
    pub reason: &'static str,
}

impl FromStr for JobRunId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let reason = if text.is_empty() {
            "it is empty"
        } else if text.len() > Self::MAX_LENGTH {
            "it is longer than 128 characters"
        } else if text.starts_with(['.', '-']) {
            "it starts with '.' or '-'"
        } else if !text.bytes().all(allowed) {
            "only A-Z, a-z, 0-9, '.', '_' and '-' are allowed"
        } else {
            return Ok(Self(text.into()));
        };
        Err(InvalidId { given: text.chars().take(Self::MAX_LENGTH + 1).collect(), reason })
    }
}

impl TryFrom<String> for JobRunId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<JobRunId> for String {
    fn from(id: JobRunId) -> Self {
        id.as_str().to_owned()
    }
}

impl Borrow<str> for JobRunId {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl AsRef<str> for JobRunId {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Display for JobRunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for JobRunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// What a run is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunSpec {
    /// The run's id.
    pub id: JobRunId,
    /// The command and its arguments; empty when the caller has none to name.
    pub command: Vec<String>,
    /// The partitions that the run is building.
    pub building_partitions: Vec<String>,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// The machine that the run is on.
    pub host: String,
    /// When the run was asked for.
    pub created_at: UnixMicros,
}

impl RunSpec {
    /// A run with this id on this machine, asked for now.
    #[must_use]
    pub fn new(id: JobRunId) -> Self {
        Self {
            id,
            command: Vec::new(),
            building_partitions: Vec::new(),
            labels: BTreeMap::new(),
            host: host_name(),
            created_at: UnixMicros::now(),
        }
    }

    /// The same with this command.
    #[must_use]
    pub fn command<S: Into<String>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.command = command.into_iter().map(Into::into).collect();
        self
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// What a shell would report: the code, or 128 + signal.
    #[must_use]
    pub const fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Where a run stands. A state carries its own data, so a finished run without an end cannot be written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The run goes on.
    Running,
    /// The command returned 0.
    Succeeded {
        /// When it ended.
        ended: UnixMicros,
    },
    /// The command returned another code, or a signal that nobody here sent killed it.
    Failed {
        /// When it ended.
        ended: UnixMicros,
        /// How.
        exit: Exit,
    },
    /// The run was cancelled.
    Cancelled {
        /// When it ended.
        ended: UnixMicros,
        /// How.
        exit: Exit,
    },
    /// Its writer died before the end, so how the command ended is not known.
    Lost {
        /// When the last sign of it was written.
        ended: UnixMicros,
    },
}

impl RunState {
    /// The state of a command that ended so on its own.
    #[must_use]
    pub const fn from_exit(exit: Exit, ended: UnixMicros) -> Self {
        match exit {
            Exit::Code(0) => Self::Succeeded { ended },
            exit => Self::Failed { ended, exit },
        }
    }

    /// The bare kind of state.
    #[must_use]
    pub const fn kind(self) -> StateKind {
        match self {
            Self::Running => StateKind::Running,
            Self::Succeeded { .. } => StateKind::Succeeded,
            Self::Failed { .. } => StateKind::Failed,
            Self::Cancelled { .. } => StateKind::Cancelled,
            Self::Lost { .. } => StateKind::Lost,
        }
    }

    /// When the run ended; `None` while it goes on.
    #[must_use]
    pub const fn ended(self) -> Option<UnixMicros> {
        match self {
            Self::Running => None,
            Self::Succeeded { ended }
            | Self::Failed { ended, .. }
            | Self::Cancelled { ended, .. }
            | Self::Lost { ended } => Some(ended),
        }
    }

    /// The same state with another end; a run that goes on has none.
    #[must_use]
    pub(crate) const fn ended_at(self, ended: UnixMicros) -> Self {
        match self {
            Self::Running => Self::Running,
            Self::Succeeded { .. } => Self::Succeeded { ended },
            Self::Failed { exit, .. } => Self::Failed { ended, exit },
            Self::Cancelled { exit, .. } => Self::Cancelled { ended, exit },
            Self::Lost { .. } => Self::Lost { ended },
        }
    }

    /// How the process ended, where that is known.
    #[must_use]
    pub const fn exit(self) -> Option<Exit> {
        match self {
            Self::Succeeded { .. } => Some(Exit::Code(0)),
            Self::Failed { exit, .. } | Self::Cancelled { exit, .. } => Some(exit),
            Self::Running | Self::Lost { .. } => None,
        }
    }

    /// Whether the run is over.
    #[must_use]
    pub const fn is_over(self) -> bool {
        self.ended().is_some()
    }
}

/// The name of a [`RunState`], as in `metadata.json` and in filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateKind {
    /// See [`RunState::Running`].
    Running,
    /// See [`RunState::Succeeded`].
    Succeeded,
    /// See [`RunState::Failed`].
    Failed,
    /// See [`RunState::Cancelled`].
    Cancelled,
    /// See [`RunState::Lost`].
    Lost,
}

impl StateKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled, Self::Lost];

    /// The name in lower case.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for StateKind {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(UnknownState)
    }
}

/// The text names no state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected running, succeeded, failed, cancelled or lost")]
pub struct UnknownState;

/// How much a stream holds, and how much of it could not be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTotals {
    /// Bytes in the log file.
    pub bytes: u64,
    /// Lines the job printed, an unterminated last one and those that could not be kept included.
    pub lines: u64,
    /// Bytes the job printed that could not be kept.
    #[serde(default)]
    pub dropped_bytes: u64,
    /// Lines the job printed that could not be kept.
    #[serde(default)]
    pub dropped_lines: u64,
}

/// A part of a stream that could not be kept. It always covers whole lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The stream.
    pub stream: Stream,
    /// The last line before the hole: the hole is lines `after + 1` to `after + lines`.
    pub after: LineNumber,
    /// Lines lost.
    pub lines: u64,
    /// Bytes lost.
    pub bytes: u64,
    /// Why.
    pub reason: GapReason,
}

/// Why a part of a stream could not be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapReason {
    /// The disk was full, or refused the write.
    DiskFull,
    /// The run reached the most that one run may keep.
    RunSizeCap,
    /// The bytes were written once, and are no longer what they were.
    Corrupt,
}

/// A job's complaint that what it reads is not there, from a `DATABUILD_MISSING_DEPS_JSON:` line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingDeps {
    /// The partitions that can't be built.
    pub impacted: Vec<PartitionRef>,
    /// The partitions that they lack.
    pub missing: Vec<PartitionRef>,
}

/// The name of a partition, `{"ref": "data/alpha"}` in JSON; a bare string is accepted too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "PartitionRefJson")]
pub struct PartitionRef {
    /// The partition's name.
    #[serde(rename = "ref")]
    pub name: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PartitionRefJson {
    Bare(String),
    Object {
        #[serde(rename = "ref")]
        name: String,
    },
}

impl From<PartitionRefJson> for PartitionRef {
    fn from(json: PartitionRefJson) -> Self {
        let (PartitionRefJson::Bare(name) | PartitionRefJson::Object { name }) = json;
        Self { name }
    }
}

/// All that is known of a run: the content of `metadata.json`, and what the API tells of a run at any moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "MetadataJson", into = "MetadataJson")]
pub struct JobMetadata {
    /// What the run was started with.
    pub spec: RunSpec,
    /// When it started.
    pub started_at: UnixMicros,
    /// Where it stands.
    pub state: RunState,
    /// What standard output holds.
    pub stdout: StreamTotals,
    /// What standard error holds.
    pub stderr: StreamTotals,
    /// What the job said it lacks.
    pub missing_deps: Vec<MissingDeps>,
    /// What the runner has to say beside the exit code: that the command could not be started, that output of
    /// processes which outlived it was cut off.
    pub note: Option<String>,
    /// Fields of an existing `metadata.json` that this version does not know; they are kept.
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl JobMetadata {
    /// A run that starts at this moment.
    #[must_use]
    pub fn started(spec: RunSpec, started_at: UnixMicros) -> Self {
        Self {
            spec,
            started_at,
            state: RunState::Running,
            stdout: StreamTotals::default(),
            stderr: StreamTotals::default(),
            missing_deps: Vec::new(),
            note: None,
            other: serde_json::Map::new(),
        }
    }

    /// The run's id.
    #[must_use]
    pub const fn id(&self) -> &JobRunId {
        &self.spec.id
    }

    /// What this stream holds.
    #[must_use]
    pub const fn totals(&self, stream: Stream) -> StreamTotals {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }

    /// Milliseconds from start to end; `None` while the run goes on.
    #[must_use]
    pub fn duration_ms(&self) -> Option<u64> {
        self.state.ended().map(|ended| ended.millis_since(self.started_at))
    }

    /// The event that ends a stream of this run.
    #[must_use]
    pub fn completion(&self) -> Completion {
        let exit = self.state.exit();
        Completion {
            exit_code: exit.and_then(|exit| if let Exit::Code(code) = exit { Some(code) } else { None }),
            signal: exit.and_then(|exit| if let Exit::Signal(signal) = exit { Some(signal) } else { None }),
            duration_ms: self.duration_ms(),
            state: self.state.kind(),
            lines: self.stdout.lines + self.stderr.lines,
            dropped_bytes: self.stdout.dropped_bytes + self.stderr.dropped_bytes,
            note: self.note.clone(),
        }
    }
}

/// What a follower is told at the end of a run: the data of the `complete` event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The exit code; null when a signal killed the command or the run is lost.
    pub exit_code: Option<i32>,
    /// The signal that killed the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Milliseconds from start to end.
    pub duration_ms: Option<u64>,
    /// How the run ended.
    pub state: StateKind,
    /// Lines in both streams.
    pub lines: u64,
    /// Bytes in both streams that could not be kept.
    pub dropped_bytes: u64,
    /// See [`JobMetadata::note`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// `metadata.json` as it is written: flat, with every field named as in the specification.
#[derive(Clone, Serialize, Deserialize)]
struct MetadataJson {
    #[serde(default = "unversioned")]
    format_version: u32,
    job_run_id: JobRunId,
    state: Option<StateKind>,
    #[serde(default)]
    exit_code: Option<i32>,
    #[serde(default)]
    signal: Option<i32>,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    building_partitions: Vec<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    host: String,
    #[serde(default)]
    created_at: Option<UnixMicros>,
    #[serde(default)]
    started_at: Option<UnixMicros>,
    #[serde(default)]
    finished_at: Option<UnixMicros>,
    #[serde(default)]
    duration_ms: Option<u64>,
    #[serde(default)]
    stdout: StreamTotals,
    #[serde(default)]
    stderr: StreamTotals,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    missing_deps: Vec<MissingDeps>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    #[serde(flatten)]
    other: serde_json::Map<String, serde_json::Value>,
}

const fn unversioned() -> u32 {
    FORMAT_VERSION
}

impl From<JobMetadata> for MetadataJson {
    fn from(run: JobMetadata) -> Self {
        let completion = run.completion();
        Self {
            format_version: FORMAT_VERSION,
            state: Some(completion.state),
            exit_code: completion.exit_code,
            signal: completion.signal,
            finished_at: run.state.ended(),
            duration_ms: completion.duration_ms,
            job_run_id: run.spec.id,
            command: run.spec.command,
            building_partitions: run.spec.building_partitions,
            labels: run.spec.labels,
            host: run.spec.host,
            created_at: Some(run.spec.created_at),
            started_at: Some(run.started_at),
            stdout: run.stdout,
            stderr: run.stderr,
            missing_deps: run.missing_deps,
            note: run.note,
            other: run.other,
        }
    }
}

/// Why a `metadata.json` says nothing consistent.
#[derive(Debug, thiserror::Error)]
#[error("state {state} without {lacks}")]
struct InconsistentMetadata {
    state: StateKind,
    lacks: &'static str,
}

impl TryFrom<MetadataJson> for JobMetadata {
    type Error = InconsistentMetadata;

    /// A file by another tool may lack times and state: the state then follows from the exit code, and missing
    /// times from those that are there.
    fn try_from(json: MetadataJson) -> Result<Self, InconsistentMetadata> {
        let known = json.started_at.or(json.created_at).or(json.finished_at).unwrap_or_default();
        let ended = json.finished_at.or_else(|| {
            json.duration_ms.map(|ms| UnixMicros(known.0.saturating_add(ms.saturating_mul(1000))))
        });
        let exit = json.signal.map(Exit::Signal).or(json.exit_code.map(Exit::Code));
        let kind = json.state.unwrap_or(match (exit, ended) {
            (Some(Exit::Code(0)), _) => StateKind::Succeeded,
            (Some(_), _) => StateKind::Failed,
            (None, Some(_)) => StateKind::Lost,
            (None, None) => StateKind::Running,
        });
        let lacks = |lacks| InconsistentMetadata { state: kind, lacks };
        let ended = ended.unwrap_or(known);
        let state = match kind {
            StateKind::Running => RunState::Running,
            StateKind::Succeeded => RunState::Succeeded { ended },
            StateKind::Failed => {
                RunState::Failed { ended, exit: exit.ok_or_else(|| lacks("exit_code and signal"))? }
            }
            StateKind::Cancelled => {
                RunState::Cancelled { ended, exit: exit.ok_or_else(|| lacks("exit_code and signal"))? }
            }
            StateKind::Lost => RunState::Lost { ended },
        };
        Ok(Self {
            started_at: json.started_at.unwrap_or(known),
            spec: RunSpec {
                id: json.job_run_id,
                command: json.command,
                building_partitions: json.building_partitions,
                labels: json.labels,
                host: json.host,
                created_at: json.created_at.unwrap_or(known),
            },
            state,
            stdout: json.stdout,
            stderr: json.stderr,
            missing_deps: json.missing_deps,
            note: json.note,
            other: json.other,
        })
    }
}

/// What is left of a run that was evicted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The run's id.
    pub id: JobRunId,
    /// When it was evicted.
    pub evicted_at: UnixMicros,
    /// Why, in words.
    pub reason: String,
    /// Lines it held.
    pub lines: u64,
    /// Bytes it held.
    pub bytes: u64,
}

impl Tombstone {
    pub(crate) fn of(run: &JobMetadata, evicted_at: UnixMicros, reason: String) -> Self {
        Self {
            id: run.id().clone(),
            evicted_at,
            reason,
            lines: run.stdout.lines + run.stderr.lines,
            bytes: run.stdout.bytes + run.stderr.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(state: RunState) -> JobMetadata {
        let spec = RunSpec::new("a-run".parse().unwrap()).command(["make", "all"]);
        JobMetadata { state, ..JobMetadata::started(spec, UnixMicros(1_000_000)) }
    }

    #[test]
    fn ids_that_could_leave_the_folder_cannot_be_built() {
        for bad in ["", ".", "..", "../x", "a/b", "-f", ".hidden", "a\0b", "a b", "é", &"x".repeat(129)] {
            assert!(bad.parse::<JobRunId>().is_err(), "{bad:?}");
        }
        for good in ["a", "A.b_c-9", &"x".repeat(128)] {
            assert_eq!(good.parse::<JobRunId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn generated_ids_sort_by_time() {
        let ids: Vec<_> = (0..100).map(|_| JobRunId::generate()).collect();
        assert!(ids.is_sorted());
    }

    #[test]
    fn metadata_survives_its_file_with_fields_it_does_not_know() {
        let ended = UnixMicros(3_000_000);
        for state in [
            RunState::Running,
            RunState::Succeeded { ended },
            RunState::Failed { ended, exit: Exit::Code(3) },
            RunState::Failed { ended, exit: Exit::Signal(9) },
            RunState::Cancelled { ended, exit: Exit::Signal(15) },
            RunState::Lost { ended },
        ] {
            let mut run = finished(state);
            run.other.insert("cost".into(), 7.into());
            let text = serde_json::to_string(&run).unwrap();
            assert_eq!(serde_json::from_str::<JobMetadata>(&text).unwrap(), run, "{text}");
        }
    }

    #[test]
    fn metadata_by_another_tool_needs_only_an_id() {
        let run: JobMetadata =
            serde_json::from_str(r#"{"job_run_id":"x","exit_code":2,"finished_at":"2026-01-01T00:00:00Z"}"#)
                .unwrap();
        assert_eq!(run.state.exit(), Some(Exit::Code(2)));
        assert!(serde_json::from_str::<JobMetadata>(r#"{"job_run_id":"x","state":"failed"}"#).is_err());
    }

    #[test]
    fn a_completion_looks_as_in_the_specification() {
        let run = finished(RunState::Succeeded { ended: UnixMicros(2_234_000) });
        let json = serde_json::to_value(run.completion()).unwrap();
        assert_eq!(json["exit_code"], 0);
        assert_eq!(json["duration_ms"], 1234);
        assert!(json.get("signal").is_none());
    }

    #[test]
    fn partition_references_are_objects_or_strings() {
        let deps: MissingDeps =
            serde_json::from_str(r#"{"impacted":["a"],"missing":[{"ref":"b"}]}"#).unwrap();
        assert_eq!((deps.impacted[0].name.as_str(), deps.missing[0].name.as_str()), ("a", "b"));
    }
}
