//! Why a job could not be started.

use std::io;
use std::path::PathBuf;

use crate::error::LogError;

/// Why a job could not be started, by what it means to the caller.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// There is no such command.
    #[error("{program}: command not found")]
    NotFound {
        /// The command's name or path.
        program: String,
    },
    /// The command is there, but the system refuses to execute it.
    #[error("{program}: {source}")]
    NotExecutable {
        /// The command's name or path.
        program: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The folder that the command was to run in can't be entered.
    #[error("the folder {} can't be entered: {source}", path.display())]
    WorkingFolder {
        /// The folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The run can't be recorded: most likely its id is taken. Nothing was executed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The system has no means left for another job, or the command can't be put to it (a NUL byte in an
    /// argument).
    #[error("{doing}: {source}")]
    Other {
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl RunnerError {
    /// The exit code that says so to a shell: 127 for a command that is not there, 126 for one that can't be
    /// executed, 125 for everything that is not the command's fault.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } => 126,
            Self::WorkingFolder { .. } | Self::Log(_) | Self::Other { .. } => 125,
        }
    }
}
