//! What all handles of a file store share: the runs in memory, and what becomes of them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::{FutureExt, StreamExt, stream};
use tokio::sync::watch;

use crate::error::LogError;
use crate::index::progress::Resume;
use crate::index::{Committer, Index, Known, RunNumber, Urgency};
use crate::layout::Layout;
use crate::line::Stream;
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::file::FileStoreOptions;
use crate::store::file::adopt::ForeignRun;
use crate::store::file::commit::commit_all;
use crate::store::file::live::{LiveRun, finished};
use crate::store::file::source::FileSource;
use crate::store::file::watch::Watch;
use crate::store::file::writer::OwnRun;
use crate::store::follow::drive;
use crate::store::{ReadEnd, ReadEvent, ReadOptions, ReadStream, RunEnd};

/// Rows that wait for the index before it is committed early.
const MANY_ROWS: usize = 10_000;

pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) options: FileStoreOptions,
    pub(crate) index: Option<Arc<Index>>,
    pub(crate) committer: OnceLock<Committer>,
    /// Whether the committer knows that something waits.
    pub(crate) nudged: AtomicBool,
    runs: Mutex<Runs>,
    /// Changes when a run appears.
    appeared: watch::Sender<u64>,
    watch: OnceLock<Watch>,
    /// Whether every folder that was there when the store was opened is known.
    discovered: Mutex<bool>,
    discovery: Condvar,
    /// Whether the index was made anew and the runs are to be numbered again.
    renewed: AtomicBool,
    /// How often it was.
    renewals: AtomicU64,
    /// Runs whose rows are to be taken out of the index.
    forgotten: Mutex<Vec<RunNumber>>,
    pub(crate) closed: Arc<AtomicBool>,
}

/// The runs that are in memory: those that go on, and those whose end is not in the index yet.
#[derive(Default)]
pub(crate) struct Runs {
    pub(crate) by_id: HashMap<JobRunId, Tracked>,
    /// Runs whose folder this process is just making; nobody takes them for another process's.
    starting: HashSet<JobRunId>,
    last_number: RunNumber,
}

/// A run in memory, by who writes it.
#[derive(Clone)]
pub(crate) enum Tracked {
    Own(Arc<OwnRun>),
    Foreign(Arc<ForeignRun>),
}

impl Tracked {
    pub(crate) fn run(&self) -> &Arc<LiveRun> {
        match self {
            Self::Own(own) => &own.run,
            Self::Foreign(foreign) => &foreign.run,
        }
    }

    /// Whether nothing of the run's end is left to be written.
    pub(crate) fn is_settled(&self) -> bool {
        match self {
            Self::Own(_) => true,
            Self::Foreign(foreign) => !foreign.lacks_metadata(),
        }
    }
}

impl Shared {
    pub(crate) fn new(
        layout: Layout,
        options: FileStoreOptions,
        index: Option<Arc<Index>>,
        last_number: RunNumber,
    ) -> Self {
        Self {
            layout,
            options,
            discovered: Mutex::new(index.is_none()),
            discovery: Condvar::new(),
            renewed: AtomicBool::new(false),
            renewals: AtomicU64::new(0),
            forgotten: Mutex::default(),
            index,
            committer: OnceLock::new(),
            nudged: AtomicBool::new(false),
            runs: Mutex::new(Runs { last_number, ..Runs::default() }),
            appeared: watch::Sender::new(0),
            watch: OnceLock::new(),
            closed: Arc::default(),
        }
    }

    pub(crate) fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The run if it is in memory.
    pub(crate) fn tracked(&self, id: &JobRunId) -> Option<Tracked> {
        self.runs().by_id.get(id).cloned()
    }

