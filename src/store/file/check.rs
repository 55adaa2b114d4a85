//! Whether files, journals, index and metadata agree, and mending what does not, while no service has the folder.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::{Changes, Index, RunNumber};
use crate::layout::{Layout, Removal, RunFolder, StoreLock, Trashed};
use crate::retention::RetentionPolicy;
use crate::run::JobRunId;
use crate::store::file::check_run::check_run;
use crate::store::file::evict::outstanding;
use crate::store::file::rebuild::{RebuildProgress, rebuild_holding};
use crate::store::file::reconcile::{compare, is_leftover};
use crate::store::file::repair::{mend_run, write_rows};

/// What all runs may take up more or less than the index says, beside one in a hundred, in bytes.
const MAY_DIFFER: u64 = 1024 * 1024;

/// How thorough a check is, and whether it mends what it finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Whether to read every log from its beginning to its end, count its lines, look at every checkpoint, and at
    /// every page of the index.
    pub deep: bool,
    /// Whether to mend what can be mended.
    pub repair: bool,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Run folders that were looked at.
    pub runs: u64,
    /// Of those, runs that are being written: they are left alone.
    pub live: u64,
    /// What does not agree, in the order in which it was found.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Whether everything agrees, or agrees now.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|finding| matches!(finding.repair, Repair::Done { .. }))
    }
}

/// Something that does not agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// The run that it is about, if it is about one.
    pub run: Option<JobRunId>,
    /// What exactly.
    pub detail: String,
    /// What was done about it.
    pub repair: Repair,
}

/// A kind of [`Finding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// There are runs and no index.
    IndexMissing,
    /// The index can't be read, or is not what was written.
    IndexDamaged,
    /// The index has a run whose folder is gone.
    Ghost,
    /// There is a run folder that the index does not know.
    Orphan,
    /// The index tells something else of a run than its folder does.
    RecordDiffers,
    /// The index's places in a run are not those that the run's folder gives.
    PlacesDiffer,
    /// The index has rows of a run that it does not know.
    StrayRows,
    /// A run has no end, and nobody writes it any more.
    Abandoned,
    /// Behind a journal's last sound record there are more bytes.
    JournalTorn,
    /// A journal ends before the run does that it is of.
    JournalDamaged,
    /// A run is over and has no `metadata.json`.
    MetadataMissing,
    /// A `metadata.json` can't be read, or tells something else than the journal.
    MetadataDiffers,
    /// A log file is shorter than what was written to it.
    LogShort,
    /// A log file is longer than what was written to it.
    LogLong,
    /// The lines of a log are not where, or not as many as, its journal says.
    LinesDiffer,
    /// A part of a compressed log or journal is not what was written.
    CompressedDamaged,
    /// What the index says that runs take up on disk is not what they take up.
    TotalsDiffer,
    /// A file or folder that somebody was preparing or removing when it died.
    Leftover,
    /// A run folder can't be read.
    Unreadable,
}

/// What was done about a [`Finding`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Repair {
    /// Nothing: that was not asked for.
    NotAsked,
    /// It is mended.
    Done {
        /// How.
        how: String,
    },
    /// It can't be mended.
    Impossible {
        /// Why not.
        why: String,
    },
}

/// Compares the files, journals, index and metadata of a log folder, and mends what differs if that is asked for.
/// Runs that are being written are left alone. Without repairs nothing is changed.
///
/// `progress` is told of every run. Blocks for as long as it takes.
///
/// # Errors
///
/// [`LogError::InUse`] if a service has the folder; [`LogError::Io`] if it can't be listed, or a repair can't be
/// written.
pub fn check_index(
    folder: impl AsRef<Path>,
    options: CheckOptions,
    mut progress: impl FnMut(RebuildProgress),
) -> Result<CheckReport, LogError> {
    let layout = Layout::new(folder.as_ref());
    let lock = StoreLock::take(&layout.index())?;
    let listing = layout.list()?;
    let mut trash = layout.list_trash()?;
    trash.retain(|trashed| trashed.folder.has_own_files());
    let mut check = Check {
        layout,
        options,
        report: CheckReport::default(),
        index: None,
        rebuild: false,
        left_in_trash: Vec::new(),
    };
    check.leftovers(&listing.prepared)?;
    check.open_index(!listing.runs.is_empty() || !trash.is_empty());
    check.trash(trash)?;
    let mut runs = listing.runs;
    runs.sort_unstable();
    let of_runs = runs.len() as u64;
    for (done, id) in (1..).zip(&runs) {
        check.run(id)?;
        progress(RebuildProgress { runs: done, of_runs });
    }
    check.rows_without_runs(runs)?;
    check.totals()?;
    check.finish(lock)
}

