//! The store that keeps runs in files.

mod adopt;
mod check;
mod check_run;
mod commit;
#[cfg(feature = "compression")]
mod compress;
mod compressor;
mod copied;
mod cuts;
mod derive;
mod dump;
mod durability;
mod evict;
mod evict_bench;
mod evictor;
mod handle;
mod identity;
mod lines;
mod list;
mod live;
mod marks;
mod open_bench;
mod places;
mod power;
mod rebuild;
mod reconcile;
mod repair;
mod shared;
mod source;
mod space;
mod tracker;
mod watch;
mod writer;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::{Committer, Index, RunNumber};
use crate::layout::Layout;
use crate::line::{ByteOffset, LineNumber, Stream, View};
use crate::logfile::{Io, ReadFile, length as length_of};
use crate::retention::{GcReport, GcRequest, RetentionPolicy};
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::file::commit::commit_waiting;
use crate::store::file::compressor::Compressor;
use crate::store::file::cuts::CutWatch;
use crate::store::file::durability::Syncer;
use crate::store::file::evictor::Evictor;
use crate::store::file::handle::{Handle, Lent};
use crate::store::file::lines::{LineReader, Reach, Taken};
use crate::store::file::list::{list_folders, list_when_known, with_pins};
use crate::store::file::live::LiveRun;
use crate::store::file::places::{Moment, Places};
use crate::store::file::shared::{Shared, shut_down};
use crate::store::file::writer::OwnRun;
use crate::store::{
    Compression, LogStore, Outcome, ReadOptions, ReadStream, RunEnd, RunPage, RunQuery, RunWriter, Start,
};

pub use check::{CheckOptions, CheckReport, Finding, FindingKind, Repair, check_index, compact_index};
pub use dump::dump_index;
pub use durability::Durability;
pub use evict_bench::EvictionBench;
pub use open_bench::add_places;
pub use rebuild::{RebuildProgress, RebuildReport, UnreadableRun, rebuild_index};

/// How much is read at once to find a place.
const READ_BYTES: usize = 64 * 1024;

/// How a [`FileLogStore`] treats the disk, and how it looks after runs that other processes write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStoreOptions {
    /// How often to ask whether the writer of a run still lives; 1 s. So long it can take to call a run lost.
    pub liveness_interval: Duration,
    /// How often to look for runs that were never announced, in case the system lost an event; 30 s.
    pub rescan_interval: Duration,
    /// Bytes of the disk that logs leave free, so that a job which prints without end does not take the machine with
    /// it: with less than this free, output is dropped and counted as on a full disk. 0: no such floor. It is never
    /// more than half of the file system's size.
    pub min_free_bytes: u64,
    /// The most bytes of both logs that a run keeps: of one that prints more, the first quarter of so many stay, and
    /// the newest. What lies between is given up and shown as a [gap](crate::GapReason::RunSizeCap). 0: no such cap.
    pub max_run_bytes: u64,
    /// What a power cut may take.
    pub durability: Durability,
    /// So long after its end the logs and the journal of a run are compressed, in the background, by a store that was
    /// opened with its index; `None`: never. A run that is being read is left for later.
    pub compress_after: Option<Duration>,
    /// What of the runs that are over is kept. A store evicts only if it has the index.
    pub retention: RetentionPolicy,
}

impl Default for FileStoreOptions {
    /// Every second, and every half minute; 512 MiB stay free; runs may be of any size; those that have ended survive a
    /// power cut, and nothing is ever evicted.
    fn default() -> Self {
        Self {
            liveness_interval: Duration::from_secs(1),
            rescan_interval: Duration::from_secs(30),
            min_free_bytes: 512 * 1024 * 1024,
            max_run_bytes: 0,
            durability: Durability::OnFinish,
            compress_after: None,
            retention: RetentionPolicy::OFF,
        }
    }
}

/// Keeps every run in a folder of its own: `stdout.log`, `stderr.log`, `metadata.json`, and a journal. Of a run that is
/// over, logs and journal may be compressed; it reads the same.
///
/// Clones share the store.
#[derive(Clone)]
pub struct FileLogStore {
    shared: Arc<Handle>,
}

impl fmt::Debug for FileLogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileLogStore").field("folder", &self.shared.layout.root()).finish_non_exhaustive()
    }
}