    /// All runs in memory.
    pub(crate) fn all_tracked(&self) -> Vec<Tracked> {
        self.runs().by_id.values().cloned().collect()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The watcher of the folder, started when it is first needed.
    pub(crate) fn watch(self: &Arc<Self>) -> Result<&Watch, LogError> {
        if let Some(watch) = self.watch.get() {
            return Ok(watch);
        }
        let started = Watch::start(self)?;
        Ok(self.watch.get_or_init(|| started))
    }

    /// The watcher of the folder, if it was ever needed.
    pub(crate) fn watching(&self) -> Option<&Watch> {
        self.watch.get()
    }

    /// Says that runs which wait for their folder should look again.
    pub(crate) fn announce(&self) {
        self.appeared.send_modify(|count| *count += 1);
    }

    /// Says that all folders are known now.
    pub(crate) fn set_discovered(&self) {
        *self.discovered.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.discovery.notify_all();
    }

    /// Says that the index was made anew: every folder has to be taken up again.
    pub(crate) fn set_renewed(&self) {
        let mut discovered = self.discovered.lock().unwrap_or_else(PoisonError::into_inner);
        self.renewed.store(true, Ordering::Release);
        self.renewals.fetch_add(1, Ordering::AcqRel);
        *discovered = false;
    }

    /// How often the index was made anew.
    pub(crate) fn renewals(&self) -> u64 {
        self.renewals.load(Ordering::Acquire)
    }

    /// Says that all folders are known now, unless the index was made anew in the meantime.
    pub(crate) fn set_discovered_unless_renewed(&self) -> bool {
        let mut discovered = self.discovered.lock().unwrap_or_else(PoisonError::into_inner);
        *discovered = !self.renewed.load(Ordering::Acquire);
        self.discovery.notify_all();
        *discovered
    }

    /// Whether the index was made anew since this was last asked.
    pub(crate) fn take_renewed(&self) -> bool {
        self.renewed.swap(false, Ordering::AcqRel)
    }

    /// Takes the rows of a run whose folder is gone out of the index.
    pub(crate) fn forget(&self, number: RunNumber) {
        self.forgotten().push(number);
        self.nudge(Urgency::Soon);
    }

    /// Runs whose rows are to be taken out of the index.
    pub(crate) fn forgotten(&self) -> MutexGuard<'_, Vec<RunNumber>> {
        self.forgotten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This number, if it was given before, or else the next one.
    pub(crate) fn claim_number(&self, number: RunNumber) -> RunNumber {
        let mut runs = self.runs();
        if number > runs.last_number {
            runs.last_number += 1;
            return runs.last_number;
        }
        number
    }

    fn next_number(&self) -> Option<RunNumber> {
        self.index.as_ref()?;
        let mut runs = self.runs();
        runs.last_number += 1;
        Some(runs.last_number)
    }

    /// Has what waits written to the index.
    pub(crate) fn nudge(&self, urgency: Urgency) {
        if urgency == Urgency::Soon && self.nudged.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(committer) = self.committer.get() {
            committer.nudge(urgency);
        }
    }

    pub(crate) fn start(&self, spec: RunSpec) -> Result<Arc<OwnRun>, LogError> {
        if self.is_closed() {
            return Err(LogError::Closed);
        }
        if let Some(index) = &self.index
            && let Some(Known::Evicted(_)) = index.find(&spec.id)?
        {
            return Err(LogError::AlreadyExists { id: spec.id });
        }
        let id = spec.id.clone();
        if !self.runs().starting.insert(id.clone()) {
            return Err(LogError::AlreadyExists { id });
        }
        let created = OwnRun::create(&self.layout, spec, self.next_number()).map(Arc::new);
        {
            let mut runs = self.runs();
            runs.starting.remove(&id);
            if let Ok(own) = &created {
                runs.by_id.insert(id, Tracked::Own(Arc::clone(own)));
            }
        }
        let own = created?;
        self.announce();
        self.nudge(Urgency::Soon);
        Ok(own)
    }

    pub(crate) fn append(&self, own: &OwnRun, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        let appended = own.append(stream, bytes)?;
        if self.index.is_some() {
            if appended.rows_wait > MANY_ROWS {
                self.nudge(Urgency::Now);
            } else if appended.mark_waits || appended.rows_wait > 0 {
                self.nudge(Urgency::Soon);
            }
        }
        Ok(())
    }

    pub(crate) fn finish(&self, own: &OwnRun, end: RunEnd) -> Result<JobMetadata, LogError> {
        let result = own.finish(end);
        self.nudge(Urgency::Now);
        if self.index.is_none() {
            self.runs().by_id.remove(&own.run.id);
        }
        result
    }

    /// Takes up a run that another process writes or wrote, and gives it.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        id: &JobRunId,
        number: Option<RunNumber>,
    ) -> Result<Arc<LiveRun>, LogError> {
        if let Some(tracked) = self.tracked(id) {
            return Ok(Arc::clone(tracked.run()));
        }
        let folder = self.layout.run(id);
        if !folder.path().is_dir() || self.runs().starting.contains(id) {
            return Err(LogError::NotFound { id: id.clone() });
        }
        // It may have been started by this process just before that look.
        if let Some(tracked) = self.tracked(id) {
            return Ok(Arc::clone(tracked.run()));
        }
        // Watched first, so that nothing written in between is missed.
        let watch = self.watch()?;
        watch.add(&folder);
        let resume = number.and_then(|number| self.resume(number));
        let number = number.or_else(|| self.next_number());
        let foreign = Arc::new(ForeignRun::open(&self.layout, id, number, resume)?);
        self.end_if_lost(&foreign)?;
        let run = {
            let mut runs = self.runs();
            if let Some(other) = runs.by_id.get(id) {
                return Ok(Arc::clone(other.run()));
            }
            if self.index.is_some() || !foreign.run.is_over() {
                runs.by_id.insert(id.clone(), Tracked::Foreign(Arc::clone(&foreign)));
            }
            Arc::clone(&foreign.run)
        };
        if run.is_over() {
            watch.remove(&folder);
        }
        self.announce();
        self.nudge(if run.is_over() { Urgency::Now } else { Urgency::Soon });
        Ok(run)
    }

