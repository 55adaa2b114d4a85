//! Where a run stands, and how its process ended.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::line::UnixMicros;

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
