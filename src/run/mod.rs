//! A job run: its id, what was asked for, how it ended, and the document that says so.

#[cfg(test)]
mod fuzz;
mod id;
mod metadata;
mod state;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::line::{LineNumber, Stream, UnixMicros};

pub use id::{InvalidId, JobRunId};
pub(crate) use metadata::TimesOfFiles;
pub use metadata::{Completion, JobMetadata};
pub use state::{Exit, RunState, StateKind, UnknownState};

/// The version of the on-disk format that this build writes.
pub const FORMAT_VERSION: u32 = 1;

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

impl StreamTotals {
    /// What this stream and another hold together. Sums that are too large, which only a damaged document has, become
    /// the largest number.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            lines: self.lines.saturating_add(other.lines),
            dropped_bytes: self.dropped_bytes.saturating_add(other.dropped_bytes),
            dropped_lines: self.dropped_lines.saturating_add(other.dropped_lines),
        }
    }
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
        let StreamTotals { lines, bytes, .. } = run.stdout.plus(run.stderr);
        Self { id: run.id().clone(), evicted_at, reason, lines, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partition_references_are_objects_or_strings() {
        let deps: MissingDeps =
            serde_json::from_str(r#"{"impacted":["a"],"missing":[{"ref":"b"}]}"#).unwrap();
        assert_eq!((deps.impacted[0].name.as_str(), deps.missing[0].name.as_str()), ("a", "b"));
    }
}