    /// From where a run that the index knows is followed on. Without such a place its journal is read from the
    /// beginning.
    fn resume(&self, number: RunNumber) -> Option<Resume> {
        let found = self.index.as_ref()?.resume(number);
        found.unwrap_or_else(|error| {
            tracing::warn!(%error, number, "a run is taken up from its beginning");
            None
        })
    }

    /// Ends a run whose writer is gone; what ended properly gets the `metadata.json` that it lacks.
    pub(crate) fn end_if_lost(&self, foreign: &ForeignRun) -> Result<(), LogError> {
        let keeps_store = self.index.is_some();
        if !foreign.run.is_over() && foreign.writer_is_gone()? && !foreign.end_by_metadata()? {
            if keeps_store {
                foreign.recover()?;
            } else {
                foreign.report_lost();
            }
        }
        if keeps_store {
            foreign.complete_metadata()?;
        }
        Ok(())
    }

    /// Called when a run of another process may have come further.
    pub(crate) fn catch_up(&self, foreign: &ForeignRun) {
        match foreign.catch_up() {
            Ok(true) => self.retire(foreign),
            Ok(false) => {
                if self.index.is_some() && foreign.run.state().waiting.dirty {
                    self.nudge(Urgency::Soon);
                }
            }
            Err(error) => {
                tracing::warn!(%error, run = %foreign.run.id, "a run of another process can't be followed")
            }
        }
    }

    /// Lets go of a run of another process that is over, once the index has it.
    pub(crate) fn retire(&self, foreign: &ForeignRun) {
        if let Some(watch) = self.watch.get() {
            watch.remove_later(&foreign.run.folder);
        }
        if self.index.is_none() {
            self.runs().by_id.remove(&foreign.run.id);
        }
        self.nudge(Urgency::Now);
    }

