//! A store that gathers small appends into large ones.

mod run;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::error::LogError;
use crate::line::{ByteOffset, LineNumber, Stream, View};
use crate::retention::{GcReport, GcRequest};
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::{
    Compression, LogStore, ReadOptions, ReadStream, RunEnd, RunPage, RunQuery, RunWriter, Start,
};

use run::RunBuffer;

/// How much is gathered, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferOptions {
    /// Bytes of one run that are gathered before they are handed on; 64 KiB. A single append of more than that is
    /// handed on as it is.
    pub max_bytes: usize,
    /// The longest that a byte waits; 5 ms. This is what the buffer adds to the time until a follower sees a line.
    pub max_delay: Duration,
    /// Bytes of memory that the buffers of all runs take together; 16 MiB. When it is used up, whoever appends
    /// hands on what is there first and waits for the store behind.
    pub max_total_bytes: usize,
}

impl Default for BufferOptions {
    fn default() -> Self {
        Self { max_bytes: 64 * 1024, max_delay: Duration::from_millis(5), max_total_bytes: 16 * 1024 * 1024 }
    }
}

/// Gathers appends and hands them on in large pieces: when enough is there, when the first byte has waited long
/// enough, and before anything of the run is read, flushed or ended.
///
/// The order of a run's appends is kept, across both streams too. A reader through this store sees all that was
/// appended before; a follower sees it after [`BufferOptions::max_delay`]; a reader of the store behind sees what
/// was handed on. A crash loses what was not, so at most that delay.
///
/// When the store behind fails, the next append, flush or end of that run returns the error, once. The bytes given
/// with that append are taken all the same, and later ones are handed on again: what could not be kept is a hole
/// that the store behind counts. If several appends of one piece fail, the first error stands for all of them.
///
/// One thread does the timing; while nothing is buffered, it sleeps. If the store behind is slow with one run, that
/// delays what others have buffered, and stops nobody: a full buffer is handed on by whoever filled it.
pub struct BufferedLogStore {
    timed: Arc<Timed>,
}

/// What the store and its writers share, and the timer's thread, which ends with the last of them.
struct Timed {
    core: Arc<Core>,
    timer: Option<JoinHandle<()>>,
}

struct Core {
    inner: Arc<dyn LogStore>,
    options: BufferOptions,
    runs: Mutex<HashMap<JobRunId, Arc<RunBuffer>>>,
    queue: Mutex<Queue>,
    /// Tells the timer that the queue is not empty any more, or that it is to stop.
    wake: Condvar,
    /// Bytes of memory that the buffers take.
    held: AtomicUsize,
}

/// Runs with something in their buffer, each once, in the order in which they are due.
#[derive(Default)]
struct Queue {
    due: VecDeque<(Instant, Arc<RunBuffer>)>,
    stopped: bool,
}

impl BufferedLogStore {
    /// Buffers what is appended to `inner`.
    ///
    /// If no thread can be started for the timing, nothing is buffered, and every append is handed on at once.
    #[must_use]
    pub fn new(inner: Arc<dyn LogStore>, options: BufferOptions) -> Self {
        let core = Arc::new(Core {
            inner,
            options,
            runs: Mutex::default(),
            queue: Mutex::default(),
            wake: Condvar::new(),
            held: AtomicUsize::new(0),
        });
        let of_timer = Arc::clone(&core);
        let timer = thread::Builder::new()
            .name("databuild-buffer".to_owned())
            .spawn(move || of_timer.keep_time())
            .inspect_err(|error| {
                tracing::warn!(%error, "no thread for a log buffer; appends are not buffered");
                lock(&core.queue).stopped = true;
            })
            .ok();
        Self { timed: Arc::new(Timed { core, timer }) }
    }

    /// Bytes of memory that the buffers take at this moment, at most [`BufferOptions::max_total_bytes`].
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.timed.core.held.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for BufferedLogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferedLogStore")
            .field("options", &self.timed.core.options)
            .field("held_bytes", &self.held_bytes())
            .finish_non_exhaustive()
    }
}

