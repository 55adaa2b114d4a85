//! Listing runs, newest first: from the index and what it does not have yet, or from the folders.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::error::LogError;
use crate::index::{Index, RunNumber};
use crate::run::{JobMetadata, JobRunId, StateKind};
use crate::store::file::Inner;
use crate::store::{RunCursor, RunPage, RunQuery};

/// Lists runs of a store with an index; a cursor is a run number.
pub(crate) fn list_indexed(inner: &Inner, index: &Index, query: &RunQuery) -> Result<RunPage, LogError> {
    let below = query.cursor.map_or(RunNumber::MAX, |cursor| cursor.0);
    // One more than a page, to know whether there is another.
    let wanted = query.page_size().saturating_add(1);
    let mut found: Vec<(RunNumber, JobMetadata)> = Vec::new();
    let mut in_memory = Vec::new();
    for tracked in inner.all_tracked() {
        let Some(number) = tracked.run().number else { continue };
        in_memory.push(number);
        let run = tracked.run().metadata();
        if number < below && query.matches(&run) {
            found.push((number, run));
        }
    }
    in_memory.sort_unstable();
    let mut of_index = 0;
    let mut take = |number: RunNumber, run: JobMetadata| {
        if number < below && in_memory.binary_search(&number).is_err() && query.matches(&run) {
            found.push((number, run));
            of_index += 1;
        }
        of_index < wanted
    };
    if query.state == Some(StateKind::Running) {
        // Every run that goes on is in memory.
    } else if let Some(prefix) = &query.id_prefix {
        for (number, record) in index.with_prefix(prefix, usize::MAX)? {
            take(number, record.run);
        }
    } else if let Some(partition) = &query.partition {
        index.newest_of_partition(partition, below, |number, record| take(number, record.run))?;
    } else {
        index.newest_below(below, |number, record| take(number, record.run))?;
    }
    found.sort_unstable_by_key(|&(number, _)| std::cmp::Reverse(number));
    Ok(page(found, query))
}

/// Lists runs of a store without an index; a cursor is the nanosecond in which a folder was made.
pub(crate) fn list_folders(inner: &Arc<Inner>, query: &RunQuery) -> Result<RunPage, LogError> {
    let below = query.cursor.map_or(u64::MAX, |cursor| cursor.0);
    let mut folders: Vec<_> = inner
        .layout
        .list_runs()?
        .into_iter()
        .filter(|id| query.id_prefix.as_ref().is_none_or(|prefix| id.as_str().starts_with(prefix.as_str())))
        .filter_map(|id| Some((created(inner, &id)?, id)))
        .filter(|&(created, _)| created < below)
        .collect();
    folders.sort_unstable_by(|a, b| b.cmp(a));
    let mut found = Vec::new();
    for (created, id) in folders {
        if found.len() > query.page_size() {
            break;
        }
        match describe(inner, &id) {
            Ok(run) if query.matches(&run) => found.push((created, run)),
            Ok(_) | Err(LogError::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, run = %id, "a run folder can't be read"),
        }
    }
    Ok(page(found, query))
}

fn page(mut found: Vec<(u64, JobMetadata)>, query: &RunQuery) -> RunPage {
    let more = found.len() > query.page_size();
    found.truncate(query.page_size());
    let next = found.last().filter(|_| more).map(|&(key, _)| RunCursor(key));
    RunPage { runs: found.into_iter().map(|(_, run)| run).collect(), next }
}

/// When a run's folder was made, in nanoseconds since 1970; `None` if it is gone.
pub(crate) fn created(inner: &Inner, id: &JobRunId) -> Option<u64> {
    let folder = std::fs::metadata(inner.layout.run(id).path()).ok()?;
    let created = folder.created().or_else(|_| folder.modified()).ok()?;
    u64::try_from(created.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()
}

/// What is known of a run: from its `metadata.json`, or from its journal while it goes on.
fn describe(inner: &Arc<Inner>, id: &JobRunId) -> Result<JobMetadata, LogError> {
    if inner.tracked(id).is_none()
        && let Ok(Some(run)) = inner.layout.run(id).read_metadata()
        && run.id() == id
        && run.state.is_over()
    {
        return Ok(run);
    }
    Ok(inner.find(id)?.metadata())
}
