//! What is to be evicted, and why: decided by rows alone, oldest first. Nothing here touches a disk.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::line::UnixMicros;
use crate::run::JobRunId;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How much of what is over is kept. Runs that go on and runs that are pinned are kept whatever it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// Runs that ended longer ago are evicted; `None`: however old they are.
    pub max_age: Option<Duration>,
    /// While everything under the log folder takes up more bytes on disk than this, the oldest runs are evicted;
    /// `None`: whatever it takes up.
    pub max_bytes: Option<u64>,
    /// So many of the runs that ended last are kept in any case. Pinned runs do not count.
    pub keep_last: u64,
}

impl RetentionPolicy {
    /// Nothing is ever evicted. What a library does that was not told otherwise.
    pub const OFF: Self = Self { max_age: None, max_bytes: None, keep_last: 0 };

    /// Seven days and 10 GB: what `databuild serve` does that was not told otherwise.
    pub const OF_SERVICE: Self = Self {
        max_age: Some(Duration::from_secs(7 * 24 * 60 * 60)),
        max_bytes: Some(10_000_000_000),
        keep_last: 0,
    };

    /// Whether anything can be evicted at all.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.max_age.is_some() || self.max_bytes.is_some()
    }
}

/// Why a run is evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvictionReason {
    /// It ended longer ago than runs are kept.
    Expired,
    /// The log folder took up more than it may, and no older run was left.
    SizeCap,
    /// The disk was full, or had less free than logs leave to others.
    DiskFull,
}

impl EvictionReason {
    /// The reason as one word, as in JSON, in metrics, and in the names of folders that are being removed.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::SizeCap => "size_cap",
            Self::DiskFull => "disk_full",
        }
    }

    pub(crate) fn from_word(word: &str) -> Option<Self> {
        [Self::Expired, Self::SizeCap, Self::DiskFull].into_iter().find(|reason| reason.as_str() == word)
    }

    /// The reason in words, with the limit that led to it.
    pub(crate) fn under(self, policy: &RetentionPolicy) -> String {
        match (self, policy.max_age, policy.max_bytes) {
            (Self::Expired, Some(age), _) => format!("older than {}", in_words(age)),
            (Self::SizeCap, _, Some(bytes)) => format!("the log folder took up more than {}", size(bytes)),
            _ => self.to_string(),
        }
    }
}

impl fmt::Display for EvictionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expired => "older than runs are kept",
            Self::SizeCap => "the log folder took up too much",
            Self::DiskFull => "the disk was full",
        })
    }
}

fn in_words(age: Duration) -> String {
    let (count, unit) = match age.as_secs() {
        seconds if age >= DAY && seconds.is_multiple_of(DAY.as_secs()) => (seconds / DAY.as_secs(), "day"),
        seconds if seconds >= 3600 && seconds.is_multiple_of(3600) => (seconds / 3600, "hour"),
        seconds if seconds >= 60 && seconds.is_multiple_of(60) => (seconds / 60, "minute"),
        seconds => (seconds, "second"),
    };
    if count == 1 { format!("1 {unit}") } else { format!("{count} {unit}s") }
}

fn size(bytes: u64) -> String {
    let units = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    match units.into_iter().find(|&(unit, _)| bytes >= unit) {
        Some((unit, name)) if bytes.is_multiple_of(unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => format!("{}.{} {name}", bytes / unit, bytes % unit / (unit / 10)),
        None => format!("{bytes} bytes"),
    }
}

/// What to evict now, beside what the store's own policy says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcRequest {
    /// Only say what would be evicted.
    pub dry_run: bool,
    /// In place of [`RetentionPolicy::max_age`]; zero turns that limit off.
    pub older_than: Option<Duration>,
    /// In place of [`RetentionPolicy::max_bytes`]; 0 turns that limit off.
    pub max_bytes: Option<u64>,
    /// In place of [`RetentionPolicy::keep_last`].
    pub keep_last: Option<u64>,
}

impl GcRequest {
    /// The policy that holds for this request.
    #[must_use]
    pub fn over(&self, policy: RetentionPolicy) -> RetentionPolicy {
        RetentionPolicy {
            max_age: self.older_than.map_or(policy.max_age, |age| Some(age).filter(|age| !age.is_zero())),
            max_bytes: self
                .max_bytes
                .map_or(policy.max_bytes, |bytes| Some(bytes).filter(|&bytes| bytes > 0)),
            keep_last: self.keep_last.unwrap_or(policy.keep_last),
        }
    }
}

