//! What all handles of a file store share: the runs in memory, and what becomes of them.

mod adopting;
mod discovery;
mod finding;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;

use crate::error::LogError;
use crate::index::{Changes, Committer, Index, Known, RunNumber, Urgency};
use crate::layout::Layout;
use crate::line::Stream;
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::RunEnd;
use crate::store::file::FileStoreOptions;
use crate::store::file::adopt::ForeignRun;
use crate::store::file::commit::commit_all;
use crate::store::file::compressor::{Compressions, Compressor};
use crate::store::file::durability::Syncer;
use crate::store::file::evict::Evictions;
use crate::store::file::evictor::Evictor;
use crate::store::file::handle::Borrowers;
use crate::store::file::identity::Looks;
use crate::store::file::live::{LiveRun, finished};
use crate::store::file::shared::discovery::Discovery;
use crate::store::file::watch::Watch;
use crate::store::file::writer::OwnRun;

/// Rows that wait for the index before it is committed early.
const MANY_ROWS: usize = 10_000;

/// What a run's first files take up on disk, generously.
const BEGINNING: u64 = 256 * 1024;

pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) options: FileStoreOptions,
    pub(crate) index: Option<Arc<Index>>,
    pub(crate) committer: OnceLock<Committer>,
    /// Syncs runs that go on, if that is wanted.
    pub(crate) syncer: OnceLock<Syncer>,
    /// Compresses runs that are over, if that is wanted.
    pub(crate) compressor: OnceLock<Compressor>,
    pub(crate) compressions: Arc<Compressions>,
    /// Evicts what is to be evicted.
    pub(crate) evictor: OnceLock<Evictor>,
    pub(crate) evictions: Evictions,
    /// One commit of what waits at a time.
    pub(crate) committing: Mutex<()>,
    /// Whether the committer knows that something waits.
    pub(crate) nudged: AtomicBool,
    runs: Mutex<Runs>,
    /// Folders of which it is known whose they are.
    pub(crate) looks: Looks,
    /// Runs of other processes that a thread is just taking up; a second one waits for what comes of it.
    adopting: Mutex<HashSet<JobRunId>>,
    adopted: Condvar,
    /// Changes when a run appears.
    appeared: watch::Sender<u64>,
    watch: OnceLock<Watch>,
    pub(crate) discovery: Discovery,
    pub(crate) closed: Arc<AtomicBool>,
    pub(crate) borrowers: Arc<Borrowers>,
}

/// The runs that are in memory: those that go on, and those whose end is not in the index yet.
#[derive(Default)]
pub(crate) struct Runs {
    pub(crate) by_id: HashMap<JobRunId, Tracked>,
    /// Runs whose folder this process is just making; nobody takes them for another process's.
    starting: HashSet<JobRunId>,
    /// Runs whose folders are gone and that the index still has.
    pub(crate) forgotten: Vec<RunNumber>,
    /// Runs that are compressed, which the index does not know yet, and the bytes that each takes up on disk.
    pub(crate) compressed: Vec<(RunNumber, u64)>,
    last_number: RunNumber,
}

impl Runs {
    /// Lets go of this run, and not of another that has its id by now.
    pub(crate) fn remove(&mut self, run: &Arc<LiveRun>) {
        if self.by_id.get(&run.id).is_some_and(|tracked| Arc::ptr_eq(tracked.run(), run)) {
            self.by_id.remove(&run.id);
        }
    }
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

    /// The run if this process writes it.
    pub(crate) const fn own(&self) -> Option<&Arc<OwnRun>> {
        match self {
            Self::Own(own) => Some(own),
            Self::Foreign(_) => None,
        }
    }

    /// Whether nothing of the run's end is left to be written, as far as can be told before the store is closed.
    pub(crate) fn is_settled(&self, closing: bool) -> bool {
        match self {
            Self::Own(_) => true,
            Self::Foreign(foreign) if foreign.lacks_end() => false,
            // Who opens the store next takes it up by its journal.
            Self::Foreign(foreign) if closing => !foreign.has_got_journal(),
            Self::Foreign(foreign) => !foreign.may_get_journal(),
        }
    }

