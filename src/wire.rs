//! What the service and its client say to each other: the resume cursor and the JSON shapes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::line::{LineNumber, Stream, UnixMicros};
use crate::run::{Gap, GapReason, JobMetadata, JobRunId, StateKind, Tombstone};

/// The `id:` of an event and the `Last-Event-ID` of a reconnecting client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cursor {
    /// Everything up to this line was seen; go on behind it. As text, the number.
    After(LineNumber),
    /// The stream has ended; there is nothing to reconnect for. As text, the number and `!`.
    Ended(LineNumber),
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::After(line) => write!(f, "{line}"),
            Self::Ended(line) => write!(f, "{line}!"),
        }
    }
}

/// The text is not a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a line number, as in an event's id")]
pub struct InvalidCursor;

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let (digits, ended) = match text.strip_suffix('!') {
            Some(digits) => (digits, true),
            None => (text, false),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidCursor);
        }
        let line = LineNumber(digits.parse().map_err(|_| InvalidCursor)?);
        Ok(if ended { Self::Ended(line) } else { Self::After(line) })
    }
}

/// The data of a `log` event with `format=json`. Nothing of the line is lost: exactly one of `m` and `b` is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// The line's number in its stream.
    pub n: LineNumber,
    /// When its end arrived, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t: Option<UnixMicros>,
    /// Its stream.
    pub s: Stream,
    /// Its text without the `\n`, if that is valid UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub m: Option<String>,
    /// Its bytes in base64 (standard alphabet, padded) if they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b: Option<String>,
    /// The full length in bytes of a line of which only the beginning is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<u64>,
    /// True for a last line that has no `\n` in the log.
    #[serde(default, skip_serializing_if = "is_false")]
    pub open: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The data of a `gap` event: lines that could not be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapNotice {
    /// The stream with the hole.
    pub stream: Stream,
    /// The first line that is not there.
    pub from: LineNumber,
    /// Lines lost.
    pub lines: u64,
    /// Bytes lost.
    pub bytes: u64,
    /// Why.
    pub reason: GapReason,
}

impl From<Gap> for GapNotice {
    fn from(gap: Gap) -> Self {
        Self {
            stream: gap.stream,
            from: gap.after.plus(1),
            lines: gap.lines,
            bytes: gap.bytes,
            reason: gap.reason,
        }
    }
}

/// The data of an `eof` event: everything that was there has been sent, and the run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eof {
    /// What to give as `since` to go on from here.
    pub next: LineNumber,
    /// Always `running`.
    pub state: StateKind,
}

/// The answer of `GET /api/job_runs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunList {
    /// The runs, newest first, each as in its `metadata.json`.
    pub runs: Vec<JobMetadata>,
    /// What to give as `cursor` for the next page; null on the last one.
    pub next: Option<String>,
    /// Which of the runs are pinned: they are never evicted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<JobRunId>,
}

/// An error before a stream starts, as `application/problem+json` (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind of error, as `not-found` or `bad-parameter`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The HTTP status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened and what would be right.
    pub detail: String,
    /// The parameter that can't be used, if one is to blame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter: Option<String>,
    /// What is left of a run that was evicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tombstone: Option<Tombstone>,
}

/// The answer of `POST /api/job_runs/{id}/compress`. How it went can come after the status of the answer is sent.
#[cfg(any(feature = "server", feature = "client"))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Compressed {
    /// The run is compressed.
    Done(crate::store::Compression),
    /// It is not.
    Failed(Problem),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn cursors_survive_their_text(line: u64, ended: bool) {
            let line = LineNumber(line);
            let cursor = if ended { Cursor::Ended(line) } else { Cursor::After(line) };
            prop_assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }

        #[test]
        fn no_text_panics_the_cursor(text: String) {
            let _ = text.parse::<Cursor>();
        }
    }

    #[test]
    fn what_is_not_a_cursor_is_refused() {
        for bad in ["", "!", "-1", "+1", "1!!", " 1", "1.0", "18446744073709551616", "x"] {
            assert_eq!(bad.parse::<Cursor>(), Err(InvalidCursor), "{bad:?}");
        }
    }
}