impl FileLogStore {
    /// Opens the store with its index, which only one process at a time can: the service. Folders are made as
    /// needed; runs whose writer is gone become lost. An index that can't be used is made anew; where the disk has no room
    /// for one, runs are found by their folders until it has.
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
        let (last_number, live) = numbers_of(&index)?;
        let shared = Arc::new(Shared::new(layout, options, Some(index), last_number));
        let store = Self { shared: Handle::new(shared) };
        let shared = &store.shared;
        let lent = Lent::new(shared);
        let committer = Committer::spawn(move || commit_waiting(&lent))
            .map_err(LogError::io("starting a thread for", shared.layout.index()))?;
        let _ = shared.committer.set(committer);
        store.start_syncer()?;
        shared.forget_places_behind_resumes(&live)?;
        for (number, record) in live {
            match shared.adopt(record.run.id(), Some(number)) {
                Ok(_) => {}
                Err(LogError::NotFound { .. }) => shared.forget_rows(number),
                Err(error) => {
                    tracing::error!(%error, run = %record.run.id(), "a run can't be taken up again")
                }
            }
        }
        let evictor = Evictor::start(Lent::new(shared))
            .map_err(LogError::io("starting a thread for", shared.layout.root()))?;
        let _ = shared.evictor.set(evictor);
        store.start_compressor()?;
        shared.watch()?.begin();
        Ok(store)
    }

    /// Opens the folder without the index: any number of processes can, beside a service or without one. They can
    /// write runs and read them; finding a place in a run costs a look through its journal.
    ///
    /// # Errors
    ///
    /// [`LogError::Io`] if a thread that is needed can't be started. What is wrong with the folder shows when it is
    /// used.
    pub fn open_folder(folder: impl AsRef<Path>, options: FileStoreOptions) -> Result<Self, LogError> {
        let layout = Layout::new(folder.as_ref());
        let store = Self { shared: Handle::new(Arc::new(Shared::new(layout, options, None, 0))) };
        store.start_syncer()?;
        Ok(store)
    }

    fn start_compressor(&self) -> Result<(), LogError> {
        let Some(after) = self.shared.options.compress_after else { return Ok(()) };
        let compressor = Compressor::start(Lent::new(&self.shared), after)
            .map_err(LogError::io("starting a thread for", self.shared.layout.root()))?;
        let _ = self.shared.compressor.set(compressor);
        Ok(())
    }

    fn start_syncer(&self) -> Result<(), LogError> {
        let Durability::Periodic(every) = self.shared.options.durability else { return Ok(()) };
        let syncer = Syncer::start(Lent::new(&self.shared), every)
            .map_err(LogError::io("starting a thread for", self.shared.layout.root()))?;
        let _ = self.shared.syncer.set(syncer);
        Ok(())
    }
}

