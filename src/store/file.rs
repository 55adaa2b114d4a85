//! The store that keeps runs in files.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use tokio::sync::watch;

use crate::error::LogError;
use crate::index::{Changes, Committer, Index, Known, RunNumber, Urgency};
use crate::layout::Layout;
use crate::line::{ByteOffset, Stream, View};
use crate::logfile::{Fetched, Io, ReadFile};
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::adopt::ForeignRun;
use crate::store::follow::drive;
use crate::store::lines::{LineReader, Reach, Taken};
use crate::store::list::{list_folders, list_indexed};
use crate::store::live::{LiveRun, finished};
use crate::store::source::{FileSource, Places};
use crate::store::watch::Watch;
use crate::store::writer::OwnRun;
use crate::store::{
    LogStore, Outcome, ReadEnd, ReadEvent, ReadOptions, ReadStream, RunEnd, RunPage, RunQuery, RunWriter,
    Start,
};

/// How much is read at once to find a place.
const READ_BYTES: usize = 64 * 1024;
/// Rows that wait for the index before it is committed early.
const MANY_ROWS: usize = 10_000;

/// How a [`FileLogStore`] looks after runs that other processes write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStoreOptions {
    /// How often to ask whether the writer of a run still lives.
    pub liveness_interval: Duration,
    /// How often to look for runs that were never announced, in case the system lost an event.
    pub rescan_interval: Duration,
}

impl Default for FileStoreOptions {
    /// Every second, and every half minute.
    fn default() -> Self {
        Self { liveness_interval: Duration::from_secs(1), rescan_interval: Duration::from_secs(30) }
    }
}

/// Keeps every run in a folder of its own: `stdout.log`, `stderr.log`, `metadata.json`, and a journal.
///
/// Clones share the store.
#[derive(Clone)]
pub struct FileLogStore {
    inner: Arc<Inner>,
}

impl fmt::Debug for FileLogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileLogStore").field("folder", &self.inner.layout.root()).finish_non_exhaustive()
    }
}

pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) options: FileStoreOptions,
    pub(crate) index: Option<Arc<Index>>,
    committer: OnceLock<Committer>,
    /// Whether the committer knows that something waits.
    nudged: AtomicBool,
    runs: Mutex<Runs>,
    /// Changes when a run appears.
    appeared: watch::Sender<u64>,
    watch: OnceLock<Watch>,
    /// Whether every folder that was there when the store was opened is known.
    discovered: Mutex<bool>,
    discovery: Condvar,
    closed: Arc<AtomicBool>,
}

/// The runs that are in memory: those that go on, and those whose end is not in the index yet.
#[derive(Default)]
struct Runs {
    by_id: HashMap<JobRunId, Tracked>,
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
}

impl FileLogStore {
    /// Opens the store with its index, which only one process at a time can: the service. Folders are made as
    /// needed; runs whose writer is gone become lost.
    ///
    /// Blocks for as long as the disk takes; the work is proportional to the runs that were live.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open; [`LogError::Io`] if the folder can't be used.
    pub fn open(folder: impl AsRef<Path>, options: FileStoreOptions) -> Result<Self, LogError> {
        let layout = Layout::new(folder.as_ref());
        layout.create()?;
        let index = Arc::new(Index::open(layout.index())?);
        let last_number = index.last_number()?;
        let live = index.live_runs()?;
        let store = Self::new(layout, options, Some(index), last_number);
        let inner = &store.inner;
        let weak = Arc::downgrade(inner);
        let committer = Committer::spawn(move || commit_waiting(&weak))
            .map_err(LogError::io("starting a thread for", inner.layout.index()))?;
        let _ = inner.committer.set(committer);
        inner.watch()?;
        let mut forgotten = Vec::new();
        for (number, record) in live {
            match inner.adopt(record.run.id(), Some(number)) {
                Ok(_) => {}
                Err(LogError::NotFound { .. }) => forgotten.push(number),
                Err(error) => {
                    tracing::error!(%error, run = %record.run.id(), "a run can't be taken up again")
                }
            }
        }
        if let Some(index) = &inner.index
            && !forgotten.is_empty()
        {
            index.commit(&Changes { forgotten, ..Changes::default() })?;
        }
        inner.watch()?.discover_all();
        Ok(store)
    }

    /// Opens the folder without the index: any number of processes can, beside a service or without one. They can
    /// write runs and read them; finding a place in a run costs a look through its journal.
    ///
    /// # Errors
    ///
    /// None at present: what is wrong with the folder shows when it is used.
    pub fn open_folder(folder: impl AsRef<Path>, options: FileStoreOptions) -> Result<Self, LogError> {
        Ok(Self::new(Layout::new(folder.as_ref()), options, None, 0))
    }

