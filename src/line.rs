//! Lines, bytes and moments: the units everything here is counted in.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One of a job's two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// Both streams, in the order of their [`index`](Self::index).
    pub const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// 0 for stdout, 1 for stderr: the number used on disk and in arrays.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// `"stdout"` or `"stderr"`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }

    /// The stream with this [`index`](Self::index), if there is one.
    #[must_use]
    pub const fn from_index(index: u8) -> Option<Self> {
        match index {
            0 => Some(Self::Stdout),
            1 => Some(Self::Stderr),
            _ => None,
        }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a reader looks at: one stream, or both in the order in which their lines were completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// The lines of one stream, numbered within that stream.
    One(Stream),
    /// The lines of both streams in arrival order, numbered through.
    All,
}

impl View {
    /// Standard output alone.
    pub const STDOUT: Self = Self::One(Stream::Stdout);
    /// Standard error alone.
    pub const STDERR: Self = Self::One(Stream::Stderr);

    /// The streams that are shown.
    pub(crate) const fn streams(self) -> &'static [Stream] {
        match self {
            Self::One(Stream::Stdout) => &[Stream::Stdout],
            Self::One(Stream::Stderr) => &[Stream::Stderr],
            Self::All => &Stream::BOTH,
        }
    }

    /// `"stdout"`, `"stderr"` or `"all"`, as in the HTTP paths.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::One(stream) => stream.as_str(),
            Self::All => "all",
        }
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for View {
    type Err = UnknownView;

    fn from_str(text: &str) -> Result<Self, UnknownView> {
        match text {
            "stdout" => Ok(Self::STDOUT),
            "stderr" => Ok(Self::STDERR),
            "all" => Ok(Self::All),
            _ => Err(UnknownView),
        }
    }
}

/// The text named no view; the names are `stdout`, `stderr` and `all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected stdout, stderr or all")]
pub struct UnknownView;

/// The number of a line in its view, counted from 1; 0 stands for the place before the first line.
///
/// As a position, `LineNumber(n)` means "after line n": n lines have been seen, the next one is n + 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LineNumber(pub u64);

impl LineNumber {
    /// The place before the first line.
    pub const START: Self = Self(0);

    /// The position `lines` further on.
    #[must_use]
    pub const fn plus(self, lines: u64) -> Self {
        Self(self.0.saturating_add(lines))
    }
}

impl fmt::Display for LineNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A place in a log file: the number of bytes before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteOffset(pub u64);

impl ByteOffset {
    /// The place `bytes` further on.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A moment: microseconds since 1970-01-01 00:00 UTC. RFC 3339 as text, the bare number in binary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMicros(pub u64);

impl UnixMicros {
    /// This moment, by the machine's clock.
    #[must_use]
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }

    /// The milliseconds from `earlier` to this moment; 0 if the clock went backwards between them.
    #[must_use]
    pub const fn millis_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1000
    }

    fn timestamp(self) -> jiff::Timestamp {
        i64::try_from(self.0)
            .ok()
            .and_then(|micros| jiff::Timestamp::from_microsecond(micros).ok())
            .unwrap_or(jiff::Timestamp::MAX)
    }
}

impl From<SystemTime> for UnixMicros {
    /// Times before 1970 become 1970.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for UnixMicros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}", self.timestamp())
    }
}

impl FromStr for UnixMicros {
    type Err = InvalidTime;

    fn from_str(text: &str) -> Result<Self, InvalidTime> {
        let time: jiff::Timestamp = text.parse().map_err(|_| InvalidTime)?;
        u64::try_from(time.as_microsecond()).map(Self).map_err(|_| InvalidTime)
    }
}

/// The text is not an RFC 3339 time at or after 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected an RFC 3339 time such as 2026-01-31T10:42:00Z")]
pub struct InvalidTime;

impl Serialize for UnixMicros {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UnixMicros {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_their_microseconds_through_text() {
        let time = UnixMicros(1_790_000_000_123_456);
        assert_eq!(time.to_string().parse(), Ok(time));
        assert_eq!("1969-12-31T23:59:59Z".parse::<UnixMicros>(), Err(InvalidTime));
        assert!(time.to_string().ends_with(".123456Z"), "{time}");
    }

    #[test]
    fn views_go_by_the_names_of_the_http_paths() {
        for view in [View::STDOUT, View::STDERR, View::All] {
            assert_eq!(view.as_str().parse(), Ok(view));
        }
        assert_eq!("out".parse::<View>(), Err(UnknownView));
    }
}
