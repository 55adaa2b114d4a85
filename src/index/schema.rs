//! The index's tables.

use redb::{MultimapTableDefinition, TableDefinition};

/// A run's number in the index. Numbers rise in the order in which runs became known, so that live runs stay on
/// neighbouring pages.
pub(crate) type RunNumber = u64;

/// Name → bytes: the format version, and `complete`, which is set last when an index is made.
pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Run id → run number.
pub(super) const RUN_IDS: TableDefinition<'_, &str, RunNumber> = TableDefinition::new("run_ids");
/// Run number → [`RunRecord`](super::codec::RunRecord).
pub(super) const RUNS: TableDefinition<'_, RunNumber, &[u8]> = TableDefinition::new("runs");
/// Runs that are not over; what has to be looked at when the store is opened.
pub(super) const LIVE: TableDefinition<'_, RunNumber, ()> = TableDefinition::new("live");
/// (Run number, stream, lines before the first of them) → up to
/// [`PLACES_A_ROW`](super::checkpoints::PLACES_A_ROW) places where lines begin. A time is 0 where it is not known.
pub(super) const CHECKPOINTS: TableDefinition<'_, (RunNumber, u8, u64), &[u8]> =
    TableDefinition::new("checkpoints");
/// (Run number, time in µs) → [`Progress`](super::progress::Progress): where the journal is to be read from.
pub(super) const TIMES: TableDefinition<'_, (RunNumber, u64), &[u8]> = TableDefinition::new("times");
/// (End time in µs, run number) → bytes on disk; runs that are over, oldest first.
pub(super) const EVICTABLE: TableDefinition<'_, (u64, RunNumber), u64> = TableDefinition::new("evictable");
/// Run number → bytes on disk; runs that are never evicted. Those that go on take up 0.
pub(super) const PINNED: TableDefinition<'_, RunNumber, u64> = TableDefinition::new("pinned");
/// Partition → runs that build it.
pub(super) const PARTITIONS: MultimapTableDefinition<'_, &str, RunNumber> =
    MultimapTableDefinition::new("partitions");
/// Run id → [`Tombstone`](crate::run::Tombstone).
pub(super) const TOMBSTONES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tombstones");
/// (Time of the eviction in µs, run id): which tombstones are oldest.
pub(super) const TOMBSTONE_TIMES: TableDefinition<'_, (u64, &str), ()> =
    TableDefinition::new("tombstone_times");

/// The name of the row of [`META`] that holds the format version, little-endian.
pub(super) const FORMAT: &str = "format";
/// The name of the row of [`META`] that says that the index was made to its end.
pub(super) const COMPLETE: &str = "complete";
/// Name → number of all runs together.
pub(super) const TOTALS: TableDefinition<'_, &str, u64> = TableDefinition::new("totals");
/// The name of the row of [`TOTALS`] that holds the sum of all bytes in [`EVICTABLE`] and [`PINNED`].
pub(super) const FINISHED_BYTES: &str = "finished_bytes";
/// The name of the row of [`TOTALS`] that says when that was last compared with the disk, in µs.
pub(super) const AUDITED_AT: &str = "audited_at";
