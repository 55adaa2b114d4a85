//! Making the index anew from the run folders, while no service has it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};

use serde::Serialize;

use crate::error::LogError;
use crate::index::{Changes, Index, NewIndex, RunNumber, quarantine};
use crate::layout::{Layout, StoreLock};
use crate::line::UnixMicros;
use crate::retention::RetentionPolicy;
use crate::run::{JobRunId, Tombstone};
use crate::store::file::derive::{Derived, Standing, derive, started_at};
use crate::store::file::evict::tombstone;
use crate::store::file::tracker::Found;

/// Rows that are gathered before they are given to the new index.
const ROWS_AT_ONCE: usize = 2048;

/// The most threads that read run folders. Their rows are written by one.
const MOST_READERS: usize = 8;

/// What is read and not written yet of all runs, in messages of at most a few hundred places: so much is held in memory.
const MOST_WAITING: usize = 64;

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
    let (of_runs, mut done) = (runs.len() as u64, 0);
    let readers = readers_of(runs.len());
    let runs = Mutex::new((1..).zip(runs.into_iter().map(|(_, id)| id)));
    let next = || runs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let mut unreadable = Vec::new();
    thread::scope(|scope| {
        let (tell, told) = mpsc::sync_channel(MOST_WAITING);
        for _ in 0..readers {
            let tell = tell.clone();
            spawn(scope, layout, move || read_runs(layout, &next, &tell))?;
        }
        drop(tell);
        for (number, told) in told {
            let is_whole = !matches!(told, Told::Places(_));
            if let Some(run) = sink.take(number, told, report)? {
                unreadable.push((number, run));
            }
            if is_whole {
                done += 1;
                progress(RebuildProgress { runs: done, of_runs });
            }
        }
        Ok::<_, LogError>(())
    })?;
    unreadable.sort_by_key(|(number, _)| *number);
    report.unreadable.extend(unreadable.into_iter().map(|(_, run)| run));
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
    let ids = layout.list_runs()?;
    let started =
        |ids: &[JobRunId]| -> Vec<_> { ids.iter().map(|id| started_at(&layout.run(id), id)).collect() };
    let (ours, others) = ids.split_at(ids.len().div_ceil(readers_of(ids.len())));
    let started = thread::scope(|scope| {
        let others: Result<Vec<_>, LogError> = others
            .chunks(ours.len().max(1))
            .map(|part| spawn(scope, layout, move || started(part)))
            .collect();
        let (mut all, others) = (started(ours), others?);
        for part in others {
            all.extend(part.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        Ok::<_, LogError>(all)
    })?;
    let mut runs = Vec::new();
    for (id, started) in ids.into_iter().zip(started) {
        match started {
            Ok(started) => runs.push((started, id)),
            Err(error) => report.unreadable.push(UnreadableRun { run: id, why: error.to_string() }),
        }
    }
    runs.sort_unstable();
    Ok(runs)
}

/// How many threads to read so many run folders with.
fn readers_of(runs: usize) -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    cores.min(MOST_READERS).min(runs).max(1)
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    layout: &Layout,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, LogError> {
    let builder = thread::Builder::new().name("rebuild".into());
    builder.spawn_scoped(scope, work).map_err(LogError::io("starting a thread for", layout.root()))
}

/// What is told of a run.
enum Told {
    /// Some of its places; those behind them follow.
    Places(Found),
    /// All else, how many places there were, and whether it is pinned.
    Whole { derived: Box<Derived>, places: u64, pinned: bool },
    /// Why it can't be read.
    Unreadable(JobRunId, LogError),
}

/// Reads run after run, and tells what there is of each under its number.
fn read_runs(
    layout: &Layout,
    next: &impl Fn() -> Option<(RunNumber, JobRunId)>,
    tell: &SyncSender<(RunNumber, Told)>,
) {
    while let Some((number, id)) = next() {
        // Who does not listen any more has failed, and says so.
        let tell = |told| tell.send((number, told)).map_err(|_| LogError::Closed);
        let (folder, mut places) = (layout.run(&id), 0);
        let derived = derive(&folder, &id, |found| {
            places += found.len() as u64;
            if found.len() == 0 { Ok(()) } else { tell(Told::Places(found.clone())) }
        });
        let told = match derived {
            Ok(derived) => {
                tell(Told::Whole { derived: Box::new(derived), places, pinned: folder.is_pinned() })
            }
            Err(LogError::Closed) => return,
            Err(error) => tell(Told::Unreadable(id, error)),
        };
        if told.is_err() {
            return;
        }
    }
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
    /// Takes what is told of a run under its number. Gives it if it can't be read.
    ///
    /// # Errors
    ///
    /// What kept the index from being written.
    fn take(
        &mut self,
        number: RunNumber,
        told: Told,
        report: &mut RebuildReport,
    ) -> Result<Option<UnreadableRun>, LogError> {
        match told {
            Told::Places(found) => {
                self.changes.lines.extend(found.lines.iter().map(|at| (number, *at)));
                self.changes.progress.extend(found.places.iter().map(|at| (number, *at)));
            }
            Told::Whole { derived, places, pinned } => {
                let Derived { record, standing, .. } = *derived;
                report.runs += 1;
                report.places += places;
                report.live += u64::from(matches!(standing, Standing::Live | Standing::Abandoned));
                let scanned = !record.has_journal || standing == Standing::OverByMetadata;
                report.scanned += u64::from(scanned);
                self.changes.runs.push((number, record));
                if pinned {
                    self.changes.pins.push((number, true));
                }
            }
            Told::Unreadable(run, error) => {
                // What was gathered of it must not be taken for that of another run.
                self.changes.forgotten.push(number);
                self.changes.lines.retain(|&(of, _)| of != number);
                self.changes.progress.retain(|&(of, _)| of != number);
                return Ok(Some(UnreadableRun { run, why: error.to_string() }));
            }
        }
        if self.changes.rows() >= ROWS_AT_ONCE {
            self.flush()?;
        }
        Ok(None)
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.index.put(&self.changes)?;
        self.changes.clear();
        Ok(())
    }
}
