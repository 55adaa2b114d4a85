//! Making room for an index that the disk has none for: which runs are oldest is told by their folders then.

use std::time::Instant;

use super::evictions::lock;
use super::{Shared, remove};
use crate::error::LogError;
use crate::layout::{Disk, Removal};
use crate::line::UnixMicros;
use crate::logfile::ReadFile;
use crate::meter;
use crate::retention::EvictionReason;
use crate::run::{JobMetadata, JobRunId, Tombstone};
use crate::store::file::tracker::written_end;

impl Shared {
    /// Evicts the oldest runs that are over by their `metadata.json`, until the disk has so many bytes more than it is to
    /// keep free. What is left of them stays in the trash: the index hears of them from there when it is made. Nothing is
    /// evicted when nothing ever is.
    pub(crate) fn make_room_by_folder(&self, bytes: u64) {
        let policy = self.options.retention;
        if !policy.is_on() || self.index_to_evict().is_err() {
            return;
        }
        let mut turn = lock(&self.evictions.turn);
        let begun = Instant::now();
        let mut over = match self.over_by_folder() {
            Ok(over) => over,
            Err(error) => return tracing::warn!(%error, "looking for runs to evict"),
        };
        over.sort_unstable();
        let keep = usize::try_from(policy.keep_last).unwrap_or(usize::MAX);
        over.truncate(over.len().saturating_sub(keep));
        for (_, id) in over {
            if self.is_closed() || self.has_room(bytes) {
                break;
            }
            turn.trash = true;
            if let Err(error) = self.evict_by_folder(&id) {
                tracing::warn!(%error, run = %id, "a run can't be evicted");
            }
        }
        meter::gc_took(begun.elapsed());
    }

    fn has_room(&self, bytes: u64) -> bool {
        let Ok(disk) = Disk::at(self.layout.root()) else { return true };
        disk.free >= disk.floor(self.options.min_free_bytes) + bytes
    }

    /// Runs that are over and not pinned, and when they ended.
    fn over_by_folder(&self) -> Result<Vec<(UnixMicros, JobRunId)>, LogError> {
        let runs = self.layout.list_runs()?;
        Ok(runs.into_iter().filter_map(|id| Some((self.run_to_evict(&id)?.state.ended()?, id))).collect())
    }

    /// A run that may go, as its folder tells of it.
    fn run_to_evict(&self, id: &JobRunId) -> Option<JobMetadata> {
        let folder = self.layout.run(id);
        if !matches!(folder.is_there(), Ok(true))
            || folder.is_pinned()
            || self.tracked(id).is_some_and(|run| !run.run().is_over())
        {
            return None;
        }
        let run = written_end(&folder, id, folder.made()?).ok()??;
        let journal = ReadFile::open_if_there(&folder.journal()).ok()?;
        let is_written = journal.is_some_and(|journal| !matches!(journal.is_locked(), Ok(false)));
        (!is_written).then_some(run)
    }

    fn evict_by_folder(&self, id: &JobRunId) -> Result<(), LogError> {
        let Some(run) = self.run_to_evict(id) else { return Ok(()) };
        let (policy, reason) = (self.options.retention, EvictionReason::DiskFull);
        let stone = Tombstone::of(&run, UnixMicros::now(), reason.under(&policy));
        let bytes = self.layout.run(id).disk_bytes();
        self.evictions.hide(&stone);
        self.compressions.wait_for(id);
        let folder = self
            .layout
            .move_to_trash(id, stone.evicted_at, reason.as_str())
            .inspect_err(|_| self.evictions.show(id))?;
        if let Some(tracked) = self.tracked(id) {
            self.runs().remove(tracked.run());
        }
        remove(&folder, Removal::LogsOnly);
        tracing::info!(run = %id, bytes, why = %stone.reason, "a run is evicted");
        meter::evicted(reason.as_str(), 1, bytes);
        Ok(())
    }
}
