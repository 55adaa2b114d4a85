//! Compressing runs in the background, some time after their end, the oldest first.

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::{Known, Urgency};
use crate::line::UnixMicros;
use crate::meter;
use crate::run::JobRunId;
use crate::store::Compression;
use crate::store::file::handle::Lent;
use crate::store::file::live::LiveRun;
use crate::store::file::shared::{Shared, Tracked};

/// How many rows are looked at before the index is let go of.
const ROWS_AT_ONCE: usize = 1_000;
/// How often to look for runs to compress, at the most and at the least.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// How often to look at all runs again and not only at those behind the last one: some may have been in use, some may
/// have been brought here long after their end.
const ANEW: Duration = Duration::from_secs(3_600);
/// Runs in use that are tried again before all are looked at again.
const MOST_IN_USE: usize = 1_000;
/// The lowest priority that there is.
const NICE: i32 = 19;
/// After so much work on a run, it is looked at what writers do.
const STINT: Duration = Duration::from_millis(30);
/// Writers that write more than this are busy: a job that prints now and then does not notice who shares its disk.
const BUSY_BYTES_PER_SECOND: f64 = 4e6;
/// How many times as long as it worked the thread rests while writers are busy. Measured on a busy machine: two writers
/// that do nothing else have about 0.8 of their speed without rests, for the disk knows no priorities, and all of it with.
const REST: u32 = 4;

/// The thread that compresses runs.
#[derive(Debug)]
pub(crate) struct Compressor {
    stop: Mutex<mpsc::Sender<()>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Compressor {
    /// Starts it: runs that ended so long ago are compressed. It ends with the store.
    pub(crate) fn start(store: Lent, after: Duration) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let pause = (after / 4).clamp(PAUSES[0], PAUSES[1]);
        let thread = thread::Builder::new().name("compressor".into()).spawn(move || {
            // On Linux, of this thread alone.
            if let Err(error) = rustix::process::setpriority_process(None, NICE) {
                tracing::warn!(%error, "runs are compressed at the usual priority");
            }
            let mut round = Round::default();
            loop {
                round.run(&store, after);
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Self { stop: Mutex::new(stop), thread: Mutex::new(Some(thread)) })
    }

    /// Ends it before the store goes. A run that is being compressed is left as it was.
    pub(crate) fn stop(&self) {
        let _ = self.stop.lock().unwrap_or_else(PoisonError::into_inner).send(());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The thread itself may hold the last reference to the store, and can't wait for its own end.
        let thread = thread.filter(|thread| thread.thread().id() != thread::current().id());
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that compresses runs panicked");
        }
    }
}

/// How far the thread has come.
#[derive(Debug, Default)]
struct Round {
    /// The row behind the last one that was looked at.
    place: (u64, u64),
    began: Option<Instant>,
    in_use: Vec<JobRunId>,
}

impl Round {
    /// Compresses every run that is due.
    fn run(&mut self, store: &Lent, after: Duration) {
        if !is_home(store) {
            return;
        }
        if self.began.is_none_or(|began| began.elapsed() > ANEW) {
            *self = Self { began: Some(Instant::now()), ..Self::default() };
        }
        for id in std::mem::take(&mut self.in_use) {
            self.compress(store, id);
        }
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        let until = UnixMicros(UnixMicros::now().0.saturating_sub(micros));
        loop {
            let found = store.with(|shared| match &shared.index {
                Some(index) if !shared.is_closed() => index.not_compressed(self.place, until, ROWS_AT_ONCE),
                _ => Err(LogError::Closed),
            });
            let found = match found {
                Some(Ok(found)) => found,
                None | Some(Err(LogError::Closed)) => return,
                Some(Err(error)) => {
                    tracing::warn!(%error, "looking for runs to compress");
                    return;
                }
            };
            for id in found.runs {
                self.compress(store, id);
                if !is_home(store) {
                    // What was not looked at is looked for again.
                    return;
                }
            }
            match found.behind {
                Some(behind) => self.place = behind,
                None => return,
            }
        }
    }

    /// Compresses a run if it is due. What is in use, or away with the log folder, waits for the next time.
    fn compress(&mut self, store: &Lent, id: JobRunId) {
        let begun = store.with(|shared| {
            let known = shared.index.as_ref().map(|index| index.find(&id));
            // It may have been evicted, or compressed by hand.
            let number = match known {
                Some(Ok(Some(Known::Run(number, record)))) if is_due(&record) && !shared.is_closed() => {
                    number
                }
                _ => return Err(LogError::Closed),
            };
            if shared.evictions.has_reader(&id) {
                return Err(LogError::InUse { path: shared.layout.run(&id).path().to_owned() });
            }
            let run = shared.find(&id)?;
            if run.number != Some(number) {
                // Another run has the id by now; its time comes later.
                return Err(LogError::Closed);
            }
            let under_way = shared.begin_to_compress(&run)?;
            Ok((run, under_way))
        });
        let done = match begun {
            None => return,
            Some(Err(error)) => Err(error),
            Some(Ok((run, under_way))) => {
                let pace = Pace::new(store, &id);
                compress_run(&run, &|| pace.go_on()).map(|done| {
                    store.with(|shared| shared.compressed(&run, done));
                    drop(under_way);
                })
            }
        };
        match done {
            Ok(()) | Err(LogError::Closed | LogError::Evicted(_)) => {}
            Err(error)
                if matches!(error, LogError::NotFound { .. } | LogError::InUse { .. }) || !is_home(store) =>
            {
                if self.in_use.len() < MOST_IN_USE {
                    self.in_use.push(id);
                }
            }
            Err(error) => tracing::warn!(%error, run = %id, "a run is not compressed"),
        }
    }
}

/// Whether the log folder is where it was opened.
fn is_home(store: &Lent) -> bool {
    store.with(|shared| shared.check_home().is_ok()) == Some(true)
}

fn is_due(record: &RunRecord) -> bool {
    record.run.state.is_over() && !record.compressed
}

/// Makes way for writers. The store can go while a large run is being compressed: nothing here holds it.
struct Pace<'a> {
    store: &'a Lent,
    run: &'a JobRunId,
    /// When the work began that is under way, and what writers had written by then.
    stint: Cell<(Instant, u64)>,
}