/// What was evicted, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The runs, oldest first.
    pub evicted: Vec<EvictedRun>,
    /// Runs whose turn it was, and why they are still there.
    pub kept: Vec<KeptRun>,
    /// Whether there is more to evict than one call does: another one goes on.
    pub more: bool,
    /// Bytes that everything under the log folder takes up on disk after that.
    pub bytes_after: u64,
    /// Why it was not done to its end, if it was not. The runs above are evicted all the same, and what the index has
    /// not heard of them it hears later: from the next call, and within a minute from a service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<String>,
}

impl GcReport {
    /// Bytes on disk of all runs that were evicted.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.evicted.iter().map(|run| run.bytes).sum()
    }
}

/// A run that was evicted, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvictedRun {
    /// Its id.
    pub id: JobRunId,
    /// When it ended.
    pub ended_at: UnixMicros,
    /// Bytes that it took up on disk.
    pub bytes: u64,
    /// Why.
    pub reason: EvictionReason,
    /// The same in words, with the limit.
    pub why: String,
}

/// A run that could not be evicted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptRun {
    /// Its id.
    pub id: JobRunId,
    /// Why it is still there.
    pub why: String,
}

/// A run that may be evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// When it ended.
    pub(crate) ended: UnixMicros,
    /// Its number in the index.
    pub(crate) number: u64,
    /// Bytes that it takes up on disk.
    pub(crate) bytes: u64,
}

/// How things stand before anything is evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) now: UnixMicros,
    /// Runs that may be evicted.
    pub(crate) runs: u64,
    /// Bytes on disk of everything, what can't be evicted included.
    pub(crate) bytes: u64,
    /// Bytes that have to become free whatever the policy says: the disk is full.
    pub(crate) to_free: u64,
}

/// Says which runs are to go, and why. `rows` are all that may be evicted, oldest first; of those that stay no more
/// than one is looked at, so what this costs grows with the victims alone.
pub(crate) fn plan(
    rows: impl Iterator<Item = Candidate>,
    standing: Standing,
    policy: RetentionPolicy,
) -> impl Iterator<Item = (Candidate, EvictionReason)> {
    let Standing { now, runs, mut bytes, mut to_free } = standing;
    let may_go = usize::try_from(runs.saturating_sub(policy.keep_last)).unwrap_or(usize::MAX);
    rows.take(may_go).map_while(move |row| {
        let reason = if policy.max_age.is_some_and(|limit| age(row.ended, now) > limit) {
            EvictionReason::Expired
        } else if policy.max_bytes.is_some_and(|limit| bytes > limit) {
            EvictionReason::SizeCap
        } else if to_free > 0 {
            EvictionReason::DiskFull
        } else {
            return None;
        };
        bytes = bytes.saturating_sub(row.bytes);
        to_free = to_free.saturating_sub(row.bytes);
        Some((row, reason))
    })
}

