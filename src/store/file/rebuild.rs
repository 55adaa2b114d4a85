//! Making the index anew from the run folders, while no service has it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use serde::Serialize;

use crate::error::LogError;
use crate::index::{Changes, Index, NewIndex, quarantine};
use crate::layout::{Layout, StoreLock};
use crate::line::UnixMicros;
use crate::retention::RetentionPolicy;
use crate::run::{JobRunId, Tombstone};
use crate::store::file::derive::{Standing, derive, started_at};
use crate::store::file::evict::tombstone;

/// Rows that are gathered before they are given to the new index.
const ROWS_AT_ONCE: usize = 2048;

/// How far a rebuild has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RebuildProgress {
    /// Run folders that are done.
    pub runs: u64,
    /// Run folders that there are.
    pub of_runs: u64,
}

/// What a rebuild did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RebuildReport {
    /// Runs that the new index holds.
    pub runs: u64,
    /// Of those, runs that are not over: they are being written, or their writer died and the next service ends them.
    pub live: u64,
    /// Of those, runs whose lines were counted in the logs, because there is no journal or it is not sound.
    pub scanned: u64,
    /// Places of lines and of journals that the new index holds.
    pub places: u64,
    /// Evicted runs: those that the old index knew, and those that are still in the trash.
    pub tombstones: u64,
    /// Why the old index could not be asked for evicted runs, if it could not.
    pub old_index: Option<String>,
    /// Run folders that could not be read, and why. The index knows nothing of them.
    pub unreadable: Vec<UnreadableRun>,
}

/// A run folder that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnreadableRun {
    /// The run.
    pub run: JobRunId,
    /// Why.
    pub why: String,
}

/// Makes the index of a log folder anew, from the runs' journals where those are sound and by counting lines in
/// their logs where not. Runs are numbered in the order in which they started. The old index stays until the new
/// one takes its place, all at once.
///
/// `progress` is told of every run. Blocks for as long as it takes.
///
/// # Errors
///
/// [`LogError::InUse`] if a service or another rebuild has the folder; [`LogError::Io`] or [`LogError::Index`] if
/// the new index can't be written: the old one is as it was then.
pub fn rebuild_index(
    folder: impl AsRef<Path>,
    progress: impl FnMut(RebuildProgress),
) -> Result<RebuildReport, LogError> {
    let layout = Layout::new(folder.as_ref());
    layout.create()?;
    let lock = StoreLock::take(&layout.index())?;
    rebuild_holding(&layout, &lock, progress)
}

/// The same for who has the lock.
pub(crate) fn rebuild_holding(
    layout: &Layout,
    _lock: &StoreLock,
    progress: impl FnMut(RebuildProgress),
) -> Result<RebuildReport, LogError> {
    let mut report = RebuildReport::default();
    let mut tombstones = old_tombstones(layout, &mut report)?;
    add_those_in_trash(layout, &mut tombstones)?;
    let runs = by_start(layout, &mut report)?;
    let path = layout.new_index();
    remove_if_there(&path)?;
    let rebuilt = put_in_place(layout, &path, runs, tombstones, &mut report, progress);
    if let Err(error) = rebuilt {
        // Nobody can use what there is of it.
        drop(fs::remove_file(&path));
        return Err(error);
    }
    Ok(report)
}

