//! Making room for an index that the disk has none for: which runs are oldest is told by their folders then.

use std::time::Instant;

use super::evictions::lock;
use super::{Shared, remove};
use crate::error::LogError;
use crate::layout::Removal;
use crate::line::UnixMicros;
use crate::meter;
use crate::retention::EvictionReason;
use crate::run::{JobMetadata, JobRunId, Tombstone};
use crate::store::file::identity::is_being_written;
use crate::store::file::tracker::written_end;

/// A run that may go, as its folder tells of it.
struct Over {
    ended: UnixMicros,
    id: JobRunId,
}

/// The same when it is looked at.
struct Seen {
    run: JobMetadata,
    /// When its folder was made: that of another run with its id was made later.
    made: UnixMicros,
}

impl Shared {
    /// Evicts the oldest runs that are over by their `metadata.json`, until the disk has so many bytes more than it is to
    /// keep free and `suffices` says yes; if it does not, the same with the next number of bytes. What is left of them stays
    /// in the trash: the index hears of them from there when it is made. Nothing is evicted when nothing ever is.
    pub(crate) fn make_room_by_folder(&self, rooms: &[u64], mut suffices: impl FnMut() -> bool) {
        let policy = self.options.retention;
        if !policy.is_on() || self.index_to_evict().is_err() || rooms.iter().all(|room| self.has_room(*room))
        {
            return;
        }
        let begun = Instant::now();
        let mut over = match self.over_by_folder() {
            Ok(over) => over,
            Err(error) => return tracing::warn!(%error, "looking for runs to evict"),
        };
        over.sort_unstable_by(|one, next| (one.ended, &one.id).cmp(&(next.ended, &next.id)));
        let keep = usize::try_from(policy.keep_last).unwrap_or(usize::MAX);
        over.truncate(over.len().saturating_sub(keep));
        let mut over = over.into_iter();
        for &room in rooms {
            while !self.is_closed()
                && !self.has_room(room)
                && let Some(Over { id, .. }) = over.next()
            {
                let mut turn = lock(&self.evictions.turn);
                turn.trash = true;
                if let Err(error) = self.evict_by_folder(&id) {
                    tracing::warn!(%error, run = %id, "a run can't be evicted");
                }
            }
            if self.is_closed() || suffices() {
                break;
            }
        }
        meter::gc_took(begun.elapsed());
    }

    /// Whether nothing lacks; also when the disk does not tell, for then nothing is to go.
    fn has_room(&self, bytes: u64) -> bool {
        self.lacking(bytes).unwrap_or(0) == 0
    }

    /// Runs that are over and not pinned.
    fn over_by_folder(&self) -> Result<Vec<Over>, LogError> {
        let over = |id: JobRunId| Some(Over { ended: self.run_to_evict(&id)?.run.state.ended()?, id });
        Ok(self.layout.list_runs()?.into_iter().filter_map(over).collect())
    }

    fn run_to_evict(&self, id: &JobRunId) -> Option<Seen> {
        let folder = self.layout.run(id);
        if !matches!(folder.is_there(), Ok(true))
            || folder.is_pinned()
            || self.tracked(id).is_some_and(|run| !run.run().is_over())
        {
            return None;
        }
        let made = folder.made()?;
        let run = written_end(&folder, id, made).ok()??;
        matches!(is_being_written(&folder), Ok(false)).then_some(Seen { run, made })
    }

    fn evict_by_folder(&self, id: &JobRunId) -> Result<(), LogError> {
        let Some(Seen { run, made }) = self.run_to_evict(id) else { return Ok(()) };
        let (policy, reason) = (self.options.retention, EvictionReason::DiskFull);
        let stone = Tombstone::of(&run, UnixMicros::now(), reason.under(&policy));
        let bytes = self.layout.run(id).disk_bytes();
        self.evictions.hide(&stone);
        self.compressions.wait_for(id);
        let moved = self.layout.move_to_trash(id, stone.evicted_at, reason.as_str());
        let folder = moved.inspect_err(|_| self.evictions.show(id))?;
        if folder.made() != Some(made) || !matches!(is_being_written(&folder), Ok(false)) {
            // Its id was used again since it was looked at.
            self.evictions.show(id);
            return self.layout.take_back(id, &folder);
        }
        if let Some(tracked) = self.tracked(id) {
            self.runs().remove(tracked.run());
        }
        remove(&folder, Removal::LogsOnly);
        tracing::info!(run = %id, bytes, why = %stone.reason, "a run is evicted");
        meter::evicted(reason.as_str(), 1, bytes);
        Ok(())
    }
}
