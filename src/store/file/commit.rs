//! What the index's thread does: gathers what runs have to say and writes it, all in one transaction.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::error::LogError;
use crate::index::{Changes, Committed, Index};
use crate::meter;
use crate::store::file::handle::Lent;
use crate::store::file::reconcile::mend;
use crate::store::file::shared::{Shared, Tracked};

pub(crate) fn commit_waiting(store: &Lent) -> Committed {
    let committed = store.with(|shared| {
        shared.nudged.store(false, Ordering::Relaxed);
        shared.index.as_ref().map(|index| commit_all(shared, index))
    });
    committed.flatten().unwrap_or(Committed::Done)
}

/// Writes what waits to the index, and lets go of runs that are over and written.
pub(crate) fn commit_all(shared: &Shared, index: &Index) -> Committed {
    let _one_at_a_time = shared.committing.lock().unwrap_or_else(PoisonError::into_inner);
    for own in shared.all_tracked().iter().filter_map(Tracked::own) {
        own.try_flush();
    }
    if shared.check_home().is_err() {
        // Of what waits, much is looked up in its folder first. It is written when that is back.
        return Committed::Done;
    }
    mend(shared, index);
    let mut changes = Changes::default();
    {
        // Before the runs: a run that is forgotten from here on must not be written behind that.
        let mut runs = shared.runs();
        changes.forgotten = std::mem::take(&mut runs.forgotten);
        changes.compressed = std::mem::take(&mut runs.compressed);
    }
    let mut written = Vec::new();
    for tracked in shared.all_tracked() {
        let run = tracked.run();
        let Some(number) = run.number else { continue };
        let was_over = run.is_over();
        if !tracked.is_settled(shared.is_closed()) {
            // For the index it goes on until its `metadata.json` is written: whoever opens the store next is to
            // look at it again.
            continue;
        }
        // What a run takes up on disk is known when its writer has written all of it.
        let disk_bytes = match &tracked {
            Tracked::Foreign(_) if was_over => Some(run.folder.disk_bytes()),
            _ => None,
        };
        let mut state = run.state();
        if !state.waiting.dirty {
            let is_over = state.run.state.is_over();
            drop(state);
            if is_over && tracked.is_settled(shared.is_closed()) {
                // It was written before, but its `metadata.json` was not there yet.
                shared.runs().remove(run);
            }
            continue;
        }
        if state.run.state.is_over() && !was_over {
            // It has just ended, and is looked at once more.
            continue;
        }
        state.waiting.dirty = false;
        state.disk_bytes = disk_bytes.unwrap_or(state.disk_bytes);
        changes.runs.push((number, state.record()));
        if std::mem::take(&mut state.waiting.pin) || state.pinned {
            changes.pins.push((number, state.pinned));
        }
        changes.lines.extend(state.waiting.lines.iter().map(|&at| (number, at)));
        changes.progress.extend(state.waiting.places.iter().map(|&at| (number, at)));
        written.push((Arc::clone(run), state.waiting.lines.len(), state.waiting.places.len()));
    }
    if changes.is_empty() {
        return Committed::Done;
    }
    let committed = index.commit(&changes);
    meter::committed(committed.is_ok());
    match committed {
        Ok(()) => {
            let ended = changes.runs.iter().any(|(_, record)| record.run.state.is_over());
            if ended && let Some(evictor) = shared.evictor.get() {
                evictor.run_ended();
            }
            let mut runs = shared.runs();
            for (run, lines, places) in written {
                let mut state = run.state();
                state.waiting.committed(lines, places);
                if state.run.state.is_over() && !state.waiting.dirty {
                    runs.remove(&run);
                }
            }
            Committed::Done
        }
        Err(LogError::Closed) => Committed::Done,
        Err(error) => {
            tracing::error!(%error, "the index can't be written; what waits for it is kept");
            {
                let mut runs = shared.runs();
                runs.forgotten.append(&mut changes.forgotten);
                runs.compressed.append(&mut changes.compressed);
            }
            for (run, ..) in written {
                let mut state = run.state();
                (state.waiting.pin, state.waiting.dirty) = (true, true);
            }
            Committed::Failed
        }
    }
}
