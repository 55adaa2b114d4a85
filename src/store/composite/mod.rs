//! Several stores behind one.

mod best_effort;
mod member;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::error::LogError;
use crate::line::{ByteOffset, LineNumber, Stream, View};
use crate::retention::{GcReport, GcRequest};
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::{
    Compression, LogStore, ReadOptions, ReadStream, RunCursor, RunEnd, RunPage, RunQuery, RunWriter, Start,
};

use best_effort::BestEffort;
use member::Required;
pub use member::{Member, MemberHealth, MemberMode};
use write::{Run, Writer};

/// How best-effort members are kept from being in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompositeOptions {
    /// Bytes that may wait for one best-effort member; 8 MiB. What does not fit is dropped and counted.
    pub queue_bytes: usize,
    /// The longest that closing or dropping the store waits for best-effort members; 2 s. One that has been at the
    /// same call for this long counts as stuck, and reads pass it over.
    pub drain_wait: Duration,
}

impl Default for CompositeOptions {
    fn default() -> Self {
        Self { queue_bytes: 8 * 1024 * 1024, drain_wait: Duration::from_secs(2) }
    }
}

/// Writes to several stores and reads from the first that has the run.
///
/// *Required* members are written to while the caller waits, one after the other. If one fails, the others are
/// given the bytes all the same, and the error names it; only an error of the first that is about the run itself
/// (not found, exists already, finished, evicted) is given as it is.
///
/// *Best-effort* members are written to by a thread each, through a bounded queue, so a slow, stuck or failing one
/// slows nobody. What does not fit is dropped and counted, and that member gets no more of that run, because its
/// line numbers would be wrong: its copy ends there, and its [`note`](JobMetadata::note) says how much is missing.
///
/// Every member gets the appends of a run in the same order, so a line has the same number in all of them. Reads go
/// to the required members in their order, then to the others: a best-effort copy may lag behind. A member that
/// does not know the run, evicted it, is stuck or fails is passed over. A follower of a run that no member knows waits at the
/// first required one. Lists of runs come from the first required member that answers, page by page the same.
pub struct CompositeLogStore {
    shared: Arc<Shared>,
}

struct Shared {
    /// At least one.
    required: Vec<Required>,
    best_effort: Vec<BestEffort>,
    /// For each member in the order given, where it is.
    order: Vec<(MemberMode, usize)>,
    options: CompositeOptions,
    /// The runs that are being written.
    runs: Mutex<HashMap<JobRunId, Arc<Run>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CompositeLogStore {
    /// One store out of several.
    ///
    /// # Errors
    ///
    /// [`LogError::InvalidParameter`] if no member is required: then nobody would answer for anything.
    /// [`LogError::Inner`] if the thread of a best-effort member can't be started.
    pub fn new(
        members: impl IntoIterator<Item = Member>,
        options: CompositeOptions,
    ) -> Result<Self, LogError> {
        let (mut required, mut best_effort, mut order) = (Vec::new(), Vec::new(), Vec::new());
        for member in members {
            match member.mode {
                MemberMode::Required => {
                    order.push((member.mode, required.len()));
                    required.push(Required::new(member));
                }
                MemberMode::BestEffort => {
                    order.push((member.mode, best_effort.len()));
                    best_effort.push(BestEffort::start(member, options.queue_bytes)?);
                }
            }
        }
        if required.is_empty() {
            return Err(LogError::InvalidParameter {
                name: "members",
                given: format!("{} best-effort stores", best_effort.len()),
                expected: "expected at least one required store".to_owned(),
            });
        }
        let shared = Shared { required, best_effort, order, options, runs: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// How the members are, in the order in which they were given.
    #[must_use]
    pub fn members(&self) -> Vec<MemberHealth> {
        let shared = &self.shared;
        let health = |&(mode, index): &(MemberMode, usize)| match mode {
            MemberMode::Required => shared.required[index].health(),
            MemberMode::BestEffort => shared.best_effort[index].health(),
        };
        shared.order.iter().map(health).collect()
    }
}

impl fmt::Debug for CompositeLogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompositeLogStore").field("members", &self.members()).finish_non_exhaustive()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let deadline = Instant::now() + self.options.drain_wait;
        for member in &self.best_effort {
            member.begin_stop();
        }
        for member in &mut self.best_effort {
            member.stop(deadline);
        }
    }
}

impl Shared {
    /// The answer of the first member that knows the run.
    fn ask<T>(
        &self,
        doing: &'static str,
        ask: impl Fn(&dyn LogStore) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        let mut answer: Option<LogError> = None;
        let patience = self.options.drain_wait;
        let required = self.required.iter().map(|member| (&member.store, member.vitals()));
        let others = self
            .best_effort
            .iter()
            .filter_map(|member| member.store(patience).map(|store| (store, member.vitals())));
        for (index, (store, vitals)) in required.chain(others).enumerate() {
            match ask(&**store) {
                Ok(found) => return Ok(found),
                // An answer too: who has the run does not keep that part of it.
                Err(gap @ LogError::Gap(_)) => return Err(gap),
                // What says more than "not found" is told if nobody has the run.
                Err(LogError::NotFound { .. }) if answer.is_some() => {}
                Err(error) => {
                    let error = vitals.failed(index, doing, error);
                    if answer.as_ref().is_none_or(|before| matches!(before, LogError::NotFound { .. })) {
                        answer = Some(error);
                    }
                }
            }
        }
        Err(answer.unwrap_or(LogError::Closed))
    }