impl LogStore for FileLogStore {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        let own = self.shared.start(spec)?;
        Ok(Box::new(FileWriter { shared: Arc::clone(&self.shared), own }))
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        let own = match self.shared.own(id) {
            Err(LogError::NotFound { .. }) => match self.shared.start(RunSpec::new(id.clone())) {
                // Somebody else started it in between.
                Err(LogError::AlreadyExists { .. }) => self.shared.own(id)?,
                started => started?,
            },
            own => own?,
        };
        self.shared.append(&own, stream, bytes)
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        let own = self.shared.own(id)?;
        self.shared.finish(&own, end)
    }

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        match self.shared.open_read(id, &options) {
            Err(LogError::NotFound { .. }) if options.follow => {
                self.shared.wait_and_read(id.clone(), options)
            }
            opened => opened,
        }
    }

    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
        let run = self.shared.find(id)?;
        let line = Places { run: &run, index: self.shared.index.as_deref() }.position(view, start, false)?;
        Ok(LineNumber(line))
    }

    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        let run = self.shared.find(id)?;
        let places = Places { run: &run, index: self.shared.index.as_deref() };
        let moment = Moment::of(&run.state());
        let (lines, end) = (moment.end_of(stream).0, moment.visible[stream.index()]);
        let line = places.position(View::One(stream), start, false)?;
        let (place, file) = match moment.has_all_gaps {
            true => places.line_floor(stream, line)?,
            false => places.line_floor_by_journal(stream, line)?,
        };
        if !file.is_there() {
            return if moment.is_over() && line > 0 && end > 0 {
                Err(cut_short(&run, stream, 0))
            } else {
                Ok(ByteOffset(0))
            };
        }
        let gaps = moment.gaps_of(stream);
        let cuts = Arc::new(CutWatch::new(Arc::clone(&run)));
        let mut reader = LineReader::new(stream, file, place, READ_BYTES).beside(cuts);
        reader.skip_to(line);
        let reach = Reach { lines: 0, end, ended: moment.is_over(), gaps: &gaps };
        loop {
            match reader.next(reach, Io::MayBlock)? {
                Taken::Gap(_) | Taken::Cut(_) => {}
                Taken::Damaged(line, offset) => reader.pass_over(line, offset),
                Taken::Missing if moment.is_over() => return Err(cut_short(&run, stream, reader.searched())),
                _ => break,
            }
        }
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
        let run = self.shared.find(id)?;
        let (end, over) = {
            let state = run.state();
            (state.visible[stream.index()], state.run.state.is_over())
        };
        let path = run.folder.log(stream);
        let bytes = match ReadFile::open_if_there(&path)? {
            Some(file) => CutWatch::new(Arc::clone(&run)).read_bytes(file, stream, offset.0..end, length)?,
            None => Bytes::new(),
        };
        if bytes.is_empty() && over && length > 0 && offset.0 < end {
            return Err(cut_short(&run, stream, length_of(&path)?));
        }
        Ok(bytes)
    }

    fn given_up(&self, id: &JobRunId, stream: Stream) -> Result<Option<Range<ByteOffset>>, LogError> {
        let cut = self.shared.find(id)?.state().cuts.of(stream);
        Ok(cut.map(|cut| ByteOffset(cut.begin.offset)..ByteOffset(cut.end.offset)))
    }

    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        Ok(self.shared.find(id)?.metadata())
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        if self.shared.is_closed() {
            return Err(LogError::Closed);
        }
        self.shared.check_home()?;
        let page = match &self.shared.index {
            Some(index) if !index.is_missing() => list_when_known(&self.shared, index, query)?,
            _ => list_folders(&self.shared, query)?,
        };
        let page = with_pins(&self.shared, page);
        // If it went in the meantime, none of its runs was seen.
        self.shared.check_home()?;
        Ok(page)
    }

    fn gc(&self, request: &GcRequest) -> Result<GcReport, LogError> {
        self.shared.gc(request)
    }

    fn set_pinned(&self, id: &JobRunId, pinned: bool) -> Result<(), LogError> {
        self.shared.set_pinned(id, pinned)
    }

    fn compress(&self, id: &JobRunId) -> Result<Compression, LogError> {
        self.shared.compress(id)
    }

    fn close(&self) -> Result<(), LogError> {
        if self.shared.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        for tracked in self.shared.all_tracked() {
            tracked.run().change(|_| ());
        }
        self.shared.announce();
        shut_down(&self.shared).map_or(Ok(()), Err)
    }
}

/// The last number that a run has in the index, and the runs that go on by it. An index that fails is made anew; if there
/// is no room for that, the folders are gone through when there is.
fn numbers_of(index: &Index) -> Result<(RunNumber, Vec<(RunNumber, RunRecord)>), LogError> {
    let known = || Ok((index.last_number()?, index.live_runs()?));
    let error = match known() {
        Err(error @ LogError::Index { .. }) => error,
        known => return known,
    };
    match index.mend(|| ()) {
        Ok(true) => known(),
        Ok(false) => Err(error),
        Err(_) if index.lacks_room() => Ok((0, Vec::new())),
        Err(error) => Err(error),
    }
}

/// The log of a run that is over is shorter than it was, and ends at this byte; or the run was evicted just now.
fn cut_short(run: &LiveRun, stream: Stream, at: u64) -> LogError {
    let state = run.state();
    if let Some(tombstone) = state.evicted.clone() {
        return LogError::Evicted(tombstone);
    }
    let missing = state.visible[stream.index()].saturating_sub(at);
    let what = format!("the log ends at byte {at}, and {missing} bytes behind it are missing");
    LogError::Corrupt { path: run.folder.log(stream), what }
}

/// The handle that writes a run.
struct FileWriter {
    shared: Arc<Handle>,
    own: Arc<OwnRun>,
}

impl RunWriter for FileWriter {
    fn id(&self) -> &JobRunId {
        &self.own.run.id
    }

    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.shared.append(&self.own, stream, bytes)
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.own.flush();
        Ok(())
    }

    fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.shared.finish(&self.own, end)
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        if self.own.run.is_over() {
            return;
        }
        if let Err(error) = self.shared.finish(&self.own, RunEnd::now(Outcome::Lost)) {
            tracing::error!(%error, run = %self.own.run.id, "a run was let go before its end");
        }
    }
}
