//! The one error type, by meaning: what a caller can do something about.

use std::io;
use std::path::PathBuf;

use crate::run::{Gap, InvalidId, JobRunId, Tombstone};

/// What went wrong, by what it means to the caller.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No run has this id.
    #[error("no run {id} is known here")]
    NotFound {
        /// The id asked for.
        id: JobRunId,
    },
    /// A run with this id exists already.
    #[error("run {id} exists already; every run needs an id of its own")]
    AlreadyExists {
        /// The id asked for.
        id: JobRunId,
    },
    /// The run is over: nothing can be added to it.
    #[error("run {id} is over; nothing can be appended to it")]
    Finished {
        /// The run.
        id: JobRunId,
    },
    /// The run goes on: only what is over can be treated so.
    #[error("run {id} is not over yet")]
    Unfinished {
        /// The run.
        id: JobRunId,
    },
    /// The run was evicted; what is left of it says when and why.
    #[error("run {} was evicted at {}: {}", .0.id, .0.evicted_at, .0.reason)]
    Evicted(Box<Tombstone>),
    /// A text that is not a run id.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    /// A parameter that can't be used.
    #[error("{name} is {given:?}: {expected}")]
    InvalidParameter {
        /// The parameter's name, as the caller wrote it.
        name: &'static str,
        /// What was given.
        given: String,
        /// What would be right.
        expected: String,
    },
    /// Another process has the index open, or writes the run.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The index, or what is the run's: its folder or its journal.
        path: PathBuf,
    },
    /// A file is not what it should be.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The operating system refused.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done, as "creating" or "appending to".
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The index can't be used at the moment; the logs are not affected.
    #[error("index {}: {detail}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What the database said.
        detail: String,
    },
    /// A hole in a stream of lines; the stream goes on behind it.
    #[error("{} lines of {} after line {} were not kept ({} bytes, {:?})", .0.lines, .0.stream, .0.after, .0.bytes, .0.reason)]
    Gap(Gap),
    /// This store, or this build, does not do that.
    #[error("{what}")]
    Unsupported {
        /// What is not done, and why.
        what: &'static str,
    },
    /// The store was closed.
    #[error("the log store is closed")]
    Closed,
    /// A store behind this one failed.
    #[error("{what}: {source}")]
    Inner {
        /// Which store, and what it was to do.
        what: String,
        /// Its error.
        source: Box<LogError>,
    },
}

impl LogError {
    /// Wraps an error of the operating system with what was being done and to which path.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether the error is an answer about the run that was asked for, not a failure of the store.
    pub(crate) const fn is_about_the_run(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. }
                | Self::AlreadyExists { .. }
                | Self::Finished { .. }
                | Self::Unfinished { .. }
                | Self::Evicted(_)
        )
    }

    /// This error, and another that came after it and is to be told too.
    pub(crate) fn and(self, later: Self) -> Self {
        Self::Inner { what: format!("{later}; before that"), source: Box::new(self) }
    }

    /// What is to be told of two errors that may have come one after the other.
    pub(crate) fn both(first: Option<Self>, later: Option<Self>) -> Option<Self> {
        match (first, later) {
            (Some(first), Some(later)) => Some(first.and(later)),
            (first, later) => first.or(later),
        }
    }

    /// Whether the cause is a disk, quota or file-size limit that is used up.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            ),
            Self::Inner { source, .. } => source.is_disk_full(),
            _ => false,
        }
    }
}
