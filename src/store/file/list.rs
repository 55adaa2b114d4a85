//! Listing runs, newest first: from the index and what it does not have yet, or from the folders.

use std::collections::HashSet;
use std::sync::Arc;

use crate::error::LogError;
use crate::index::{Index, RunNumber};
use crate::run::{JobMetadata, JobRunId, StateKind};
use crate::store::file::reconcile::mend;
use crate::store::file::shared::Shared;
use crate::store::{RunCursor, RunPage, RunQuery};

/// How much later than its folder a run can have started: the file system's clock ticks every few milliseconds.
const COARSE_MICROS: u64 = 20_000;

/// Lists runs of a store with an index once every folder is known. An index that fails or is made anew in the
/// meantime is asked again when it knows every folder again, and once more when it was found to know a run that is not in
/// its folder any more.
pub(crate) fn list_when_known(
    shared: &Arc<Shared>,
    index: &Index,
    query: &RunQuery,
) -> Result<RunPage, LogError> {
    let (mut failed, mut looked) = (false, false);
    loop {
        let renewals = shared.discovery.renewals();
        shared.discovery.wait_until_done();
        let listed = list_indexed(shared, index, query);
        match listed {
            Err(LogError::Index { .. }) if !failed => {
                failed = true;
                mend(shared, index);
            }
            Err(error) => return Err(error),
            Ok(page) if shared.discovery.renewals() == renewals || shared.is_closed() => {
                // All of them are looked at: each may be another's.
                let outlived = page.runs.iter().filter(|run| !looked && is_outlived(shared, run)).count();
                if outlived == 0 {
                    return Ok(page);
                }
                looked = true;
            }
            Ok(_) => {}
        }
    }
}

/// Lists runs of a store with an index; a cursor is a run number.
pub(crate) fn list_indexed(shared: &Shared, index: &Index, query: &RunQuery) -> Result<RunPage, LogError> {
    let below = query.cursor.map_or(RunNumber::MAX, |cursor| cursor.0);
    // One more than a page, to know whether there is another.
    let wanted = query.page_size().saturating_add(1);
    let mut found: Vec<(RunNumber, JobMetadata)> = Vec::new();
    let mut in_memory = HashSet::new();
    for tracked in shared.all_tracked() {
        let Some(number) = tracked.run().number else { continue };
        let run = tracked.run().metadata();
        // The index may have another number for its id still.
        in_memory.insert(run.id().clone());
        if number < below && query.matches(&run) {
            found.push((number, run));
        }
    }
    let mut of_index = 0;
    let mut take = |number: RunNumber, run: JobMetadata| {
        if number < below && !in_memory.contains(run.id()) && query.matches(&run) {
            found.push((number, run));
            of_index += 1;
        }
        // Of those that are not the newest none is kept.
        if found.len() / 2 > wanted.saturating_add(in_memory.len()) {
            found.sort_unstable_by_key(|&(number, _)| std::cmp::Reverse(number));
            found.truncate(wanted);
        }
        of_index < wanted
    };
    if query.state == Some(StateKind::Running) {
        // Every run that goes on is in memory.
    } else if let Some(prefix) = &query.id_prefix {
        // They come by their ids, so every one has to be looked at.
        index.with_prefix(prefix, |number, record| {
            take(number, record.run);
        })?;
    } else if let Some(partition) = &query.partition {
        index.newest_of_partition(partition, below, |number, record| take(number, record.run))?;
    } else {
        index.newest_below(below, |number, record| take(number, record.run))?;
    }
    found.sort_unstable_by_key(|&(number, _)| std::cmp::Reverse(number));
    Ok(page(found, query))
}

/// Lists runs of a store without an index; a cursor is the microsecond of a start.
///
/// The folders' ages say what to look at first. They are coarse, so the runs' own start times settle the order of
/// folders that were made at about the same time.
pub(crate) fn list_folders(shared: &Arc<Shared>, query: &RunQuery) -> Result<RunPage, LogError> {
    let below = query.cursor.map_or(u64::MAX, |cursor| cursor.0);
    let mut folders: Vec<(u64, JobRunId)> = shared
        .layout
        .list_runs()?
        .into_iter()
        .filter(|id| query.id_prefix.as_ref().is_none_or(|prefix| id.as_str().starts_with(prefix.as_str())))
        .filter_map(|id| Some((created(shared, &id)?, id)))
        .filter(|&(created, _)| created < below)
        .collect();
    folders.sort_unstable_by(|a, b| b.cmp(a));
    let mut found = Vec::new();
    let mut enough_at = None;
    for (created, id) in folders {
        if enough_at.is_some_and(|last| created + COARSE_MICROS < last) {
            break;
        }
        match describe(shared, &id) {
            Ok(run) => {
                let key = run.started_at.0.clamp(created, created + COARSE_MICROS);
                if key < below && query.matches(&run) {
                    found.push((key, run));
                }
            }
            Err(LogError::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, run = %id, "a run folder can't be read"),
        }
        if found.len() > query.page_size() {
            enough_at.get_or_insert(created);
        }
    }
    found.sort_unstable_by(|a, b| (b.0, b.1.id()).cmp(&(a.0, a.1.id())));
    Ok(page(found, query))
}

fn page(mut found: Vec<(u64, JobMetadata)>, query: &RunQuery) -> RunPage {
    let more = found.len() > query.page_size();
    found.truncate(query.page_size());
    let next = found.last().filter(|_| more).map(|&(key, _)| RunCursor(key));
    RunPage { runs: found.into_iter().map(|(_, run)| run).collect(), next, pinned: Vec::new() }
}

/// The same page with which of its runs are pinned, as their folders say, and without those that are gone or just going.
pub(crate) fn with_pins(shared: &Shared, mut page: RunPage) -> RunPage {
    page.runs.retain(|run| {
        shared.evictions.going(run.id()).is_none()
            && !matches!(shared.layout.run(run.id()).is_there(), Ok(false))
    });
    let is_pinned = |run: &&JobMetadata| shared.layout.run(run.id()).is_pinned();
    page.pinned = page.runs.iter().filter(is_pinned).map(|run| run.id().clone()).collect();
    page
}

/// Looks whether a run that is over, as the index says, is not in its folder any more: if another has its id by now, that
/// one is taken up in its place. A folder that was there before that end is that of the run, which costs one look.
pub(crate) fn is_outlived(shared: &Arc<Shared>, run: &JobMetadata) -> bool {
    let Some(ended) = run.state.ended() else { return false };
    let made = shared.layout.run(run.id()).made();
    if made.is_some_and(|made| made.0 + COARSE_MICROS < ended.0) {
        return false;
    }
    match shared.find(run.id()) {
        Ok(found) => found.state().run.started_at != run.started_at,
        Err(LogError::NotFound { .. } | LogError::Evicted(_)) => true,
        Err(_) => false,
    }
}

/// When a run's folder was made, in microseconds since 1970; `None` if it is gone.
pub(crate) fn created(shared: &Shared, id: &JobRunId) -> Option<u64> {
    shared.layout.run(id).made().map(|made| made.0)
}

/// What is known of a run: from its `metadata.json`, or from its journal while it goes on.
fn describe(shared: &Arc<Shared>, id: &JobRunId) -> Result<JobMetadata, LogError> {
    // A document by another tool need not say how much there is: then the lines are counted.
    let folder = shared.layout.run(id);
    if shared.tracked(id).is_none()
        && folder.has_journal()
        && let Ok(Some(run)) = folder.read_metadata()
        && run.id() == id
        && run.state.is_over()
    {
        return Ok(run);
    }
    Ok(shared.find(id)?.metadata())
}