/// How long ago something was; nothing, by a clock that went back.
fn age(ended: UnixMicros, now: UnixMicros) -> Duration {
    Duration::from_micros(now.0.saturating_sub(ended.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(number: u64, ended: u64, bytes: u64) -> Candidate {
        Candidate { ended: UnixMicros(ended), number, bytes }
    }

    fn planned(
        rows: &[Candidate],
        bytes: u64,
        to_free: u64,
        policy: RetentionPolicy,
    ) -> Vec<(u64, EvictionReason)> {
        let standing = Standing { now: UnixMicros(10_000_000), runs: rows.len() as u64, bytes, to_free };
        plan(rows.iter().copied(), standing, policy).map(|(row, reason)| (row.number, reason)).collect()
    }

    #[test]
    fn each_limit_has_its_reason_and_the_oldest_goes_first() {
        use EvictionReason::{DiskFull, Expired, SizeCap};
        let rows =
            [row(7, 1_000_000, 10), row(3, 5_000_000, 20), row(9, 5_000_000, 30), row(1, 9_000_000, 40)];
        let policy = |seconds: u64, bytes, keep_last| RetentionPolicy {
            max_age: (seconds > 0).then(|| Duration::from_secs(seconds)),
            max_bytes: (bytes > 0).then_some(bytes),
            keep_last,
        };
        assert_eq!(planned(&rows, 100, 0, RetentionPolicy::OFF), []);
        assert_eq!(planned(&rows, 100, 0, policy(8, 0, 0)), [(7, Expired)]);
        assert_eq!(planned(&rows, 100, 0, policy(9, 0, 0)), [], "not older than that");
        assert_eq!(planned(&rows, 100, 0, policy(0, 70, 0)), [(7, SizeCap), (3, SizeCap)]);
        assert_eq!(planned(&rows, 100, 0, policy(8, 50, 0)), [(7, Expired), (3, SizeCap), (9, SizeCap)]);
        assert_eq!(planned(&rows, 100, 0, policy(1, 1, 3)), [(7, Expired)]);
        assert_eq!(planned(&rows, 100, 0, policy(1, 1, 9)), []);
        assert_eq!(planned(&rows, 100, 25, policy(0, 0, 0)), [(7, DiskFull), (3, DiskFull)]);
        assert_eq!(planned(&rows, 900, 25, policy(0, 0, 3)), [(7, DiskFull)]);
    }

    #[test]
    fn a_request_takes_the_place_of_single_limits_and_zero_turns_them_off() {
        let own = RetentionPolicy::OF_SERVICE;
        assert_eq!(GcRequest::default().over(own), own);
        let off = GcRequest { older_than: Some(Duration::ZERO), max_bytes: Some(0), ..GcRequest::default() };
        assert_eq!(off.over(own), RetentionPolicy::OFF);
        let hour = Duration::from_secs(3600);
        let some = GcRequest { older_than: Some(hour), keep_last: Some(2), ..GcRequest::default() };
        assert_eq!(some.over(own), RetentionPolicy { max_age: Some(hour), keep_last: 2, ..own });
    }

    #[test]
    fn reasons_name_the_limit() {
        let policy = RetentionPolicy::OF_SERVICE;
        assert_eq!(EvictionReason::Expired.under(&policy), "older than 7 days");
        assert_eq!(EvictionReason::SizeCap.under(&policy), "the log folder took up more than 10 GB");
        assert_eq!(EvictionReason::DiskFull.under(&policy), "the disk was full");
        assert_eq!(
            [1, 90, 7200, 86_400].map(|s| in_words(Duration::from_secs(s))),
            ["1 second", "90 seconds", "2 hours", "1 day"]
        );
        assert_eq!([999, 1500, 2_500_000].map(size), ["999 bytes", "1.5 kB", "2.5 MB"]);
        for reason in [EvictionReason::Expired, EvictionReason::SizeCap, EvictionReason::DiskFull] {
            assert_eq!(EvictionReason::from_word(reason.as_str()), Some(reason));
        }
    }

    proptest! {
        /// Victims are the oldest runs without a gap, no more of them than needed, and the newest are left.
        #[test]
        fn a_plan_is_the_shortest_beginning_that_keeps_the_policy(
            mut rows in proptest::collection::vec((0u64..20_000_000, 0u64..1_000), 0..40),
            others in 0u64..2_000,
            max_age in proptest::option::of(0u64..20),
            max_bytes in proptest::option::of(0u64..20_000),
            keep_last in 0u64..10,
            to_free in prop_oneof![Just(0u64), 0u64..5_000],
        ) {
            rows.sort_unstable();
            let rows: Vec<_> =
                rows.iter().zip(0..).map(|(&(ended, bytes), number)| row(number, ended, bytes)).collect();
            let now = UnixMicros(10_000_000);
            let max_age = max_age.map(Duration::from_secs);
            let policy = RetentionPolicy { max_age, max_bytes, keep_last };
            let all: u64 = others + rows.iter().map(|row| row.bytes).sum::<u64>();
            let standing = Standing { now, runs: rows.len() as u64, bytes: all, to_free };
            let looked_at = std::cell::Cell::new(0);
            let counted = rows.iter().copied().inspect(|_| looked_at.set(looked_at.get() + 1));
            let victims: Vec<_> = plan(counted, standing, policy).collect();
            prop_assert!(looked_at.get() <= victims.len() + 1, "of those that stay one is looked at");
            let gone = victims.len();
            prop_assert!(victims.iter().zip(&rows).all(|((victim, _), row)| victim == row));
            prop_assert!(gone as u64 + keep_last.min(rows.len() as u64) <= rows.len() as u64);
            // Whether everything that is asked for holds when only the first so many are gone.
            let holds = |gone: usize| {
                let freed: u64 = rows[..gone].iter().map(|row| row.bytes).sum();
                let is_old = |row: &Candidate| max_age.is_some_and(|limit| age(row.ended, now) > limit);
                !rows[gone..].iter().any(is_old)
                    && max_bytes.is_none_or(|limit| all - freed <= limit)
                    && freed >= to_free
            };
            let may_go = rows.len().saturating_sub(usize::try_from(keep_last).unwrap());
            prop_assert!(holds(gone) || gone == may_go);
            prop_assert!(gone == 0 || !holds(gone - 1), "one less would have done");
        }
    }
}