    fn new(
        layout: Layout,
        options: FileStoreOptions,
        index: Option<Arc<Index>>,
        last_number: RunNumber,
    ) -> Self {
        let inner = Inner {
            layout,
            options,
            discovered: Mutex::new(index.is_none()),
            discovery: Condvar::new(),
            index,
            committer: OnceLock::new(),
            nudged: AtomicBool::new(false),
            runs: Mutex::new(Runs { last_number, ..Runs::default() }),
            appeared: watch::Sender::new(0),
            watch: OnceLock::new(),
            closed: Arc::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl Inner {
    fn runs(&self) -> MutexGuard<'_, Runs> {
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
    fn watch(self: &Arc<Self>) -> Result<&Watch, LogError> {
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

    fn next_number(&self) -> Option<RunNumber> {
        self.index.as_ref()?;
        let mut runs = self.runs();
        runs.last_number += 1;
        Some(runs.last_number)
    }

    fn nudge(&self, urgency: Urgency) {
        if urgency == Urgency::Soon && self.nudged.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(committer) = self.committer.get() {
            committer.nudge(urgency);
        }
    }

    fn start(&self, spec: RunSpec) -> Result<Arc<OwnRun>, LogError> {
        if self.is_closed() {
            return Err(LogError::Closed);
        }
        if let Some(index) = &self.index
            && let Some(Known::Evicted(_)) = index.find(&spec.id)?
        {
            return Err(LogError::AlreadyExists { id: spec.id });
        }
        let own = Arc::new(OwnRun::create(&self.layout, spec, self.next_number())?);
        self.runs().by_id.insert(own.run.id.clone(), Tracked::Own(Arc::clone(&own)));
        self.announce();
        self.nudge(Urgency::Soon);
        Ok(own)
    }

    fn append(&self, own: &OwnRun, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
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

    fn finish(&self, own: &OwnRun, end: RunEnd) -> Result<JobMetadata, LogError> {
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
        if !folder.path().is_dir() {
            return Err(LogError::NotFound { id: id.clone() });
        }
        // Watched first, so that nothing written in between is missed.
        let watch = self.watch()?;
        watch.add(&folder);
        let foreign = Arc::new(ForeignRun::open(&self.layout, id, number.or_else(|| self.next_number()))?);
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

    /// Ends a run whose writer is gone; what ended properly gets the `metadata.json` that it lacks.
    pub(crate) fn end_if_lost(&self, foreign: &ForeignRun) -> Result<(), LogError> {
        let keeps_store = self.index.is_some();
        if !foreign.run.is_over() && foreign.writer_is_gone()? {
            if keeps_store {
                foreign.recover()?;
            } else {
                foreign.report_lost();
            }
        }
        if keeps_store && foreign.run.is_over() {
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

    fn open_read(self: &Arc<Self>, id: &JobRunId, options: &ReadOptions) -> Result<ReadStream, LogError> {
        let run = self.find(id)?;
        let signal = run.subscribe();
        let source = FileSource::open(run, self.index.clone(), Arc::clone(&self.closed), options)?;
        Ok(drive(Box::new(source), signal))
    }

    /// A read that first waits for its run to appear.
    fn wait_and_read(self: &Arc<Self>, id: JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        self.watch()?;
        let mut appeared = self.appeared.subscribe();
        let inner = Arc::clone(self);
        let waiting = async move {
            loop {
                appeared.borrow_and_update();
                let opened = {
                    let (inner, id, options) = (Arc::clone(&inner), id.clone(), options.clone());
                    tokio::task::spawn_blocking(move || inner.open_read(&id, &options)).await
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
    fn wait_until_discovered(&self) {
        let mut discovered = self.discovered.lock().unwrap_or_else(PoisonError::into_inner);
        while !*discovered {
            discovered = self.discovery.wait(discovered).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl LogStore for FileLogStore {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        let own = self.inner.start(spec)?;
        Ok(Box::new(FileWriter { inner: Arc::clone(&self.inner), own }))
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        let own = match self.inner.own(id) {
            Err(LogError::NotFound { .. }) => match self.inner.start(RunSpec::new(id.clone())) {
                // Somebody else started it in between.
                Err(LogError::AlreadyExists { .. }) => self.inner.own(id)?,
                started => started?,
            },
            own => own?,
        };
        self.inner.append(&own, stream, bytes)
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        let own = self.inner.own(id)?;
        self.inner.finish(&own, end)
    }

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        match self.inner.open_read(id, &options) {
            Err(LogError::NotFound { .. }) if options.follow => self.inner.wait_and_read(id.clone(), options),
            opened => opened,
        }
    }

    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        let run = self.inner.find(id)?;
        let places = Places { run: &run, index: self.inner.index.as_deref() };
        let (lines, end, over) = {
            let state = run.state();
            (state.lines(View::One(stream)), state.visible[stream.index()], state.run.state.is_over())
        };
        let line = match start {
            Start::After(line) => line.0,
            Start::LastLines { count, after } => lines.saturating_sub(count).max(after.0),
            Start::Since(time) => places.lines_before(View::One(stream), time)?,
        };
        let place = places.line_floor(stream, line)?;
        let Some(file) = ReadFile::open_if_there(&run.folder.log(stream))? else { return Ok(ByteOffset(0)) };
        let gaps = Arc::clone(&run.state().gaps);
        let gaps: Vec<_> = gaps.iter().filter(|at| at.gap.stream == stream).copied().collect();
        let mut reader = LineReader::new(stream, file, place, READ_BYTES);
        reader.skip_to(line);
        let reach = Reach { lines: 0, end, ended: over, gaps: &gaps };
        while let Taken::Gap(_) = reader.next(reach, Io::MayBlock)? {}
        // Fewer lines than that: the read would begin at what comes next.
        Ok(ByteOffset(if reader.line() > lines.max(line) { end } else { reader.offset() }))
    }

    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError> {
        let run = self.inner.find(id)?;
        let end = run.state().visible[stream.index()];
        let left = usize::try_from(end.saturating_sub(offset.0)).unwrap_or(usize::MAX);
        let Some(mut file) = ReadFile::open_if_there(&run.folder.log(stream))? else {
            return Ok(Bytes::new());
        };
        match file.read(offset.0, length.min(left), Io::MayBlock)? {
            Fetched::Bytes(bytes) => Ok(bytes),
            Fetched::WouldBlock => Ok(Bytes::new()),
        }
    }

    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        Ok(self.inner.find(id)?.metadata())
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        if self.inner.is_closed() {
            return Err(LogError::Closed);
        }
        match &self.inner.index {
            Some(index) => {
                self.inner.wait_until_discovered();
                list_indexed(&self.inner, index, query)
            }
            None => list_folders(&self.inner, query),
        }
    }

    fn close(&self) -> Result<(), LogError> {
        if self.inner.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        for tracked in self.inner.all_tracked() {
            tracked.run().change(|_| ());
        }
        self.inner.announce();
        shut_down(&self.inner).map_or(Ok(()), Err)
    }
}

impl Inner {
    /// The run with this id if this process writes it.
    fn own(&self, id: &JobRunId) -> Result<Arc<OwnRun>, LogError> {
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

/// The handle that writes a run.
struct FileWriter {
    inner: Arc<Inner>,
    own: Arc<OwnRun>,
}

impl RunWriter for FileWriter {
    fn id(&self) -> &JobRunId {
        &self.own.run.id
    }

    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.inner.append(&self.own, stream, bytes)
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.own.flush();
        Ok(())
    }

    fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.inner.finish(&self.own, end)
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        if self.own.run.is_over() {
            return;
        }
        if let Err(error) = self.inner.finish(&self.own, RunEnd::now(Outcome::Lost)) {
            tracing::error!(%error, run = %self.own.run.id, "a run was let go before its end");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        shut_down(self);
    }
}

/// Writes what waits to the index and closes it.
fn shut_down(inner: &Inner) -> Option<LogError> {
    if let Some(watch) = inner.watch.get() {
        watch.stop();
    }
    inner.set_discovered();
    if let Some(committer) = inner.committer.get() {
        committer.stop();
    }
    if let Some(index) = &inner.index {
        // The committer's last round may have come before the last change.
        commit_all(inner, index);
        return index.close().err();
    }
    None
}

fn commit_waiting(inner: &Weak<Inner>) {
    let Some(inner) = inner.upgrade() else { return };
    inner.nudged.store(false, Ordering::Relaxed);
    if let Some(index) = &inner.index {
        commit_all(&inner, index);
    }
}

/// Writes what waits to the index, and lets go of runs that are over and written.
fn commit_all(inner: &Inner, index: &Index) {
    let mut changes = Changes::default();
    let mut written = Vec::new();
    for tracked in inner.all_tracked() {
        if let Tracked::Own(own) = &tracked {
            own.try_flush();
        }
        let run = tracked.run();
        let Some(number) = run.number else { continue };
        let mut state = run.state();
        if !state.waiting.dirty {
            continue;
        }
        state.waiting.dirty = false;
        changes.runs.push((number, state.record()));
        changes.lines.extend(state.waiting.lines.iter().map(|&at| (number, at)));
        changes.progress.extend(state.waiting.places.iter().map(|&at| (number, at)));
        written.push((Arc::clone(run), state.waiting.lines.len(), state.waiting.places.len()));
    }
    if changes.is_empty() {
        return;
    }
    match index.commit(&changes) {
        Ok(()) => {
            let mut runs = inner.runs();
            for (run, lines, places) in written {
                let mut state = run.state();
                state.waiting.committed(lines, places);
                if state.run.state.is_over() && !state.waiting.dirty {
                    runs.by_id.remove(&run.id);
                }
            }
        }
        Err(LogError::Closed) => {}
        Err(error) => {
            tracing::error!(%error, "the index can't be written; what waits for it is kept");
            for (run, ..) in written {
                run.state().waiting.dirty = true;
            }
        }
    }
}
