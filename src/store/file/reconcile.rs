//! Bringing the index and the run folders together, in the background: folders that no row tells of are taken up,
//! rows whose folder is gone are let go of, and an index that fails is made anew while reads go on.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use crate::error::LogError;
use crate::index::{Index, Known, RunNumber, Urgency};
use crate::layout::RunFolder;
use crate::logfile::ReadFile;
use crate::run::JobRunId;
use crate::store::file::list::{created, is_outlived};
use crate::store::file::shared::{Shared, Tracked};
use crate::store::file::tracker::{News, Tracker};

/// How long a folder that is being prepared is left alone: its journal is locked long before it is this old.
const PREPARING: Duration = Duration::from_secs(60);

/// Rows that are looked at with every rescan: few enough that it costs about what it did, however many there are.
const ROWS_PER_RESCAN: usize = 1_000;

/// Takes up every run folder that the index does not know, oldest first, so that their numbers rise with their age,
/// and lets go of what is gone.
pub(crate) fn look_around(shared: &Arc<Shared>) {
    if let Some(index) = &shared.index {
        loop {
            mend(shared, index);
            if let Err(error) = reconcile(shared, index) {
                tracing::warn!(%error, "comparing the index with the folders");
            }
            if shared.is_closed() || shared.discovery.set_done_unless_renewed() {
                break;
            }
        }
        // What could not be written is tried again.
        shared.nudge(Urgency::Soon);
    }
    shared.announce();
}

fn reconcile(shared: &Arc<Shared>, index: &Index) -> Result<(), LogError> {
    if shared.check_home().is_err() {
        return Ok(());
    }
    let mut numbers = shared.discovery.take_renewed().then(|| Renumbering::new(shared));
    let listing = shared.layout.list()?;
    shared.check_home()?;
    remove_leftovers(&listing.prepared);
    let Differences { mut orphans, ghosts } = compare(index, listing.runs)?;
    orphans.retain(|id| shared.tracked(id).is_none());
    orphans.sort_by_cached_key(|id| age(shared, id));
    for id in &orphans {
        if shared.is_closed() {
            return Ok(());
        }
        let number = numbers.as_mut().map(|numbers| numbers.pick(shared, id));
        look(shared, id, number);
    }
    for (number, record) in index.live_runs()? {
        // It could not be taken up before.
        let id = record.run.id();
        if shared.tracked(id).is_none()
            && matches!(index.find(id), Ok(Some(Known::Run(_, record))) if !record.run.state.is_over())
            && matches!(shared.layout.run(id).is_there(), Ok(true))
        {
            take_up(shared, id, Some(number));
        }
    }
    for (id, number) in ghosts {
        // It may have been made after the listing.
        let is_going = shared.evictions.going(&id).is_some();
        let is_gone = matches!(shared.layout.run(&id).is_path_taken(), Ok(false));
        if !is_going && is_gone && shared.tracked(&id).is_none() && shared.check_home().is_ok() {
            tracing::warn!(run = %id, "the run's folder is gone");
            shared.forget_rows(number);
        }
    }
    Ok(())
}

/// Looks whether the next rows in their turn are those of the runs in their folders: an id that was used again while
/// nobody saw it is noticed at last, however many runs there are.
pub(crate) fn look_at_next_rows(shared: &Arc<Shared>) {
    if let Some(index) = &shared.index
        && let Err(error) = look_at_rows(shared, index)
    {
        tracing::warn!(%error, "comparing rows with their folders");
    }
}

fn look_at_rows(shared: &Arc<Shared>, index: &Index) -> Result<(), LogError> {
    if shared.is_closed() || shared.check_home().is_err() {
        return Ok(());
    }
    let (mut found, mut reached) = (Vec::new(), 0);
    index.newest_below(shared.looks.turn_below(), |number, record| {
        reached = number;
        found.push(record.run);
        found.len() < ROWS_PER_RESCAN
    })?;
    shared.looks.set_reached(if found.len() < ROWS_PER_RESCAN { 0 } else { reached });
    for run in &found {
        is_outlived(shared, run);
    }
    Ok(())
}

/// Takes up a run that appeared, in place of another that had its id before; a store without an index leaves that to
/// those who ask for the run.
pub(crate) fn look(shared: &Arc<Shared>, id: &JobRunId, number: Option<RunNumber>) {
    if let Some(tracked) = shared.tracked(id).filter(Tracked::is_outlived) {
        shared.forget(tracked.run());
    }
    if shared.index.is_some() {
        take_up(shared, id, number);
    }
    shared.announce();
}

pub(crate) fn take_up(shared: &Arc<Shared>, id: &JobRunId, number: Option<RunNumber>) {
    match shared.adopt(id, number) {
        Ok(_) | Err(LogError::NotFound { .. }) => {}
        Err(error) => tracing::warn!(%error, run = %id, "a run folder can't be taken up"),
    }
}

/// Where index and folders differ.
#[derive(Debug, Default)]
pub(crate) struct Differences {
    /// Folders that no row tells of.
    pub(crate) orphans: Vec<JobRunId>,
    /// Rows without a folder.
    pub(crate) ghosts: Vec<(JobRunId, RunNumber)>,
}