    /// Whether another run is in its folder by now. A run that this process writes is asked only when it is over.
    pub(crate) fn is_outlived(&self) -> bool {
        match self {
            Self::Own(own) => own.run.is_over() && own.run.is_outlived(),
            Self::Foreign(foreign) => foreign.is_outlived(),
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
            discovery: Discovery::new(index.is_none()),
            index,
            committer: OnceLock::new(),
            syncer: OnceLock::new(),
            compressor: OnceLock::new(),
            compressions: Arc::default(),
            evictor: OnceLock::new(),
            evictions: Evictions::default(),
            committing: Mutex::default(),
            nudged: AtomicBool::new(false),
            runs: Mutex::new(Runs { last_number, ..Runs::default() }),
            looks: Looks::default(),
            adopting: Mutex::default(),
            adopted: Condvar::new(),
            appeared: watch::Sender::new(0),
            watch: OnceLock::new(),
            closed: Arc::default(),
            borrowers: Arc::default(),
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

    /// Sees that the log folder is where it was opened. A store without an index has nothing that could be taken for what
    /// it is not.
    ///
    /// # Errors
    ///
    /// [`LogError::Index`] if another is there, or none.
    pub(crate) fn check_home(&self) -> Result<(), LogError> {
        self.index.as_ref().map_or(Ok(()), |index| index.check_home())
    }

    /// Takes the rows of a run whose folder is gone, or has another run in it, out of the index.
    pub(crate) fn forget_rows(&self, number: RunNumber) {
        self.runs().forgotten.push(number);
        self.nudge(Urgency::Soon);
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

    pub(crate) fn start(self: &Arc<Self>, spec: RunSpec) -> Result<Arc<OwnRun>, LogError> {
        if self.is_closed() {
            return Err(LogError::Closed);
        }
        self.check_home()?;
        let known = match self.index.as_ref().map(|index| index.find(&spec.id)) {
            Some(Ok(known)) => known,
            Some(Err(error @ LogError::Closed)) => return Err(error),
            // A run begins whatever becomes of the index.
            Some(Err(error)) => {
                tracing::warn!(%error, run = %spec.id, "starting the run without the index");
                None
            }
            None => None,
        };
        let id = spec.id.clone();
        if matches!(known, Some(Known::Evicted(_))) || self.evictions.going(&id).is_some() {
            return Err(LogError::AlreadyExists { id });
        }
        if !self.runs().starting.insert(id.clone()) {
            return Err(LogError::AlreadyExists { id });
        }
        let number = self.next_number();
        let create = |spec| OwnRun::create(&self.layout, spec, number, &self.options);
        let created = match create(spec.clone()) {
            Err(error) if error.is_disk_full() && self.make_room(BEGINNING) => create(spec),
            created => created,
        };
        let created = created.map(|own| Arc::new(own.rescued_by(Arc::downgrade(self))));
        {
            let mut runs = self.runs();
            runs.starting.remove(&id);
            if let Ok(own) = &created {
                runs.by_id.insert(id, Tracked::Own(Arc::clone(own)));
                if let Some(Known::Run(number, _)) = known {
                    // Somebody removed the folder of an earlier run with this id.
                    runs.forgotten.push(number);
                }
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
            self.runs().remove(&own.run);
        }
        result
    }

    /// Pins a run, or takes the pin away.
    pub(crate) fn set_pinned(self: &Arc<Self>, id: &JobRunId, pinned: bool) -> Result<(), LogError> {
        let run = self.find(id)?;
        // So that it is not evicted between the two.
        let _turn = self.evictions.none_for_now();
        if !run.folder.is_there()? {
            // Whatever became of it since, the answer says.
            return Err(self.find(id).err().unwrap_or_else(|| LogError::NotFound { id: id.clone() }));
        }
        run.folder.set_pinned(pinned)?;
        {
            let mut state = run.state();
            state.pinned = pinned;
            // Its record may be on its way to the index just now, without that.
            (state.waiting.pin, state.waiting.dirty) = (true, true);
        }
        if let (Some(index), Some(number)) = (&self.index, run.number) {
            self.tell_of_pin(index, id, number, pinned);
        }
        Ok(())
    }

    /// Writes to the index that a run is pinned or not any more. The file says so whatever becomes of that: what is not
    /// written now is made up for once a day, and for a run in memory with its record.
    pub(crate) fn tell_of_pin(&self, index: &Index, id: &JobRunId, number: RunNumber, pinned: bool) {
        let told = index.commit(&Changes { pins: vec![(number, pinned)], ..Changes::default() });
        if let Err(error) = told {
            tracing::warn!(%error, run = %id, pinned, "the index hears later of a pin");
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
        if folder.is_path_taken()? {
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
    shared.closed.store(true, Ordering::Release);
    if let Some(watch) = shared.watch.get() {
        watch.stop();
    }
    if let Some(syncer) = shared.syncer.get() {
        syncer.stop();
    }
    if let Some(compressor) = shared.compressor.get() {
        compressor.stop();
    }
    if let Some(evictor) = shared.evictor.get() {
        evictor.stop();
    }
    // What readers were told of an end is what the next one finds.
    for tracked in shared.all_tracked() {
        if let Tracked::Foreign(foreign) = tracked
            && foreign.run.is_over()
            && let Err(error) = shared.complete_end(&foreign)
        {
            tracing::warn!(%error, run = %foreign.run.id, "the next one to open the folder writes its end");
        }
    }
    // Whoever opens the folder next finds no eviction under way.
    drop(shared.evictions.none_for_now());
    shared.discovery.set_done();
    if let Some(committer) = shared.committer.get() {
        committer.stop();
    }
    if let Some(index) = &shared.index {
        // The committer's last round may have come before the last change.
        commit_all(shared, index);
        shared.discovery.set_done();
        return index.close().err();
    }
    None
}