impl<'a> Pace<'a> {
    fn new(store: &'a Lent, run: &'a JobRunId) -> Self {
        let written = store.with(|shared| written(shared)).unwrap_or(0);
        Self { store, run, stint: Cell::new((Instant::now(), written)) }
    }

    fn go_on(&self) -> bool {
        let (began, before) = self.stint.get();
        let worked = began.elapsed();
        let now = self.store.with(|shared| {
            let so_far = if worked < STINT { before } else { written(shared) };
            shared.may_compress(self.run).then_some(so_far)
        });
        let Some(Some(now)) = now else { return false };
        if worked < STINT {
            return true;
        }
        // Less than before: a run is over, and is not looked at any more.
        if now.saturating_sub(before) as f64 > worked.as_secs_f64() * BUSY_BYTES_PER_SECOND {
            thread::sleep(worked.min(STINT * 4) * REST);
        }
        self.stint.set((Instant::now(), now));
        true
    }
}

/// Bytes of all runs that go on, of this process and of others.
fn written(shared: &Shared) -> u64 {
    let bytes =
        |tracked: &Tracked| tracked.run().state().progress.streams.iter().map(|at| at.bytes).sum::<u64>();
    shared.all_tracked().iter().map(bytes).sum()
}

/// Compresses a run and says so.
fn compress_run(run: &LiveRun, go_on: &dyn Fn() -> bool) -> Result<Compression, LogError> {
    let done = compress_folder(run, go_on);
    match &done {
        Ok(done) => {
            let (before, after) = (done.bytes_before, done.bytes_after);
            meter::compressed(before.saturating_sub(after));
            tracing::info!(run = %run.id, before, after, "compressed a run");
        }
        Err(LogError::Closed | LogError::InUse { .. }) => {}
        Err(_) => meter::compression_failed(),
    }
    done
}

#[cfg(feature = "compression")]
fn compress_folder(run: &LiveRun, go_on: &dyn Fn() -> bool) -> Result<Compression, LogError> {
    let record = run.state().record();
    super::compress::compress_folder(&run.folder, &record, go_on)
}

#[cfg(not(feature = "compression"))]
fn compress_folder(_: &LiveRun, _: &dyn Fn() -> bool) -> Result<Compression, LogError> {
    Err(LogError::Unsupported { what: "this program was built without the feature `compression`" })
}

impl Shared {
    /// Compresses a run that is over, now, whoever reads it.
    pub(crate) fn compress(self: &Arc<Self>, id: &JobRunId) -> Result<Compression, LogError> {
        if self.index.is_some() {
            // A run that has no number yet would be taken up as it was before.
            self.discovery.wait_until_done();
        }
        let run = self.find(id)?;
        let under_way = self.begin_to_compress(&run)?;
        match compress_run(&run, &|| self.may_compress(id)) {
            Ok(done) => {
                self.compressed(&run, done);
                drop(under_way);
                Ok(done)
            }
            Err(error) => {
                Err(self.evictions.going(id).map_or(error, |stone| LogError::Evicted(Box::new(stone))))
            }
        }
    }

    /// Begins to compress a run: who wants to evict it waits until the guard is dropped.
    fn begin_to_compress(&self, run: &LiveRun) -> Result<UnderWay, LogError> {
        if !run.is_over() {
            return Err(LogError::Unfinished { id: run.id.clone() });
        }
        let under_way = Compressions::begin(&self.compressions, &run.id);
        let under_way = under_way.ok_or_else(|| LogError::InUse { path: run.folder.path().to_owned() })?;
        // An eviction that did not see this is seen by it.
        match self.evictions.going(&run.id) {
            None => Ok(under_way),
            Some(stone) => Err(LogError::Evicted(Box::new(stone))),
        }
    }

    fn may_compress(&self, id: &JobRunId) -> bool {
        !self.is_closed() && self.evictions.going(id).is_none()
    }

    /// Notes for the index that a run is compressed.
    fn compressed(&self, run: &LiveRun, done: Compression) {
        {
            // The record may not be written yet.
            let mut state = run.state();
            (state.compressed, state.disk_bytes) = (true, done.bytes_after);
        }
        if let Some(number) = run.number {
            self.runs().compressed.push((number, done.bytes_after));
            self.nudge(Urgency::Soon);
        }
    }
}

/// Runs that are being compressed.
#[derive(Debug, Default)]
pub(crate) struct Compressions {
    under_way: Mutex<HashSet<JobRunId>>,
    one_less: Condvar,
}

impl Compressions {
    /// Waits until a run is not being compressed any more. Whoever compresses it has to know that it should stop.
    pub(crate) fn wait_for(&self, id: &JobRunId) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        while under_way.contains(id) {
            under_way = self.one_less.wait(under_way).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether a run is being compressed.
    pub(crate) fn is_under_way(&self, id: &JobRunId) -> bool {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// Counts a run as being compressed for as long as the guard lives; `None` if it is already.
    fn begin(this: &Arc<Self>, id: &JobRunId) -> Option<UnderWay> {
        let is_first = this.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        is_first.then(|| UnderWay { compressions: Arc::clone(this), id: id.clone() })
    }
}

struct UnderWay {
    compressions: Arc<Compressions>,
    id: JobRunId,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.compressions.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        self.compressions.one_less.notify_all();
    }
}