/// Gives the space in an index that is not used back to the file system. Gives its size before and after, in bytes.
///
/// # Errors
///
/// [`LogError::InUse`] if a service has the index, [`LogError::Index`] if there is none or it can't be used.
pub fn compact_index(folder: impl AsRef<Path>) -> Result<(u64, u64), LogError> {
    let path = Layout::new(folder.as_ref()).index();
    let _lock = StoreLock::take(&path)?;
    let size =
        || fs::metadata(&path).map(|file| file.len()).map_err(LogError::io("looking at", path.clone()));
    let Some(index) = Index::open_as_it_is(path.clone())? else {
        return Err(LogError::Index { path, detail: "there is none".to_owned() });
    };
    let before = size()?;
    index.compact()?;
    index.close()?;
    Ok((before, size()?))
}

/// A check under way.
pub(crate) struct Check {
    pub(crate) layout: Layout,
    pub(crate) options: CheckOptions,
    pub(crate) report: CheckReport,
    /// `None` if there is none, or none that can be read.
    index: Option<Index>,
    /// Whether a repair has to make the index anew.
    rebuild: bool,
    /// Evictions that can't be finished before there is an index again, and the findings that are about them.
    left_in_trash: Vec<(usize, Trashed)>,
}

impl Check {
    /// Notes a finding; `mend` is called if repairs are asked for and says what it did.
    pub(crate) fn found(
        &mut self,
        kind: FindingKind,
        run: Option<&JobRunId>,
        detail: String,
        mend: impl FnOnce() -> Result<Repair, LogError>,
    ) -> Result<(), LogError> {
        let repair = if self.options.repair { mend()? } else { Repair::NotAsked };
        self.report.findings.push(Finding { kind, run: run.cloned(), detail, repair });
        Ok(())
    }

    fn leftovers(&mut self, prepared: &[RunFolder]) -> Result<(), LogError> {
        for folder in prepared.iter().filter(|folder| is_leftover(folder)) {
            let detail = format!("{} was being prepared", folder.path().display());
            self.found(FindingKind::Leftover, None, detail, || {
                folder.discard();
                Ok(done("removed"))
            })?;
        }
        let new = self.layout.new_index();
        if new.exists() {
            let detail = format!("{} was being made", new.display());
            self.found(FindingKind::Leftover, None, detail, || remove(&new))?;
        }
        Ok(())
    }

    /// Looks for evictions that were cut short.
    fn trash(&mut self, trash: Vec<Trashed>) -> Result<(), LogError> {
        for trashed in trash {
            let detail = format!("{} was being evicted", trashed.folder.path().display());
            let repair = match &self.index {
                Some(index) if self.options.repair => finish_eviction(index, &self.layout, &trashed)?,
                _ => Repair::NotAsked,
            };
            let (kind, run) = (FindingKind::Leftover, Some(trashed.id.clone()));
            if self.index.is_none() {
                self.left_in_trash.push((self.report.findings.len(), trashed));
            }
            self.report.findings.push(Finding { kind, run, detail, repair });
        }
        Ok(())
    }

    /// Compares what the index says that finished runs take up with its rows, and these with the disk.
    fn totals(&mut self) -> Result<(), LogError> {
        let Some(index) = self.index.take() else { return Ok(()) };
        let checked = self.totals_of(&index);
        self.index = Some(index);
        checked
    }

