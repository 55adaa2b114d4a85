//! What the index's thread does: gathers what runs have to say and writes it, all in one transaction.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use crate::error::LogError;
use crate::index::{Changes, Index};
use crate::store::file::reconcile::mend;
use crate::store::file::shared::{Shared, Tracked};
use crate::store::file::writer::disk_bytes;

pub(crate) fn commit_waiting(shared: &Weak<Shared>) {
    let Some(shared) = shared.upgrade() else { return };
    shared.nudged.store(false, Ordering::Relaxed);
    if let Some(index) = &shared.index {
        commit_all(&shared, index);
    }
}

/// Writes what waits to the index, and lets go of runs that are over and written.
pub(crate) fn commit_all(shared: &Shared, index: &Index) {
    mend(shared, index);
    let mut changes = Changes { forgotten: std::mem::take(&mut *shared.forgotten()), ..Changes::default() };
    let mut written = Vec::new();
    for tracked in shared.all_tracked() {
        if let Tracked::Own(own) = &tracked {
            own.try_flush();
        }
        let run = tracked.run();
        let Some(number) = run.number else { continue };
        // What a run takes up on disk is known when its writer has written all of it.
        let settled = run.is_over() && tracked.is_settled();
        let disk_bytes = match &tracked {
            Tracked::Foreign(_) if settled => Some(disk_bytes(&run.folder)),
            _ => None,
        };
        let mut state = run.state();
        if !state.waiting.dirty && !settled {
            continue;
        }
        state.waiting.dirty = false;
        state.disk_bytes = disk_bytes.unwrap_or(state.disk_bytes);
        changes.runs.push((number, state.record()));
        changes.lines.extend(state.waiting.lines.iter().map(|&at| (number, at)));
        changes.progress.extend(state.waiting.places.iter().map(|&at| (number, at)));
        written.push((Arc::clone(run), state.waiting.lines.len(), state.waiting.places.len(), settled));
    }
    if changes.is_empty() {
        return;
    }
    match index.commit(&changes) {
        Ok(()) => {
            let mut runs = shared.runs();
            for (run, lines, places, settled) in written {
                let mut state = run.state();
                state.waiting.committed(lines, places);
                if settled && state.run.state.is_over() && !state.waiting.dirty {
                    runs.by_id.remove(&run.id);
                }
            }
        }
        Err(LogError::Closed) => {}
        Err(error) => {
            tracing::error!(%error, "the index can't be written; what waits for it is kept");
            for (run, ..) in written {
                run.state().waiting.dirty = true;
            }
            shared.forgotten().extend(changes.forgotten);
            mend(shared, index);
        }
    }
}
