//! The buffer of one run.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Core, lock};
use crate::error::LogError;
use crate::line::Stream;
use crate::run::{JobMetadata, JobRunId};
use crate::store::{RunEnd, RunWriter};

/// Changes of stream that are gathered at most: each costs eight bytes and an append of its own in the end.
const MAX_PARTS: usize = 512;

/// The smallest memory that is taken for a buffer.
const MIN_CAPACITY: usize = 1024;

/// What was appended to a run and is not handed on yet. Its lock is held while it is handed on, which is what
/// keeps the order, and what makes an appender wait for a slow store instead of filling the memory.
pub(super) struct RunBuffer {
    pub(super) id: JobRunId,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    bytes: Vec<u8>,
    /// Where `bytes` changes from one stream to the other.
    parts: Vec<Part>,
    /// The stream of the last part, if an append to it needs nothing but room: something is there already, so the
    /// timer knows of it, and no failure is to be told.
    ready: Option<Stream>,
    /// Whether the timer has the run in its queue.
    queued: bool,
    /// The writer of a run that was started through this store, until it is ended.
    writer: Option<Box<dyn RunWriter>>,
    /// What the writer of the run has not been told yet.
    failure: Option<LogError>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Live,
    /// The run is over.
    Over,
    /// The run goes on, but not through this buffer.
    Retired,
}

#[derive(Clone, Copy)]
struct Part {
    stream: Stream,
    start: u32,
}

