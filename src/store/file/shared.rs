//! What all handles of a file store share: the runs in memory, and what becomes of them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::{FutureExt, StreamExt, stream};
use tokio::sync::watch;

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::progress::Resume;
use crate::index::{Changes, Committer, Index, Known, RunNumber, Urgency};
use crate::layout::Layout;
use crate::line::{Stream, UnixMicros};
use crate::run::{JobMetadata, JobRunId, RunSpec, Tombstone};
use crate::store::file::FileStoreOptions;
use crate::store::file::adopt::ForeignRun;
use crate::store::file::commit::commit_all;
use crate::store::file::compressor::{Compressions, Compressor};
use crate::store::file::durability::Syncer;
use crate::store::file::evict::Evictions;
use crate::store::file::evictor::Evictor;
use crate::store::file::handle::Borrowers;
use crate::store::file::live::{LiveRun, finished};
use crate::store::file::source::FileSource;
use crate::store::file::tracker::ends_a_record;
use crate::store::file::watch::Watch;
use crate::store::file::writer::OwnRun;
use crate::store::follow::drive;
use crate::store::{ReadEnd, ReadEvent, ReadOptions, ReadStream, RunEnd};

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
    /// Runs of other processes that a thread is just taking up; a second one waits for what comes of it.
    adopting: Mutex<HashSet<JobRunId>>,
    adopted: Condvar,
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

    /// Whether nothing of the run's end is left to be written, as far as can be told before the store is closed.
    pub(crate) fn is_settled(&self, closing: bool) -> bool {
        match self {
            Self::Own(_) => true,
            Self::Foreign(foreign) => !foreign.lacks_metadata() && (closing || !foreign.may_get_journal()),
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

    /// Says that all folders are known now.
    pub(crate) fn set_discovered(&self) {
        *self.discovered.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.discovery.notify_all();
    }

    fn is_discovered(&self) -> bool {
        *self.discovered.lock().unwrap_or_else(PoisonError::into_inner)
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
        if let Some(Known::Evicted(_)) = known {
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
        if !folder.is_there() || self.runs().starting.contains(id) {
            return Err(LogError::NotFound { id: id.clone() });
        }
        let adopting = Adopting::begin(self, id);
        // It may have been started by this process just before that look, or taken up by another thread.
        if let Some(tracked) = self.tracked(id) {
            return Ok(Arc::clone(tracked.run()));
        }
        // Watched first, so that nothing written in between is missed.
        let watch = self.watch()?;
        watch.add(&folder);
        // Rows that are about to be forgotten are not added to.
        let number = number.filter(|number| !self.runs().forgotten.contains(number));
        let resume = number.and_then(|number| self.resume(number));
        let number = number.or_else(|| self.next_number());
        let foreign = Arc::new(ForeignRun::open(&self.layout, id, number, resume)?);
        self.end_if_gone(&foreign)?;
        let run = {
            let mut runs = self.runs();
            if let Some(other) = runs.by_id.get(id) {
                return Ok(Arc::clone(other.run()));
            }
            // Somebody else may have taken it up, and the index may have it already.
            if number.is_none()
                && let Some(index) = &self.index
                && let Ok(Some(Known::Run(number, record))) = index.find(id)
                && record.run.state.is_over()
            {
                return Ok(Arc::new(LiveRun::over(folder, Some(number), *record)));
            }
            if self.index.is_some() || !foreign.run.is_over() {
                runs.by_id.insert(id.clone(), Tracked::Foreign(Arc::clone(&foreign)));
            }
            Arc::clone(&foreign.run)
        };
        // From here on whoever waits for it can have it, also while its `metadata.json` is synced.
        drop(adopting);
        if run.is_over() {
            watch.remove(&folder);
            if let Err(error) = self.complete_metadata(&foreign) {
                tracing::warn!(%error, run = %id, "its metadata.json is tried again in a moment");
            }
        } else {
            // What was written before it was known here woke nobody.
            self.catch_up(&foreign);
        }
        self.announce();
        self.nudge(if run.is_over() { Urgency::Now } else { Urgency::Soon });
        Ok(run)
    }

    /// Takes what the index knows of runs that were live behind the places from which they are followed on.
    pub(crate) fn forget_places_behind_resumes(
        &self,
        live: &[(RunNumber, RunRecord)],
    ) -> Result<(), LogError> {
        let Some(index) = self.index.as_ref().filter(|_| !live.is_empty()) else { return Ok(()) };
        let places = live.iter().map(|(number, record)| {
            let resume = self.resume(*number);
            let place = resume.map(|resume| resume.progress);
            let id = record.run.id();
            let is_there = place.is_some_and(|at| ends_a_record(&self.layout.run(id), at.journal));
            (*number, place.filter(|_| is_there))
        });
        index.forget_places_behind(&places.collect::<Vec<_>>())
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
        self.end_if_gone(foreign)?;
        self.complete_metadata(foreign)
    }

    fn end_if_gone(&self, foreign: &ForeignRun) -> Result<(), LogError> {
        if !foreign.run.is_over() && foreign.writer_is_gone()? {
            if self.index.is_some() && !foreign.is_compressed() && !foreign.has_written_end()? {
                foreign.recover(&self.options)?;
            } else {
                foreign.report_end()?;
            }
        }
        Ok(())
    }

    fn complete_metadata(&self, foreign: &ForeignRun) -> Result<(), LogError> {
        if self.index.is_some() { foreign.complete_metadata(&self.options) } else { Ok(()) }
    }

    /// Pins a run, or takes the pin away.
    pub(crate) fn set_pinned(self: &Arc<Self>, id: &JobRunId, pinned: bool) -> Result<(), LogError> {
        let run = self.find(id)?;
        // So that it is not evicted between the two.
        let _turn = self.evictions.none_for_now();
        if !run.folder.is_there() {
            // Whatever became of it since, the answer says.
            return Err(self.find(id).err().unwrap_or_else(|| LogError::NotFound { id: id.clone() }));
        }
        run.folder.set_pinned(pinned)?;
        run.state().pinned = pinned;
        let (Some(index), Some(number)) = (&self.index, run.number) else { return Ok(()) };
        index.commit(&Changes { pins: vec![(number, pinned)], ..Changes::default() })
    }

    /// Called when a run of another process may have come further. Gives false if it was let go of, to be taken up
    /// anew.
    pub(crate) fn catch_up(&self, foreign: &ForeignRun) -> bool {
        if self.index.is_some() && foreign.has_got_journal() {
            self.take_up_anew(foreign);
            return false;
        }
        let before = foreign.run.state().progress;
        let caught_up = foreign.catch_up();
        foreign.count(&before);
        match caught_up {
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
        true
    }

    /// Lets go of a run whose lines were counted until its journal came, and of what the index has of it. It is taken
    /// up again by the journal; its readers are told to come again.
    fn take_up_anew(&self, foreign: &ForeignRun) {
        {
            let mut runs = self.runs();
            runs.remove(&foreign.run);
            runs.forgotten.extend(foreign.run.number);
        }
        foreign.run.change(|state| state.is_replaced = true);
        if let Some(watch) = self.watch.get() {
            watch.take_up(&foreign.run.id);
        }
        self.nudge(Urgency::Now);
    }

    /// Lets go of a run of another process that is over, once the index has it.
    pub(crate) fn retire(&self, foreign: &ForeignRun) {
        if let Some(watch) = self.watch.get() {
            watch.remove_later(&foreign.run.folder);
        }
        if self.index.is_none() {
            self.runs().remove(&foreign.run);
        }
        self.nudge(Urgency::Now);
    }

    /// Lets go of a run of another process whose folder is gone, and tells its readers.
    pub(crate) fn forget(&self, foreign: &ForeignRun) {
        let run = &foreign.run;
        tracing::warn!(run = %run.id, "the folder of a run was removed");
        run.change(|state| {
            let why = "its folder was removed".to_owned();
            state.evicted = Some(Box::new(Tombstone::of(&state.metadata(), UnixMicros::now(), why)));
        });
        {
            let mut runs = self.runs();
            runs.remove(run);
            runs.forgotten.extend(run.number);
        }
        if let Some(watch) = self.watch.get() {
            watch.remove_later(&run.folder);
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
        if let Some(tombstone) = self.evictions.going(id) {
            return Err(LogError::Evicted(Box::new(tombstone)));
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
        if !self.is_discovered() && self.layout.run(id).is_there() {
            // Runs are numbered in the order of their age by whoever goes through the folders: a run that is over
            // does not get its number out of turn because somebody asks for it.
            let foreign = ForeignRun::open(&self.layout, id, None, None)?;
            if foreign.run.is_over() && !foreign.lacks_metadata() {
                return Ok(foreign.run);
            }
        }
        self.adopt(id, None)
    }

    pub(crate) fn open_read(
        self: &Arc<Self>,
        id: &JobRunId,
        options: &ReadOptions,
    ) -> Result<ReadStream, LogError> {
        let mut run = self.find(id)?;
        if self.index.is_some() {
            run = self.evictions.note_reader(run);
            // An eviction that did not see this reader is seen by it.
            if let Some(tombstone) = self.evictions.going(id) {
                return Err(LogError::Evicted(Box::new(tombstone)));
            }
        }
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
        self.watch()?.begin();
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
                // Thousands may wait for runs of their own: nobody opens anything before there is a folder.
                loop {
                    if appeared.changed().await.is_err() {
                        return stream::iter([Err(LogError::Closed)]).boxed();
                    }
                    if shared.is_closed() || shared.layout.run(&id).is_there() {
                        break;
                    }
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

/// While it lives, no other thread takes up the same run: both would end it if its writer is gone.
struct Adopting<'a> {
    shared: &'a Shared,
    id: &'a JobRunId,
}

impl<'a> Adopting<'a> {
    fn begin(shared: &'a Shared, id: &'a JobRunId) -> Self {
        let mut adopting = shared.adopting.lock().unwrap_or_else(PoisonError::into_inner);
        while !adopting.insert(id.clone()) {
            adopting = shared.adopted.wait(adopting).unwrap_or_else(PoisonError::into_inner);
        }
        Self { shared, id }
    }
}

impl Drop for Adopting<'_> {
    fn drop(&mut self) {
        self.shared.adopting.lock().unwrap_or_else(PoisonError::into_inner).remove(self.id);
        self.shared.adopted.notify_all();
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
    // Whoever opens the folder next finds no eviction under way.
    drop(shared.evictions.none_for_now());
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
