//! Asking for a list of runs.

use crate::run::{JobMetadata, JobRunId, StateKind};

/// Which runs to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunQuery {
    /// At most this many; `None` for 100.
    pub limit: Option<usize>,
    /// Where the page before this one ended.
    pub cursor: Option<RunCursor>,
    /// Only runs in this state.
    pub state: Option<StateKind>,
    /// Only runs that build this partition.
    pub partition: Option<String>,
    /// Only runs whose id starts so.
    pub id_prefix: Option<String>,
}

impl RunQuery {
    /// The page size when none is asked for.
    pub const DEFAULT_LIMIT: usize = 100;

    pub(crate) fn page_size(&self) -> usize {
        self.limit.unwrap_or(Self::DEFAULT_LIMIT).max(1)
    }

    pub(crate) fn matches(&self, run: &JobMetadata) -> bool {
        self.state.is_none_or(|state| run.state.kind() == state)
            && self.partition.as_ref().is_none_or(|name| run.spec.building_partitions.contains(name))
            && self.id_prefix.as_ref().is_none_or(|prefix| run.id().as_str().starts_with(prefix.as_str()))
    }
}

/// Where a page of runs ended; the next page goes on below it. Only the store that gave it can tell what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunCursor(pub u64);

/// A page of runs, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunPage {
    /// The runs.
    pub runs: Vec<JobMetadata>,
    /// Where the next page begins; `None` on the last page.
    pub next: Option<RunCursor>,
    /// Which of the runs are pinned.
    pub pinned: Vec<JobRunId>,
}