/// Makes the index under the name that it has until it is done, and puts it in the place of the old one.
fn put_in_place(
    layout: &Layout,
    path: &Path,
    runs: Vec<(UnixMicros, JobRunId)>,
    tombstones: Vec<Tombstone>,
    report: &mut RebuildReport,
    mut progress: impl FnMut(RebuildProgress),
) -> Result<(), LogError> {
    let mut sink = Sink { index: NewIndex::create(path.to_owned())?, changes: Changes::default() };
    report.tombstones = tombstones.len() as u64;
    sink.changes.tombstones = tombstones;
    let of_runs = runs.len() as u64;
    let mut number = 0;
    for (done, (_, id)) in (1..).zip(runs) {
        number += 1;
        match sink.add(layout, number, &id, report) {
            Ok(()) => {}
            Err(error @ (LogError::Index { .. } | LogError::Closed)) => return Err(error),
            Err(error) => {
                // What was gathered of it must not be taken for that of the next run.
                sink.changes.forgotten.push(number);
                sink.changes.lines.retain(|&(of, _)| of != number);
                sink.changes.progress.retain(|&(of, _)| of != number);
                sink.changes.pins.retain(|&(of, _)| of != number);
                report.unreadable.push(UnreadableRun { run: id, why: error.to_string() });
            }
        }
        progress(RebuildProgress { runs: done, of_runs });
    }
    sink.flush()?;
    sink.index.finish()?;
    let index = layout.index();
    if fs::metadata(&index).is_ok_and(|found| !found.is_file()) {
        quarantine(&index, "it is not a file")?;
    }
    fs::rename(path, &index).map_err(LogError::io("replacing", &index))?;
    let root = layout.root();
    File::open(root).and_then(|folder| folder.sync_all()).map_err(LogError::io("syncing", root))
}

/// What the old index says of evicted runs, if it can be read.
fn old_tombstones(layout: &Layout, report: &mut RebuildReport) -> Result<Vec<Tombstone>, LogError> {
    match Index::tombstones_at(&layout.index()) {
        Ok(stones) => Ok(stones.unwrap_or_default()),
        Err(LogError::Index { detail, .. }) => {
            report.old_index = Some(detail);
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Adds what is left of runs whose eviction was cut short. The next service removes their files.
fn add_those_in_trash(layout: &Layout, tombstones: &mut Vec<Tombstone>) -> Result<(), LogError> {
    let mut known: HashMap<_, _> =
        tombstones.iter().map(|stone| (stone.id.clone(), stone.evicted_at)).collect();
    for trashed in layout.list_trash()? {
        let is_known = known.get(&trashed.id).is_some_and(|&evicted_at| evicted_at >= trashed.at);
        // It may be another run, begun since; what the disk does not tell of may be there.
        if is_known || !matches!(layout.run(&trashed.id).is_there(), Ok(false)) {
            continue;
        }
        if let Ok(Some(run)) = trashed.folder.read_metadata() {
            known.insert(trashed.id.clone(), trashed.at);
            tombstones.retain(|stone| stone.id != trashed.id);
            tombstones.push(tombstone(&trashed, &run, &RetentionPolicy::OFF));
        }
    }
    Ok(())
}

/// All runs, by when they started.
fn by_start(layout: &Layout, report: &mut RebuildReport) -> Result<Vec<(UnixMicros, JobRunId)>, LogError> {
    let mut runs = Vec::new();
    for id in layout.list_runs()? {
        match started_at(&layout.run(&id), &id) {
            Ok(started) => runs.push((started, id)),
            Err(error) => report.unreadable.push(UnreadableRun { run: id, why: error.to_string() }),
        }
    }
    runs.sort_unstable();
    Ok(runs)
}

fn remove_if_there(path: &Path) -> Result<(), LogError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LogError::io("removing", path)(error))
        }
        _ => Ok(()),
    }
}

/// Where rows go: many at once.
struct Sink {
    index: NewIndex,
    changes: Changes,
}

impl Sink {
    fn add(
        &mut self,
        layout: &Layout,
        number: u64,
        id: &JobRunId,
        report: &mut RebuildReport,
    ) -> Result<(), LogError> {
        let mut places = 0;
        let derived = derive(&layout.run(id), id, |found| {
            places += found.len() as u64;
            self.changes.lines.extend(found.lines.iter().map(|at| (number, *at)));
            self.changes.progress.extend(found.places.iter().map(|at| (number, *at)));
            self.flush_if_full()
        })?;
        report.runs += 1;
        report.places += places;
        report.live += u64::from(matches!(derived.standing, Standing::Live | Standing::Abandoned));
        let scanned = !derived.record.has_journal || derived.standing == Standing::OverByMetadata;
        report.scanned += u64::from(scanned);
        self.changes.runs.push((number, derived.record));
        if layout.run(id).is_pinned() {
            self.changes.pins.push((number, true));
        }
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<(), LogError> {
        if self.changes.rows() < ROWS_AT_ONCE { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.index.put(&self.changes)?;
        self.changes.clear();
        Ok(())
    }
}