    /// The answer of the first required member that does what is asked at all.
    fn first_that_can<T>(
        &self,
        doing: &str,
        ask: impl Fn(&dyn LogStore) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        let mut none = LogError::Closed;
        for (index, member) in self.required.iter().enumerate() {
            match ask(&*member.store) {
                Err(error @ LogError::Unsupported { .. }) => none = error,
                answer => return answer.map_err(|error| member.failed(index, doing, error)),
            }
        }
        Err(none)
    }

    /// A page from one required member. Its cursor also says whose it is.
    fn page(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        let count = self.required.len() as u64;
        let (from, to) = match query.cursor {
            Some(RunCursor(place)) => ((place % count) as usize, (place % count) as usize + 1),
            None => (0, self.required.len()),
        };
        let query =
            RunQuery { cursor: query.cursor.map(|place| RunCursor(place.0 / count)), ..query.clone() };
        let mut failure = None;
        for (index, member) in self.required.iter().enumerate().take(to).skip(from) {
            match member.store.runs(&query) {
                Ok(RunPage { runs, next, pinned }) => {
                    let place = |RunCursor(place): RunCursor| {
                        RunCursor(place.saturating_mul(count).saturating_add(index as u64))
                    };
                    return Ok(RunPage { runs, next: next.map(place), pinned });
                }
                Err(error) => {
                    failure = LogError::both(failure, Some(member.failed(index, "listing runs", error)));
                }
            }
        }
        Err(failure.unwrap_or(LogError::Closed))
    }
}

impl LogStore for CompositeLogStore {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        let run = self.shared.start(spec)?;
        Ok(Box::new(Writer { shared: Arc::clone(&self.shared), run }))
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.shared.writing(id, |writing| self.shared.append(writing, id, stream, bytes))
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.shared.writing(id, |writing| self.shared.finish(writing, id, end))
    }

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        if !options.follow {
            return self.shared.ask("reading", |store| store.read(id, options.clone()));
        }
        // With `follow`, any member would take the read, also one that will never get the run.
        let known = self.shared.ask("reading", |store| {
            store.run(id)?;
            store.read(id, options.clone())
        });
        match known {
            Err(LogError::NotFound { .. }) => {
                let first = &self.shared.required[0];
                first.store.read(id, options).map_err(|error| first.failed(0, "reading", error))
            }
            known => known,
        }
    }

    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
        self.shared.ask("reading", |store| store.position(id, view, start))
    }

    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        self.shared.ask("reading", |store| store.byte_offset(id, stream, start))
    }

    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError> {
        self.shared.ask("reading", |store| store.read_bytes(id, stream, offset, length))
    }

    fn given_up(&self, id: &JobRunId, stream: Stream) -> Result<Option<Range<ByteOffset>>, LogError> {
        self.shared.ask("reading", |store| store.given_up(id, stream))
    }

    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        self.shared.ask("reading", |store| store.run(id))
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        self.shared.page(query)
    }

    /// Compresses the run in every required member that can do that, and gives what the first of those gives.
    fn compress(&self, id: &JobRunId) -> Result<Compression, LogError> {
        let mut answer = Err(LogError::Unsupported { what: "no store keeps files to compress" });
        for (index, member) in self.shared.required.iter().enumerate() {
            match member.store.compress(id) {
                Ok(done) => answer = answer.or(Ok(done)),
                Err(LogError::Unsupported { .. }) => {}
                Err(error) => return Err(member.failed(index, "compressing", error)),
            }
        }
        answer
    }

    /// Evicts in the first required member that can.
    fn gc(&self, request: &GcRequest) -> Result<GcReport, LogError> {
        self.shared.first_that_can("evicting", |store| store.gc(request))
    }

    /// Pins in the first required member that can.
    fn set_pinned(&self, id: &JobRunId, pinned: bool) -> Result<(), LogError> {
        self.shared.first_that_can("pinning", |store| store.set_pinned(id, pinned))
    }

    /// Gives best-effort members what is waiting for them, for a limited time, and closes every member.
    fn close(&self) -> Result<(), LogError> {
        let shared = &self.shared;
        let deadline = Instant::now() + shared.options.drain_wait;
        for member in &shared.best_effort {
            member.close_when_drained();
        }
        let mut failure = None;
        for (index, member) in shared.required.iter().enumerate() {
            if let Err(error) = member.store.close() {
                failure = LogError::both(failure, Some(member.failed(index, "closing", error)));
            }
        }
        for member in &shared.best_effort {
            member.wait_until_drained(deadline);
        }
        failure.map_or(Ok(()), Err)
    }
}