    fn totals_of(&mut self, index: &Index) -> Result<(), LogError> {
        let (sum, rows) = (index.totals()?.finished_bytes, index.count_finished_bytes()?);
        if sum != rows {
            let detail = format!("the index has {sum} bytes for all runs, and {rows} in their rows");
            self.found(FindingKind::TotalsDiffer, None, detail, || {
                index.correct_finished_bytes()?;
                Ok(done("added up again"))
            })?;
        }
        let (mut on_disk, mut by_index) = (0, 0);
        let mut wrong = Vec::new();
        index.newest_below(RunNumber::MAX, |number, record| {
            let folder = self.layout.run(record.run.id());
            if record.run.state.is_over() && folder.is_there().unwrap_or(false) {
                let bytes = folder.disk_bytes();
                (on_disk, by_index) = (on_disk + bytes, by_index + record.disk_bytes);
                if bytes != record.disk_bytes {
                    wrong.push((number, RunRecord { disk_bytes: bytes, ..record }));
                }
            }
            true
        })?;
        // File systems count blocks a little differently, and some later than others.
        if on_disk.abs_diff(by_index) <= MAY_DIFFER + by_index / 100 {
            return Ok(());
        }
        let detail =
            format!("runs that are over take up {on_disk} bytes on disk, and {by_index} by the index");
        self.found(FindingKind::TotalsDiffer, None, detail, || {
            index.commit(&Changes { runs: wrong, ..Changes::default() })?;
            Ok(done("their sizes are written anew"))
        })
    }

    fn open_index(&mut self, runs_exist: bool) {
        let path = self.layout.index();
        let opened = if self.options.repair { Index::open_as_it_is(path) } else { Index::open_to_look(path) };
        let (kind, detail) = match opened {
            Ok(Some(index)) => match if self.options.deep { index.is_sound() } else { Ok(true) } {
                Ok(true) => {
                    self.index = Some(index);
                    return;
                }
                Ok(false) => (FindingKind::IndexDamaged, "a page is not what was written".to_owned()),
                Err(error) => (FindingKind::IndexDamaged, error.to_string()),
            },
            Ok(None) if runs_exist => (FindingKind::IndexMissing, "there is no index".to_owned()),
            Ok(None) => return,
            Err(error) => (FindingKind::IndexDamaged, error.to_string()),
        };
        self.without_index(kind, detail);
    }

    /// Goes on without the index, which is made anew at the end.
    fn without_index(&mut self, kind: FindingKind, detail: String) {
        if let Some(index) = self.index.take().filter(|_| self.options.repair) {
            drop(index.close());
        }
        self.rebuild = true;
        self.report.findings.push(Finding { kind, run: None, detail, repair: Repair::NotAsked });
    }

    fn run(&mut self, id: &JobRunId) -> Result<(), LogError> {
        self.report.runs += 1;
        let before = self.report.findings.len();
        match check_run(self, id) {
            Ok(()) => {}
            Err(error @ LogError::Index { .. }) => {
                self.without_index(FindingKind::IndexDamaged, error.to_string());
                return Ok(());
            }
            // It may have been removed since it was listed.
            Err(_) if matches!(self.layout.run(id).is_path_taken(), Ok(false)) => return Ok(()),
            Err(error) => {
                let why = "it can't be read".to_owned();
                self.found(FindingKind::Unreadable, Some(id), error.to_string(), || {
                    Ok(Repair::Impossible { why })
                })?;
            }
        }
        if self.options.repair && self.report.findings.len() > before {
            mend_run(self, id, before)?;
        }
        Ok(())
    }