impl RunBuffer {
    pub(super) fn new(id: JobRunId, writer: Option<Box<dyn RunWriter>>) -> Arc<Self> {
        let state = State {
            phase: Phase::Live,
            bytes: Vec::new(),
            parts: Vec::new(),
            ready: None,
            queued: false,
            writer,
            failure: None,
        };
        Arc::new(Self { id, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Takes bytes; `None` if this buffer is retired.
    #[inline]
    pub(super) fn append(
        self: &Arc<Self>,
        core: &Core,
        stream: Stream,
        bytes: &[u8],
    ) -> Option<Result<(), LogError>> {
        let mut state = self.lock();
        if state.ready == Some(stream) && bytes.len() <= state.room() {
            state.bytes.extend_from_slice(bytes);
            return Some(Ok(()));
        }
        self.append_slowly(core, &mut state, stream, bytes)
    }

    #[cold]
    fn append_slowly(
        self: &Arc<Self>,
        core: &Core,
        state: &mut State,
        stream: Stream,
        bytes: &[u8],
    ) -> Option<Result<(), LogError>> {
        match state.phase {
            Phase::Live => {}
            Phase::Over => return Some(Err(LogError::Finished { id: self.id.clone() })),
            Phase::Retired => return None,
        }
        let earlier = state.failure.take();
        if !bytes.is_empty() {
            self.take(core, state, stream, bytes);
        }
        let failure = earlier.or_else(|| state.failure.take());
        state.set_ready();
        Some(failure.map_or(Ok(()), Err))
    }

    fn take(self: &Arc<Self>, core: &Core, state: &mut State, stream: Stream, bytes: &[u8]) {
        let changes = state.parts.last().is_none_or(|last| last.stream != stream);
        if (changes && state.parts.len() == MAX_PARTS) || !state.grow(core, bytes.len()) {
            self.give(core, state);
        }
        if !state.grow(core, bytes.len()) {
            let given = self.give_bytes(core, &mut state.writer, stream, bytes);
            state.fail(given.err());
            return;
        }
        if state.parts.last().is_none_or(|last| last.stream != stream) {
            let start = u32::try_from(state.bytes.len()).unwrap_or(u32::MAX);
            state.parts.push(Part { stream, start });
        }
        state.bytes.extend_from_slice(bytes);
        state.queued = state.queued || core.enqueue(self);
        if !state.queued {
            self.give(core, state);
        }
    }

    /// Gives all that is buffered to the store behind.
    fn give(&self, core: &Core, state: &mut State) {
        state.ready = None;
        if state.parts.is_empty() {
            return;
        }
        // Taken out first: a store that panics must not be given the same bytes again.
        let mut bytes = mem::take(&mut state.bytes);
        let mut parts = mem::take(&mut state.parts);
        let mut failures = 0;
        for (index, part) in parts.iter().enumerate() {
            let end = parts.get(index + 1).map_or(bytes.len(), |next| next.start as usize);
            let text = &bytes[part.start as usize..end];
            if let Err(error) = self.give_bytes(core, &mut state.writer, part.stream, text) {
                failures += 1;
                if failures == 1 {
                    state.fail(Some(error));
                } else {
                    tracing::warn!(run = %self.id, %error, "another append of the same piece failed");
                }
            }
        }
        bytes.clear();
        parts.clear();
        (state.bytes, state.parts) = (bytes, parts);
    }

    fn give_bytes(
        &self,
        core: &Core,
        writer: &mut Option<Box<dyn RunWriter>>,
        stream: Stream,
        bytes: &[u8],
    ) -> Result<(), LogError> {
        match writer {
            Some(writer) => writer.append(stream, bytes),
            None => core.inner.append(&self.id, stream, bytes),
        }
    }

    /// Hands on what is there; a failure is kept for whoever writes the run.
    pub(super) fn hand_on(&self, core: &Core) {
        self.give(core, &mut self.lock());
    }

    /// The run's time has come; says whether nobody needs this buffer any more.
    pub(super) fn on_time(self: &Arc<Self>, core: &Core) -> bool {
        let mut state = self.lock();
        state.queued = false;
        let was_idle = state.bytes.is_empty();
        state.shrink(core);
        self.give(core, &mut state);
        // A run that is written by its id alone has nobody to say that it is done with it.
        if state.phase != Phase::Live || state.writer.is_some() || state.failure.is_some() {
            return false;
        }
        if was_idle {
            state.end(core, Phase::Retired);
        } else {
            state.queued = core.enqueue(self);
        }
        was_idle
    }

    pub(super) fn flush(&self, core: &Core) -> Result<(), LogError> {
        let mut state = self.lock();
        if state.phase == Phase::Over {
            return Err(LogError::Finished { id: self.id.clone() });
        }
        self.give(core, &mut state);
        if let Some(flushed) = state.writer.as_mut().map(|writer| writer.flush()) {
            state.fail(flushed.err());
        }
        state.failure.take().map_or(Ok(()), Err)
    }

    pub(super) fn finish(&self, core: &Core, end: RunEnd) -> Result<JobMetadata, LogError> {
        let mut state = self.lock();
        if state.phase == Phase::Over {
            return Err(LogError::Finished { id: self.id.clone() });
        }
        self.give(core, &mut state);
        let ended = match state.writer.take() {
            Some(writer) => writer.finish(end),
            None => core.inner.finish(&self.id, end),
        };
        match ended {
            Ok(_) | Err(LogError::Finished { .. }) => state.end(core, Phase::Over),
            // Whoever tries again does so with the store behind.
            Err(_) => state.end(core, Phase::Retired),
        }
        match (state.failure.take(), ended) {
            (None, ended) => ended,
            (Some(failure), Ok(_)) => Err(failure),
            (Some(failure), Err(error)) => Err(failure.and(error)),
        }
    }

    /// The writer is gone: without an end of its own, the run is lost.
    pub(super) fn abandon(&self, core: &Core) {
        let mut state = self.lock();
        if state.phase == Phase::Live {
            self.give(core, &mut state);
            state.writer = None;
            state.end(core, Phase::Over);
        }
        drop(state);
        self.warn_of_failure();
    }

    /// Another buffer takes over.
    pub(super) fn retire(&self, core: &Core) {
        let mut state = self.lock();
        self.give(core, &mut state);
        state.end(core, Phase::Retired);
        drop(state);
        self.warn_of_failure();
    }

    pub(super) fn take_failure(&self) -> Option<LogError> {
        self.lock().failure.take()
    }

    /// For when there is nobody left to be told.
    pub(super) fn warn_of_failure(&self) {
        if let Some(error) = self.take_failure() {
            tracing::warn!(run = %self.id, %error, "buffered lines could not be handed on");
        }
    }
}

impl State {
    #[inline]
    fn room(&self) -> usize {
        self.bytes.capacity() - self.bytes.len()
    }

    fn set_ready(&mut self) {
        let last = self.parts.last().map(|part| part.stream);
        self.ready = last.filter(|_| self.phase == Phase::Live && self.queued && self.failure.is_none());
    }

    fn fail(&mut self, error: Option<LogError>) {
        self.failure = LogError::both(self.failure.take(), error);
        if self.failure.is_some() {
            self.ready = None;
        }
    }

    /// Makes room for this many bytes more; `false` if that would be too much for the run or for all of them.
    fn grow(&mut self, core: &Core, bytes: usize) -> bool {
        if bytes <= self.room() {
            return true;
        }
        let (needed, before) = (self.bytes.len().saturating_add(bytes), self.bytes.capacity());
        let max = core.options.max_bytes.min(u32::MAX as usize);
        let capacity = needed.max(2 * before).max(MIN_CAPACITY).min(max);
        if capacity < needed || !core.hold(capacity - before) {
            return false;
        }
        self.bytes.reserve_exact(capacity - self.bytes.len());
        true
    }

    /// Gives back memory that a burst took and that is not used now.
    fn shrink(&mut self, core: &Core) {
        let before = self.bytes.capacity();
        let enough = (2 * self.bytes.len()).max(MIN_CAPACITY);
        if before > 4 * enough {
            self.bytes.shrink_to(enough);
            core.release(before - self.bytes.capacity());
        }
    }

    fn end(&mut self, core: &Core, phase: Phase) {
        core.release(mem::take(&mut self.bytes).capacity());
        self.parts = Vec::new();
        self.ready = None;
        self.phase = phase;
    }
}
