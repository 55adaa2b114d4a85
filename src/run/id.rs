//! The name of a run, valid by construction.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

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

    /// Whether it is one of those that [`generate`](Self::generate) gives: nobody chose it, and it is the beginning of no
    /// other.
    #[must_use]
    pub fn is_generated(&self) -> bool {
        uuid::Uuid::try_parse(&self.0).is_ok_and(|id| id.get_version_num() == 7 && id.to_string() == *self.0)
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
