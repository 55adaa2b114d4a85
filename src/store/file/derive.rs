//! What the index has to hold of a run, by the run's folder alone.

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::progress::Progress;
use crate::layout::RunFolder;
use crate::line::UnixMicros;
use crate::run::{JobMetadata, JobRunId, RunState};
use crate::store::file::tracker::{Found, News, Source, Tracker, written_end};

/// How many places are gathered before they are given away: memory does not grow with the log.
const AT_ONCE: usize = 256;

/// A run as its folder tells of it.
#[derive(Debug)]
pub(crate) struct Derived {
    pub(crate) record: RunRecord,
    /// How far its journal and its logs tell of it.
    pub(crate) progress: Progress,
    pub(crate) standing: Standing,
    /// Bytes of the journal behind its last sound record.
    pub(crate) torn: u64,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is over, and whatever tells of it says so.
    Over,
    /// It is over by its `metadata.json`; its journal ends too early.
    OverByMetadata,
    /// Somebody writes it.
    Live,
    /// It has no end and nobody writes it.
    Abandoned,
}

/// When the run in a folder started.
pub(crate) fn started_at(folder: &RunFolder, id: &JobRunId) -> Result<UnixMicros, LogError> {
    let (_, run, _) = Tracker::open(folder, id, None)?;
    Ok(run.started_at)
}

/// Goes through a run's journal, or its logs where there is none, and gives all places that the index keeps.
pub(crate) fn derive(
    folder: &RunFolder,
    id: &JobRunId,
    mut give: impl FnMut(&Found) -> Result<(), LogError>,
) -> Result<Derived, LogError> {
    let (mut tracker, start, _) = Tracker::open(folder, id, None)?;
    let mut news = News { indexed: true, at_most: AT_ONCE, ..News::default() };
    let start = JobMetadata { state: RunState::Running, ..start };
    follow(&mut tracker, folder, &start, &mut news, &mut give)?;
    let (run, standing) = match news.end.take() {
        Some(end) => (*end, Standing::Over),
        None => stand(&mut tracker, folder, &mut news, start, &mut give)?,
    };
    let journal_length = match &tracker.source {
        Source::Journal(journal) => journal.file().len()?,
        Source::Logs => 0,
    };
    let over = run.state.is_over();
    let record = RunRecord {
        run,
        gaps: news.gaps,
        cuts: tracker.cuts,
        has_journal: tracker.has_journal(),
        disk_bytes: if over { folder.disk_bytes() } else { 0 },
        compressed: over && folder.is_compressed(),
    };
    let torn = journal_length.saturating_sub(tracker.progress.journal);
    Ok(Derived { record, progress: tracker.progress, standing, torn })
}

/// What is known of a run whose journal does not tell of its end, and where it stands.
fn stand(
    tracker: &mut Tracker,
    folder: &RunFolder,
    news: &mut News,
    start: JobMetadata,
    give: &mut impl FnMut(&Found) -> Result<(), LogError>,
) -> Result<(JobMetadata, Standing), LogError> {
    let so_far = |tracker: &Tracker| {
        let [stdout, stderr] = tracker.totals();
        JobMetadata { stdout, stderr, ..start.clone() }
    };
    let Source::Journal(journal) = &tracker.source else { return Ok((so_far(tracker), Standing::Live)) };
    if journal.file().is_locked()? {
        return Ok((so_far(tracker), Standing::Live));
    }
    // The writer may have written the end just before it went.
    follow(tracker, folder, &start, news, give)?;
    if let Some(end) = news.end.take() {
        return Ok((*end, Standing::Over));
    }
    let Some(mut written) = written_end(folder, start.id(), start.started_at)? else {
        return Ok((so_far(tracker), Standing::Abandoned));
    };
    while tracker.count_lines(folder, news)? {
        give_away(news, give)?;
    }
    give_away(news, give)?;
    tracker.fill_in(&mut written);
    Ok((written, Standing::OverByMetadata))
}

fn follow(
    tracker: &mut Tracker,
    folder: &RunFolder,
    run: &JobMetadata,
    news: &mut News,
    give: &mut impl FnMut(&Found) -> Result<(), LogError>,
) -> Result<(), LogError> {
    loop {
        let more = tracker.catch_up(folder, run, news)?;
        give_away(news, give)?;
        if !more {
            return Ok(());
        }
    }
}

fn give_away(news: &mut News, give: &mut impl FnMut(&Found) -> Result<(), LogError>) -> Result<(), LogError> {
    give(&news.found)?;
    news.found.clear();
    Ok(())
}
