//! What is in the trash: telling the index of it, and removing it.

use std::collections::HashSet;

use crate::error::LogError;
use crate::index::{Index, Known, RunNumber};
use crate::layout::{Layout, Removal, RunFolder, Trashed};
use crate::meter;
use crate::retention::{EvictionReason, RetentionPolicy};
use crate::run::{JobMetadata, Tombstone};
use crate::store::file::reconcile::mend;
use crate::store::file::shared::Shared;

use super::BATCH;
use super::evictions::{Turn, lock};

/// A row that leaves the index, if it has one of the run, and what takes its place.
type Evicted = (Option<RunNumber>, Tombstone);

impl Shared {
    /// Writes evictions to the index. When that fails, the logs in these folders are removed first: on a full disk it
    /// needs their room. Then it is tried once more. What can't be written is in the trash, and is written when that is
    /// emptied.
    pub(super) fn commit_evicted<'f>(
        &self,
        index: &Index,
        rows: &[Evicted],
        folders: impl Iterator<Item = &'f RunFolder>,
    ) -> Result<(), LogError> {
        if rows.is_empty() {
            return Ok(());
        }
        let committed = index.evict(rows).or_else(|_| {
            folders.for_each(|folder| remove(folder, Removal::LogsOnly));
            mend(self, index);
            index.evict(rows)
        });
        meter::committed(committed.is_ok());
        committed
    }

    /// Finishes evictions that were cut short, if there may be any.
    ///
    /// # Errors
    ///
    /// Why not all of them: the others are tried again the next time.
    pub(super) fn finish_what_was_begun(&self, index: &Index, turn: &mut Turn) -> Result<(), LogError> {
        if !std::mem::take(&mut turn.trash) {
            return Ok(());
        }
        self.empty_trash(index).inspect_err(|error| {
            turn.trash = true;
            tracing::warn!(%error, "evictions that were cut short are finished later");
        })
    }

    fn empty_trash(&self, index: &Index) -> Result<(), LogError> {
        let trash = self.layout.list_trash()?;
        let mut failed = None;
        for batch in trash.chunks(BATCH) {
            // One that the disk does not tell of keeps nobody waiting but itself.
            let (mut rows, mut told) = (Vec::new(), Vec::new());
            for trashed in batch {
                match outstanding(index, &self.layout, trashed, &self.options.retention) {
                    Ok(row) => {
                        rows.extend(row);
                        told.push(trashed);
                    }
                    Err(error) => failed = Some(error),
                }
            }
            // As long as the index can't be written they are gone all the same.
            rows.iter().for_each(|(_, stone)| self.evictions.hide(stone));
            match self.commit_evicted(index, &rows, told.iter().map(|trashed| &trashed.folder)) {
                Ok(()) => {
                    for trashed in told {
                        lock(&self.evictions.going).remove(&trashed.id);
                        remove(&trashed.folder, Removal::Everything);
                    }
                }
                Err(error) => failed = Some(error),
            }
        }
        failed = self.tell_of_those_without_trash(index, &trash).err().or(failed);
        failed.map_or(Ok(()), Err)
    }

    /// Tells the index of evictions whose folders somebody took out of the trash before it could hear of them.
    fn tell_of_those_without_trash(&self, index: &Index, trash: &[Trashed]) -> Result<(), LogError> {
        let in_trash: HashSet<_> = trash.iter().map(|trashed| &trashed.id).collect();
        let going = self.evictions.all_going().into_iter();
        let going: Vec<_> = going.filter(|stone| !in_trash.contains(&stone.id)).collect();
        for batch in going.chunks(BATCH) {
            let mut rows = Vec::new();
            for stone in batch {
                match index.find(&stone.id)? {
                    // It may be another run, begun since.
                    Some(Known::Run(..)) if self.layout.run(&stone.id).is_there()? => {}
                    Some(Known::Run(number, _)) => rows.push((Some(number), stone.clone())),
                    Some(Known::Evicted(known)) if known.evicted_at >= stone.evicted_at => {}
                    Some(Known::Evicted(_)) | None => rows.push((None, stone.clone())),
                }
            }
            self.commit_evicted(index, &rows, std::iter::empty())?;
            let mut going = lock(&self.evictions.going);
            batch.iter().for_each(|stone| drop(going.remove(&stone.id)));
        }
        Ok(())
    }
}

/// What the index still has to hear of an eviction that was cut short, if anything.
pub(crate) fn outstanding(
    index: &Index,
    layout: &Layout,
    trashed: &Trashed,
    policy: &RetentionPolicy,
) -> Result<Option<Evicted>, LogError> {
    let (number, run) = match index.find(&trashed.id)? {
        // It may be another run, begun since.
        Some(Known::Run(..)) if layout.run(&trashed.id).is_there()? => return Ok(None),
        Some(Known::Run(number, record)) => (Some(number), Some(record.run)),
        Some(Known::Evicted(stone)) if stone.evicted_at >= trashed.at => return Ok(None),
        Some(Known::Evicted(_)) | None => (None, trashed.folder.read_metadata().ok().flatten()),
    };
    let Some(run) = run else { return Ok(None) };
    tracing::info!(run = %trashed.id, "an eviction that was cut short is finished");
    Ok(Some((number, tombstone(trashed, &run, policy))))
}

/// What is left of a run in the trash.
pub(crate) fn tombstone(trashed: &Trashed, run: &JobMetadata, policy: &RetentionPolicy) -> Tombstone {
    let reason = EvictionReason::from_word(&trashed.reason);
    let reason = reason.map_or(trashed.reason.clone(), |reason| reason.under(policy));
    // A copied document tells of the run that it was copied from.
    Tombstone { id: trashed.id.clone(), ..Tombstone::of(run, trashed.at, reason) }
}

/// Removes what is ours of an evicted run. What can't be removed stays in the trash, and is tried again.
pub(super) fn remove(folder: &RunFolder, removal: Removal) {
    match folder.remove_own_files(removal) {
        Ok(foreign) if foreign.is_empty() || removal == Removal::LogsOnly => {}
        Ok(foreign) => {
            tracing::warn!(path = %folder.path().display(), ?foreign, "what others put into the folder of an evicted run stays there");
        }
        Err(error) => tracing::warn!(%error, "what is left of an evicted run can't be removed yet"),
    }
}
