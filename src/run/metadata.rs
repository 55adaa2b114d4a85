//! All that is known of a run, and the document that holds it: `metadata.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::line::{Stream, UnixMicros};
use crate::run::{Exit, FORMAT_VERSION, JobRunId, MissingDeps, RunSpec, RunState, StateKind, StreamTotals};

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
        let StreamTotals { lines, dropped_bytes, .. } = self.stdout.plus(self.stderr);
        Completion {
            exit_code: exit.and_then(|exit| if let Exit::Code(code) = exit { Some(code) } else { None }),
            signal: exit.and_then(|exit| if let Exit::Signal(signal) = exit { Some(signal) } else { None }),
            duration_ms: self.duration_ms(),
            state: self.state.kind(),
            lines,
            dropped_bytes,
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

/// When a run began and ended as far as its files can tell: asked only if its document does not say.
pub(crate) type TimesOfFiles<'a> = &'a dyn Fn() -> (UnixMicros, UnixMicros);

impl JobMetadata {
    /// The run of a document.
    ///
    /// # Errors
    ///
    /// What can't be understood.
    pub(crate) fn parse(text: &[u8], times: Option<TimesOfFiles<'_>>) -> serde_json::Result<Self> {
        Self::from_json(serde_json::from_slice(text)?, times)
    }

    /// The run of a document by another tool. Fields that can't be understood are left out; their names come with it.
    pub(crate) fn from_document(
        mut document: serde_json::Map<String, serde_json::Value>,
        times: Option<TimesOfFiles<'_>>,
    ) -> (serde_json::Result<Self>, Vec<String>) {
        const ID: &str = "job_run_id";
        let id = document.get(ID).cloned().unwrap_or_default();
        let mut left_out = Vec::new();
        document.retain(|name, value| {
            let alone = [(ID.to_owned(), id.clone()), (name.clone(), value.clone())];
            let alone = serde_json::Value::Object(alone.into_iter().collect());
            let is_understood = serde_json::from_value::<MetadataJson>(alone).is_ok();
            if !is_understood {
                left_out.push(name.clone());
            }
            is_understood
        });
        let run = serde_json::from_value(document.into()).and_then(|json| Self::from_json(json, times));
        (run, left_out)
    }

    fn from_json(mut json: MetadataJson, times: Option<TimesOfFiles<'_>>) -> serde_json::Result<Self> {
        if let Some(times) = times {
            json.fill_in(times);
        }
        json.try_into().map_err(serde::de::Error::custom)
    }
}

impl MetadataJson {
    /// Takes times that are missing from those of the files, as far as the others do not tell them.
    fn fill_in(&mut self, times: TimesOfFiles<'_>) {
        let is_over = self.exit_code.is_some() || self.signal.is_some() || self.duration_ms.is_some();
        let is_over = is_over || self.state.is_some_and(|state| state != StateKind::Running);
        let begun = self.started_at.or(self.created_at);
        let lacks_end =
            is_over && self.finished_at.is_none() && (begun.is_none() || self.duration_ms.is_none());
        let lacks_start = begun.is_none() && (self.finished_at.is_none() || self.duration_ms.is_none());
        if !lacks_end && !lacks_start {
            return;
        }
        let (began, ended) = times();
        if lacks_end {
            self.finished_at = Some(begun.map_or(ended, |begun| ended.max(begun)));
        }
        if lacks_start && !(lacks_end && self.duration_ms.is_some()) {
            self.started_at = Some(self.finished_at.map_or(began, |ended| began.min(ended)));
        }
    }
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

    /// A file by another tool may lack times and state. The state then follows from the exit code, and a time from the
    /// others if they tell it; else it is 0.
    fn try_from(json: MetadataJson) -> Result<Self, InconsistentMetadata> {
        let duration = json.duration_ms.map(|ms| ms.saturating_mul(1000));
        let begun = json.started_at.or(json.created_at);
        let ended = json.finished_at.or_else(|| Some(UnixMicros(begun?.0.saturating_add(duration?))));
        let begun = begun.or_else(|| Some(UnixMicros(ended?.0.saturating_sub(duration?))));
        let exit = json.signal.map(Exit::Signal).or(json.exit_code.map(Exit::Code));
        let kind = json.state.unwrap_or(match exit {
            Some(Exit::Code(0)) => StateKind::Succeeded,
            Some(_) => StateKind::Failed,
            None if ended.is_some() || duration.is_some() => StateKind::Lost,
            None => StateKind::Running,
        });
        let lacks = |lacks| InconsistentMetadata { state: kind, lacks };
        let ended = ended.unwrap_or_default();
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
            started_at: json.started_at.or(begun).unwrap_or_default(),
            spec: RunSpec {
                id: json.job_run_id,
                command: json.command,
                building_partitions: json.building_partitions,
                labels: json.labels,
                host: json.host,
                created_at: json.created_at.or(begun).unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(state: RunState) -> JobMetadata {
        let spec = RunSpec::new("a-run".parse().unwrap()).command(["make", "all"]);
        JobMetadata { state, ..JobMetadata::started(spec, UnixMicros(1_000_000)) }
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
}