impl Drop for BufferedLogStore {
    fn drop(&mut self) {
        self.timed.core.hand_on_all_or_warn();
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        lock(&self.core.queue).stopped = true;
        self.core.wake.notify_one();
        if self.timer.take().is_some_and(|timer| timer.join().is_err()) {
            tracing::error!("the thread of a log buffer panicked");
        }
        self.core.hand_on_all_or_warn();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// The timer: hands on what has waited long enough.
    fn keep_time(&self) {
        let mut queue = lock(&self.queue);
        while !queue.stopped {
            let wait = queue.due.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
            match wait {
                None => queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => {
                    let Some((_, run)) = queue.due.pop_front() else { continue };
                    drop(queue);
                    // A store that panics must not take the timing of all other runs with it.
                    match catch_unwind(AssertUnwindSafe(|| run.on_time(self))) {
                        Ok(true) => self.forget(&run),
                        Ok(false) => {}
                        Err(_) => tracing::error!(run = %run.id, "the store behind a log buffer panicked"),
                    }
                    drop(run);
                    queue = lock(&self.queue);
                }
                Some(wait) => {
                    let woken = self.wake.wait_timeout(queue, wait);
                    queue = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Has the timer look after a run; `false` if there is none.
    fn enqueue(&self, run: &Arc<RunBuffer>) -> bool {
        let mut queue = lock(&self.queue);
        if queue.stopped {
            return false;
        }
        // All wait equally long, so the timer need not be woken for any but the first.
        let wake = queue.due.is_empty();
        queue.due.push_back((Instant::now() + self.options.max_delay, Arc::clone(run)));
        drop(queue);
        if wake {
            self.wake.notify_one();
        }
        true
    }

    /// Takes this much memory for a buffer, if it is to be had.
    fn hold(&self, bytes: usize) -> bool {
        let fits = |held: usize| held.checked_add(bytes).filter(|&sum| sum <= self.options.max_total_bytes);
        self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn find(&self, id: &JobRunId) -> Option<Arc<RunBuffer>> {
        lock(&self.runs).get(id).cloned()
    }

    fn forget(&self, run: &Arc<RunBuffer>) {
        let mut runs = lock(&self.runs);
        if runs.get(&run.id).is_some_and(|known| Arc::ptr_eq(known, run)) {
            runs.remove(&run.id);
        }
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        if let Some(taken) = self.find(id).and_then(|run| run.append(self, stream, bytes)) {
            return taken;
        }
        // The store behind knows whether the run exists and whether it is over.
        self.inner.append(id, stream, bytes)?;
        lock(&self.runs).entry(id.clone()).or_insert_with(|| RunBuffer::new(id.clone(), None));
        Ok(())
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        let Some(run) = self.find(id) else { return self.inner.finish(id, end) };
        let ended = run.finish(self, end);
        self.forget(&run);
        ended
    }

    /// Hands on what is there of a run; if that fails, whoever writes the run is told.
    fn hand_on(&self, id: &JobRunId) {
        if let Some(run) = self.find(id) {
            run.hand_on(self);
        }
    }

    fn all(&self) -> Vec<Arc<RunBuffer>> {
        lock(&self.runs).values().cloned().collect()
    }

    fn hand_on_all_or_warn(&self) {
        for run in self.all() {
            run.hand_on(self);
            run.warn_of_failure();
        }
    }
}

impl LogStore for BufferedLogStore {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        let core = &self.timed.core;
        let id = spec.id.clone();
        let run = RunBuffer::new(id.clone(), Some(core.inner.start(spec)?));
        let before = lock(&core.runs).insert(id, Arc::clone(&run));
        if let Some(before) = before {
            before.retire(core);
        }
        Ok(Box::new(Writer { timed: Arc::clone(&self.timed), run }))
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.timed.core.append(id, stream, bytes)
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.timed.core.finish(id, end)
    }

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        self.timed.core.hand_on(id);
        self.timed.core.inner.read(id, options)
    }

    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
        self.timed.core.hand_on(id);
        self.timed.core.inner.position(id, view, start)
    }

    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        self.timed.core.hand_on(id);
        self.timed.core.inner.byte_offset(id, stream, start)
    }

    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError> {
        self.timed.core.hand_on(id);
        self.timed.core.inner.read_bytes(id, stream, offset, length)
    }

    fn given_up(&self, id: &JobRunId, stream: Stream) -> Result<Option<Range<ByteOffset>>, LogError> {
        self.timed.core.inner.given_up(id, stream)
    }

    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        self.timed.core.hand_on(id);
        self.timed.core.inner.run(id)
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        for run in self.timed.core.all() {
            run.hand_on(&self.timed.core);
        }
        self.timed.core.inner.runs(query)
    }

    fn gc(&self, request: &GcRequest) -> Result<GcReport, LogError> {
        self.timed.core.inner.gc(request)
    }

    fn set_pinned(&self, id: &JobRunId, pinned: bool) -> Result<(), LogError> {
        self.timed.core.inner.set_pinned(id, pinned)
    }

    /// Hands on what is buffered and closes the store behind. Later appends are buffered as before.
    fn compress(&self, id: &JobRunId) -> Result<Compression, LogError> {
        self.timed.core.inner.compress(id)
    }

    fn close(&self) -> Result<(), LogError> {
        let core = &self.timed.core;
        let mut failure = None;
        for run in core.all() {
            run.hand_on(core);
            failure = LogError::both(failure, run.take_failure());
        }
        failure = LogError::both(failure, core.inner.close().err());
        failure.map_or(Ok(()), Err)
    }
}

struct Writer {
    timed: Arc<Timed>,
    run: Arc<RunBuffer>,
}

impl RunWriter for Writer {
    fn id(&self) -> &JobRunId {
        &self.run.id
    }

    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        match self.run.append(&self.timed.core, stream, bytes) {
            Some(taken) => taken,
            None => self.timed.core.append(&self.run.id, stream, bytes),
        }
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.run.flush(&self.timed.core)
    }

    fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        let ended = self.run.finish(&self.timed.core, end);
        self.timed.core.forget(&self.run);
        ended
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.run.abandon(&self.timed.core);
        self.timed.core.forget(&self.run);
    }
}