    /// The run with this id, wherever it is.
    pub(crate) fn find(self: &Arc<Self>, id: &JobRunId) -> Result<Arc<LiveRun>, LogError> {
        if self.is_closed() {
            return Err(LogError::Closed);
        }
        if let Some(tracked) = self.tracked(id) {
            return Ok(Arc::clone(tracked.run()));
        }
        if let Some(index) = &self.index {
            match index.find(id) {
                Ok(Some(Known::Run(number, record))) if record.run.state.is_over() => {
                    return Ok(Arc::new(LiveRun::over(self.layout.run(id), Some(number), *record)));
                }
                Ok(Some(Known::Run(number, _))) => return self.adopt(id, Some(number)),
                Ok(Some(Known::Evicted(tombstone))) => return Err(LogError::Evicted(Box::new(tombstone))),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, run = %id, "looking for the run without the index"),
            }
        }
        self.adopt(id, None)
    }

    pub(crate) fn open_read(
        self: &Arc<Self>,
        id: &JobRunId,
        options: &ReadOptions,
    ) -> Result<ReadStream, LogError> {
        let run = self.find(id)?;
        let signal = run.subscribe();
        let source = FileSource::open(run, self.index.clone(), Arc::clone(&self.closed), options)?;
        Ok(drive(Box::new(source), signal))
    }

    /// A read that first waits for its run to appear.
    pub(crate) fn wait_and_read(
        self: &Arc<Self>,
        id: JobRunId,
        options: ReadOptions,
    ) -> Result<ReadStream, LogError> {
        self.watch()?;
        let mut appeared = self.appeared.subscribe();
        let shared = Arc::clone(self);
        let waiting = async move {
            loop {
                appeared.borrow_and_update();
                let opened = {
                    let (shared, id, options) = (Arc::clone(&shared), id.clone(), options.clone());
                    tokio::task::spawn_blocking(move || shared.open_read(&id, &options)).await
                };
                match opened {
                    Ok(Ok(events)) => return events,
                    Ok(Err(LogError::NotFound { .. })) => {}
                    Ok(Err(LogError::Closed)) | Err(_) => {
                        return stream::iter([Ok(ReadEvent::End(ReadEnd::Shutdown))]).boxed();
                    }
                    Ok(Err(error)) => return stream::iter([Err(error)]).boxed(),
                }
                if appeared.changed().await.is_err() {
                    return stream::iter([Err(LogError::Closed)]).boxed();
                }
            }
        };
        Ok(waiting.flatten_stream().boxed())
    }

    /// Waits until every folder that was there when the store was opened is known.
    pub(crate) fn wait_until_discovered(&self) {
        let mut discovered = self.discovered.lock().unwrap_or_else(PoisonError::into_inner);
        while !*discovered {
            discovered = self.discovery.wait(discovered).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    /// The run with this id, if this process writes it.
    pub(crate) fn own(&self, id: &JobRunId) -> Result<Arc<OwnRun>, LogError> {
        match self.tracked(id) {
            Some(Tracked::Own(own)) => return Ok(own),
            Some(Tracked::Foreign(foreign)) if foreign.run.is_over() => return Err(finished(id)),
            Some(Tracked::Foreign(_)) => {
                return Err(LogError::InUse { path: self.layout.run(id).path().to_owned() });
            }
            None => {}
        }
        let folder = self.layout.run(id);
        if folder.metadata().exists() {
            return Err(finished(id));
        }
        if folder.path().exists() {
            return Err(LogError::InUse { path: folder.path().to_owned() });
        }
        Err(LogError::NotFound { id: id.clone() })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        shut_down(self);
    }
}

/// Writes what waits to the index and closes it.
pub(crate) fn shut_down(shared: &Shared) -> Option<LogError> {
    if let Some(watch) = shared.watch.get() {
        watch.stop();
    }
    shared.set_discovered();
    if let Some(committer) = shared.committer.get() {
        committer.stop();
    }
    if let Some(index) = &shared.index {
        // The committer's last round may have come before the last change.
        commit_all(shared, index);
        shared.set_discovered();
        return index.close().err();
    }
    None
}
