//! What can go wrong with the database, and what is to be done about it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::error::LogError;
use crate::index::codec::Damaged;

/// What is said of a database that panicked.
pub(super) const GAVE_UP: &str = "the database gave up on a damaged page";

/// What is wrong with a database that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ailment {
    /// It refuses everything since this error of the disk: the same file is opened again.
    Stuck(String),
    /// It is not what it was: it is moved aside.
    Damaged(String),
}

/// Why a transaction failed.
pub(super) enum Failure {
    Database(redb::Error),
    Damaged(Damaged),
    /// Two of its rows can't both be true.
    Disagrees(&'static str),
    /// The database panicked, as it does on damaged pages.
    GaveUp,
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Database(error.into())
    }
}

pub(super) fn damaged(error: Damaged) -> Failure {
    Failure::Damaged(error)
}

impl Failure {
    /// The same as an error about what was done with the index at `path`.
    pub(super) fn of(self, doing: &'static str, path: &Path) -> LogError {
        match self {
            Self::Database(redb::Error::Io(error)) if !is_damage(error.kind()) => {
                LogError::io(doing, path)(error)
            }
            failure => LogError::Index { path: path.to_owned(), detail: failure.describe() },
        }
    }

    pub(super) fn describe(&self) -> String {
        match self {
            // Its own words tell who uses it in a program what to do.
            Self::Database(redb::Error::PreviousIo) => {
                "the disk refused an earlier write; it is tried again".to_owned()
            }
            Self::Database(error) => error.to_string(),
            Self::Damaged(damaged) => damaged.to_string(),
            Self::Disagrees(what) => (*what).to_owned(),
            Self::GaveUp => GAVE_UP.to_owned(),
        }
    }

    /// What it says of the database, if it says anything.
    pub(super) fn ailment(&self) -> Option<Ailment> {
        match self {
            Self::Database(redb::Error::Io(error)) if !is_damage(error.kind()) => {
                Some(Ailment::Stuck(error.to_string()))
            }
            Self::Database(redb::Error::PreviousIo) => Some(Ailment::Stuck(self.describe())),
            // What this program does wrong is not the file's fault.
            Self::Database(redb::Error::ValueTooLarge(_)) => None,
            failure => Some(Ailment::Damaged(failure.describe())),
        }
    }
}

/// What a call of the database gives. It can panic on damaged pages; that stays here.
pub(super) fn caught<T>(call: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Failure::GaveUp))
}

/// Whether an error of the system says that a file is not a database.
pub(super) fn is_damage(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput)
}