    pub(crate) const fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// Looks for rows that lead to no folder.
    fn rows_without_runs(&mut self, runs: Vec<JobRunId>) -> Result<(), LogError> {
        let Some(index) = &self.index else { return Ok(()) };
        let (ghosts, strays) = match ghosts_and_strays(index, runs) {
            Ok(found) => found,
            Err(error @ LogError::Index { .. }) => {
                self.without_index(FindingKind::IndexDamaged, error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let ghosts =
            ghosts.into_iter().filter(|(id, _)| matches!(self.layout.run(id).is_path_taken(), Ok(false)));
        let mut forgotten = Vec::new();
        for (id, number) in ghosts.collect::<Vec<_>>() {
            forgotten.push(number);
            let detail = "the index has the run; its folder is gone".to_owned();
            self.found(FindingKind::Ghost, Some(&id), detail, || Ok(done("its rows are removed")))?;
        }
        if let Some(detail) = strays {
            self.without_index(FindingKind::StrayRows, detail);
        }
        if let Some(index) = self.index.as_ref().filter(|_| self.options.repair && !forgotten.is_empty()) {
            index.commit(&Changes { forgotten, ..Changes::default() })?;
        }
        Ok(())
    }

    fn finish(mut self, lock: StoreLock) -> Result<CheckReport, LogError> {
        if let Some(index) = self.index.take().filter(|_| self.options.repair) {
            index.close()?;
        }
        if self.rebuild && self.options.repair {
            let rebuilt = rebuild_holding(&self.layout, &lock, |_| ())?;
            for finding in &mut self.report.findings {
                if matches!(
                    finding.kind,
                    FindingKind::IndexMissing | FindingKind::IndexDamaged | FindingKind::StrayRows
                ) {
                    finding.repair = done(&format!("made anew, with {} runs", rebuilt.runs));
                }
            }
            // The new index has what they tell.
            for (finding, trashed) in &self.left_in_trash {
                self.report.findings[*finding].repair = remove_trashed(trashed)?;
            }
        }
        Ok(self.report)
    }

    /// Writes the rows of a run as its folder gives them.
    pub(crate) fn write_rows(&self, id: &JobRunId) -> Result<(), LogError> {
        match &self.index {
            Some(index) => write_rows(&self.layout, index, id),
            // It is made anew.
            None => Ok(()),
        }
    }
}

/// Writes what is left of a run in the trash, if the index does not have that, and removes its files.
fn finish_eviction(index: &Index, layout: &Layout, trashed: &Trashed) -> Result<Repair, LogError> {
    if let Some(row) = outstanding(index, layout, trashed, &RetentionPolicy::OFF)? {
        index.evict(&[row])?;
    }
    remove_trashed(trashed)
}

fn remove_trashed(trashed: &Trashed) -> Result<Repair, LogError> {
    trashed.folder.remove_own_files(Removal::Everything)?;
    Ok(done("removed"))
}

/// Runs that have no folder.
type Ghosts = Vec<(JobRunId, RunNumber)>;

/// Runs that have no folder, and what is wrong with rows that lead to no run.
fn ghosts_and_strays(index: &Index, folders: Vec<JobRunId>) -> Result<(Ghosts, Option<String>), LogError> {
    let ghosts = compare(index, folders)?.ghosts;
    let mut known = HashSet::new();
    index.ids(|_, number| {
        known.insert(number);
        true
    })?;
    let mut strays = 0;
    let mut note = |number: RunNumber| strays += u64::from(!known.contains(&number));
    index.numbers_in_use(&mut note)?;
    index.evictable(|_, number, _| note(number))?;
    let (mut seen, mut twice) = (HashSet::new(), 0);
    index.evictable(|_, number, _| twice += u64::from(!seen.insert(number)))?;
    index.pinned(|number, _| note(number))?;
    index.partitions(|_, number| note(number))?;
    strays += twice;
    let detail = (strays > 0)
        .then(|| format!("{strays} rows lead to no run of the index, or to one that has another"));
    Ok((ghosts, detail))
}

pub(crate) fn done(how: &str) -> Repair {
    Repair::Done { how: how.to_owned() }
}

pub(crate) fn remove(path: &PathBuf) -> Result<Repair, LogError> {
    fs::remove_file(path).map_err(LogError::io("removing", path))?;
    Ok(done("removed"))
}
