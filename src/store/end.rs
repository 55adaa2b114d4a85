//! How a run ends, as its writer says it.

use crate::error::LogError;
use crate::line::UnixMicros;
use crate::run::{Exit, JobMetadata, MissingDeps, RunSpec, RunState, StateKind};

/// How a command ended, or that nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended on its own.
    Exited(Exit),
    /// It ended because the run was cancelled.
    Cancelled(Exit),
    /// Its writer died first.
    Lost,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEnd {
    /// How it ended.
    pub outcome: Outcome,
    /// When.
    pub ended_at: UnixMicros,
    /// What the job said it lacks.
    pub missing_deps: Vec<MissingDeps>,
    /// See [`JobMetadata::note`].
    pub note: Option<String>,
    /// What the run was, where it differs from what it was started with: fields that are not empty override.
    pub spec: Option<RunSpec>,
    /// Further fields for `metadata.json`.
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl RunEnd {
    /// An end with this outcome, now.
    #[must_use]
    pub fn now(outcome: Outcome) -> Self {
        Self {
            outcome,
            ended_at: UnixMicros::now(),
            missing_deps: Vec::new(),
            note: None,
            spec: None,
            other: serde_json::Map::new(),
        }
    }

    /// The end that a document tells of.
    ///
    /// # Errors
    ///
    /// [`LogError::InvalidParameter`] if it is of a run that goes on.
    pub(super) fn from_metadata(metadata: JobMetadata) -> Result<Self, LogError> {
        let (outcome, ended_at) = match metadata.state {
            RunState::Running => {
                return Err(LogError::InvalidParameter {
                    name: "metadata.state",
                    given: StateKind::Running.to_string(),
                    expected: "expected how the run ended: succeeded, failed, cancelled or lost".to_owned(),
                });
            }
            RunState::Succeeded { ended } => (Outcome::Exited(Exit::Code(0)), ended),
            RunState::Failed { ended, exit } => (Outcome::Exited(exit), ended),
            RunState::Cancelled { ended, exit } => (Outcome::Cancelled(exit), ended),
            RunState::Lost { ended } => (Outcome::Lost, ended),
        };
        Ok(Self {
            outcome,
            ended_at,
            missing_deps: metadata.missing_deps,
            note: metadata.note,
            spec: Some(metadata.spec),
            other: metadata.other,
        })
    }

    /// The state that this end leaves the run in.
    #[must_use]
    pub const fn state(&self) -> RunState {
        let ended = self.ended_at;
        match self.outcome {
            Outcome::Exited(exit) => RunState::from_exit(exit, ended),
            Outcome::Cancelled(exit) => RunState::Cancelled { ended, exit },
            Outcome::Lost => RunState::Lost { ended },
        }
    }

    /// Writes this end into what is known of the run.
    pub(crate) fn apply_to(self, run: &mut JobMetadata) {
        run.state = self.state();
        run.missing_deps = self.missing_deps;
        run.note = self.note;
        run.other.extend(self.other);
        if let Some(spec) = self.spec {
            if !spec.command.is_empty() {
                run.spec.command = spec.command;
            }
            if !spec.building_partitions.is_empty() {
                run.spec.building_partitions = spec.building_partitions;
            }
            run.spec.labels.extend(spec.labels);
        }
    }
}