/// Compares the rows with a listing of the folders, both in the order of the ids.
pub(crate) fn compare(index: &Index, mut folders: Vec<JobRunId>) -> Result<Differences, LogError> {
    folders.sort_unstable();
    let mut folders = folders.into_iter().peekable();
    let mut differences = Differences::default();
    index.ids(|id, number| {
        while let Some(folder) = folders.peek() {
            match folder.as_str().cmp(id) {
                Ordering::Less => differences.orphans.extend(folders.next()),
                Ordering::Equal => {
                    folders.next();
                    return true;
                }
                Ordering::Greater => break,
            }
        }
        differences.ghosts.extend(id.parse().ok().map(|id| (id, number)));
        true
    })?;
    differences.orphans.extend(folders);
    Ok(differences)
}

/// Removes folders in which a run was prepared by a writer that died.
fn remove_leftovers(prepared: &[RunFolder]) {
    for folder in prepared.iter().filter(|folder| is_leftover(folder)) {
        tracing::info!(path = %folder.path().display(), "removing what a writer left that died before its run began");
        folder.discard();
    }
}

/// Whether nobody prepares a run in a folder any more.
pub(crate) fn is_leftover(prepared: &RunFolder) -> bool {
    if prepared.age() < PREPARING {
        return false;
    }
    match ReadFile::open_if_there(&prepared.journal()) {
        Ok(Some(journal)) => matches!(journal.is_locked(), Ok(false)),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// Makes an index usable again that failed. When it had to be made anew, what is in memory is written to it again,
/// and the folders are taken up in the background.
pub(crate) fn mend(shared: &Shared, index: &Index) {
    let lacked_room = index.lacks_room();
    match index.mend(|| shared.discovery.set_renewed()) {
        Ok(false) => {}
        Ok(true) => {
            for tracked in shared.all_tracked() {
                let run = tracked.run();
                let mut news = News { indexed: true, ..News::default() };
                if let Err(error) = derive_again(&run.folder, &run.id, &mut news) {
                    tracing::warn!(%error, run = %run.id, "places in the run are known again when it is over");
                }
                let mut state = run.state();
                let waiting = std::mem::take(&mut state.waiting);
                state.waiting.extend(news.found.lines, news.found.places);
                state.waiting.extend(waiting.lines, waiting.places);
                state.waiting.dirty = true;
            }
            shared.runs().forgotten.clear();
            shared.nudge(Urgency::Now);
            if let Some(watch) = shared.watching() {
                watch.discover_all();
            }
        }
        // That is tried every few seconds, and was told.
        Err(error) if lacked_room => tracing::debug!(%error, "the index can't be made anew yet"),
        Err(error) => tracing::error!(%error, "the index can't be made anew; reads go on without it"),
    }
}

/// What an index that is lost had of a run that is in memory.
fn derive_again(folder: &RunFolder, id: &JobRunId, news: &mut News) -> Result<(), LogError> {
    let (mut tracker, run, _) = Tracker::open(folder, id, None)?;
    tracker.catch_up(folder, &run, news)?;
    Ok(())
}

/// What runs are ordered by: when the folder was made, and where the file system's clock did not tick in between, the id,
/// which rises with time where it was generated.
type Age = (Option<u64>, JobRunId);

fn age(shared: &Shared, id: &JobRunId) -> Age {
    (created(shared, id), id.clone())
}

/// Numbers for the runs of an index that was lost: between those that are in memory and keep theirs.
struct Renumbering {
    last: RunNumber,
    /// Runs in memory by their age, and their numbers.
    kept: Vec<(Age, RunNumber)>,
}

impl Renumbering {
    fn new(shared: &Shared) -> Self {
        let tracked = shared.all_tracked();
        let mut kept: Vec<_> = tracked
            .iter()
            .filter_map(|tracked| Some((age(shared, &tracked.run().id), tracked.run().number?)))
            .collect();
        kept.sort_unstable();
        Self { last: 0, kept }
    }

    /// A number that no run has, above those of the runs that began earlier.
    fn pick(&mut self, shared: &Shared, id: &JobRunId) -> RunNumber {
        let age = age(shared, id);
        let earlier = self.kept.iter().take_while(|(kept, _)| *kept < age);
        let floor = earlier.map(|&(_, number)| number).max().unwrap_or(0).max(self.last);
        let mut number = floor.saturating_add(1);
        while self.kept.iter().any(|&(_, kept)| kept == number) {
            number += 1;
        }
        self.last = shared.claim_number(number);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Changes;
    use crate::index::codec::RunRecord;
    use crate::index::progress::Cuts;
    use crate::line::UnixMicros;
    use crate::run::{JobMetadata, RunSpec};

    #[test]
    fn folders_without_rows_and_rows_without_folders_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(folder.path().join("index.redb")).unwrap();
        let id = |text: &str| -> JobRunId { text.parse().unwrap() };
        let runs = ["b", "d", "e", "g"].iter().zip(1..).map(|(text, number)| {
            let run = JobMetadata::started(RunSpec::new(id(text)), UnixMicros(1));
            let (gaps, cuts) = (Vec::new(), Cuts::default());
            let record = RunRecord { run, gaps, cuts, has_journal: true, disk_bytes: 0, compressed: false };
            (number, record)
        });
        index.commit(&Changes { runs: runs.collect(), ..Changes::default() }).unwrap();
        let found = compare(&index, ["z", "e", "a", "c", "b"].map(id).to_vec()).unwrap();
        assert_eq!(found.orphans, ["a", "c", "z"].map(id));
        assert_eq!(found.ghosts, [(id("d"), 2), (id("g"), 4)]);
        let found = compare(&index, Vec::new()).unwrap();
        assert_eq!((found.orphans.len(), found.ghosts.len()), (0, 4));
    }
}
