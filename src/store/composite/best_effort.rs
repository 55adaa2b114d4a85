//! A member that gets what it can take, through a bounded queue and a thread of its own.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::lock;
use super::member::{Member, MemberHealth, MemberMode, Vitals};
use crate::error::LogError;
use crate::line::Stream;
use crate::run::{JobRunId, RunSpec};
use crate::store::{LogStore, Outcome, RunEnd, RunWriter};

/// What an entry of the queue counts for besides its bytes.
const ENTRY_BYTES: usize = 128;
/// What the start or the end of a run counts for.
const CONTROL_BYTES: usize = 1024;
/// Room that is kept for starts and ends when appends have filled the queue.
const CONTROL_RESERVE: usize = 1024 * 1024;
/// The most that small appends are gathered to.
const GATHERED_BYTES: usize = 64 * 1024;

/// What the member is to be told, in the order in which it happened.
pub(super) enum Command {
    Start(Box<RunSpec>),
    Append(Stream, Vec<u8>),
    Finish(Box<RunEnd>),
    /// The run's writer is gone.
    Abandon,
}

pub(super) struct BestEffort {
    queue: Arc<Queue>,
    worker: Option<JoinHandle<()>>,
}

struct Queue {
    store: Arc<dyn LogStore>,
    vitals: Vitals,
    limit: usize,
    state: Mutex<State>,
    /// Tells the worker that there is something to do.
    wake: Condvar,
    /// Tells who waits that everything is done.
    drained: Condvar,
}

#[derive(Default)]
struct State {
    entries: VecDeque<Entry>,
    /// What the entries count for together.
    bytes: usize,
    /// Live runs that the member has no whole copy of.
    broken: HashMap<JobRunId, Broken>,
    /// Since when the store has been at the same call.
    busy_since: Option<Instant>,
    close: bool,
    stopping: bool,
    /// Whether what is waiting is not to be given to the store any more.
    discard: bool,
    exited: bool,
}

struct Entry {
    id: JobRunId,
    command: Command,
    weight: usize,
}

/// What is missing of a copy, and from where on.
#[derive(Default)]
struct Broken {
    bytes: u64,
    skip: Skip,
}

/// What the worker leaves out of what is still in the queue.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Skip {
    /// Nothing: it came before the hole.
    #[default]
    Nothing,
    /// Appends.
    Appends,
    /// Everything: the run with this id in that store is not this run.
    All,
}

/// What the worker is to do next.
enum Task {
    Deliver(Entry),
    Close,
}

impl BestEffort {
    pub(super) fn start(member: Member, limit: usize) -> Result<Self, LogError> {
        let queue = Arc::new(Queue {
            store: member.store,
            vitals: Vitals::new(member.name.clone(), MemberMode::BestEffort),
            limit,
            state: Mutex::default(),
            wake: Condvar::new(),
            drained: Condvar::new(),
        });
        let of_worker = Arc::clone(&queue);
        let worker = thread::Builder::new()
            .name("databuild-copy".to_owned())
            .spawn(move || of_worker.work())
            .map_err(LogError::io("starting a thread for", member.name))?;
        Ok(Self { queue, worker: Some(worker) })
    }

    pub(super) fn vitals(&self) -> &Vitals {
        &self.queue.vitals
    }

    /// The store, to be read from; `None` while it has been at one call for longer than `patience`.
    pub(super) fn store(&self, patience: Duration) -> Option<&Arc<dyn LogStore>> {
        let stuck = lock(&self.queue.state).busy_since.is_some_and(|since| since.elapsed() >= patience);
        (!stuck).then_some(&self.queue.store)
    }

    pub(super) fn health(&self) -> MemberHealth {
        let queued = lock(&self.queue.state).bytes;
        self.queue.vitals.health(queued)
    }

    /// Takes bytes if there is room; if not, or if some were dropped before, they are counted as dropped.
    pub(super) fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) {
        let mut state = lock(&self.queue.state);
        let limit = self.queue.limit;
        if let Some(broken) = state.broken.get_mut(id) {
            broken.bytes += bytes.len() as u64;
            self.queue.vitals.count_dropped(bytes.len() as u64, 1);
            return;
        }
        let held = state.bytes;
        if let Some(Entry { id: of, command: Command::Append(last, gathered), weight }) =
            state.entries.back_mut()
            && (&*of, *last) == (id, stream)
            && gathered.len() + bytes.len() <= GATHERED_BYTES
            && held + bytes.len() <= limit
        {
            gathered.extend_from_slice(bytes);
            *weight += bytes.len();
            state.bytes += bytes.len();
            return;
        }
        let weight = bytes.len() + ENTRY_BYTES;
        if held + weight > limit || state.exited {
            state.broken.insert(id.clone(), Broken { bytes: bytes.len() as u64, skip: Skip::Nothing });
            self.queue.vitals.count_dropped(bytes.len() as u64, 1);
            return;
        }
        let command = Command::Append(stream, bytes.to_vec());
        self.queue.push(&mut state, Entry { id: id.clone(), command, weight });
    }

    /// Has the member told of the start or the end of a run.
    pub(super) fn send(&self, id: &JobRunId, command: Command) {
        let mut state = lock(&self.queue.state);
        let limit = self.queue.limit.saturating_add(CONTROL_RESERVE);
        if state.bytes + CONTROL_BYTES <= limit && !state.exited {
            self.queue.push(&mut state, Entry { id: id.clone(), command, weight: CONTROL_BYTES });
        } else if matches!(command, Command::Start(_)) {
            state.broken.insert(id.clone(), Broken { bytes: 0, skip: Skip::All });
        } else {
            // The copy stays without an end until the worker goes, and is lost then.
            state.broken.remove(id);
            self.queue.vitals.count_text(format!("no room to tell of the end of run {id}"));
        }
    }

    pub(super) fn close_when_drained(&self) {
        lock(&self.queue.state).close = true;
        self.queue.wake.notify_one();
    }

    /// Waits until the member has been told everything, but not longer than to the deadline.
    pub(super) fn wait_until_drained(&self, deadline: Instant) {
        self.queue.wait(deadline, State::is_drained);
    }

    /// Has the worker end when the member has been told everything.
    pub(super) fn begin_stop(&self) {
        lock(&self.queue.state).stopping = true;
        self.queue.wake.notify_one();
    }

    /// Waits for the worker to end. What is not delivered by the deadline is dropped.
    pub(super) fn stop(&mut self, deadline: Instant) {
        if self.queue.wait(deadline, |state| state.exited) {
            if self.worker.take().is_some_and(|worker| worker.join().is_err()) {
                tracing::error!("the thread of a best-effort log store panicked");
            }
            return;
        }
        // The thread ends when the store lets it; nobody waits for that.
        lock(&self.queue.state).discard = true;
        self.queue.wake.notify_one();
    }
}

impl State {
    fn is_drained(&self) -> bool {
        self.exited || (self.entries.is_empty() && self.busy_since.is_none() && !self.close)
    }
}

impl Queue {
    fn push(&self, state: &mut State, entry: Entry) {
        state.bytes += entry.weight;
        state.entries.push_back(entry);
        if state.entries.len() == 1 {
            self.wake.notify_one();
        }
    }

    /// Waits for a condition; says whether it came true by the deadline.
    fn wait(&self, deadline: Instant, condition: impl Fn(&State) -> bool) -> bool {
        let mut state = lock(&self.state);
        while !condition(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn work(&self) {
        // Also when the store panics: nobody is to wait for a worker that is gone.
        let _exit = OnExit(self);
        let mut writers = HashMap::new();
        while let Some(task) = self.next() {
            match task {
                Task::Deliver(entry) => self.deliver(entry, &mut writers),
                Task::Close => self.count(self.store.close()),
            }
        }
    }

    fn next(&self) -> Option<Task> {
        let mut state = lock(&self.state);
        loop {
            state.busy_since = None;
            if state.discard {
                return None;
            }
            if let Some(entry) = state.entries.pop_front() {
                state.bytes -= entry.weight;
                state.busy_since = Some(Instant::now());
                return Some(Task::Deliver(entry));
            }
            if mem::take(&mut state.close) {
                state.busy_since = Some(Instant::now());
                return Some(Task::Close);
            }
            self.drained.notify_all();
            if state.stopping {
                return None;
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn deliver(&self, entry: Entry, writers: &mut HashMap<JobRunId, Box<dyn RunWriter>>) {
        let Entry { id, command, .. } = entry;
        match command {
            Command::Start(spec) => match self.store.start(*spec) {
                Ok(writer) => drop(writers.insert(id, writer)),
                Err(error) => {
                    self.vitals.count(&error);
                    self.give_up(&id, Skip::All, 0);
                }
            },
            Command::Append(stream, bytes) => {
                let skip = lock(&self.state).broken.get(&id).map_or(Skip::Nothing, |broken| broken.skip);
                if skip != Skip::Nothing {
                    self.give_up(&id, skip, bytes.len());
                } else if let Some(writer) = writers.get_mut(&id) {
                    // The store has the run, so it counts the hole itself if this fails.
                    self.count(writer.append(stream, &bytes));
                } else if let Err(error) = self.store.append(&id, stream, &bytes) {
                    self.vitals.count(&error);
                    self.give_up(&id, Skip::Appends, bytes.len());
                }
            }
            Command::Finish(end) => self.finish(&id, *end, writers.remove(&id)),
            Command::Abandon => {
                let writer = writers.remove(&id);
                if writer.is_some() {
                    self.finish(&id, RunEnd::now(Outcome::Lost), writer);
                } else {
                    lock(&self.state).broken.remove(&id);
                }
            }
        }
    }

    /// Ends a copy, and says in it what is missing.
    fn finish(&self, id: &JobRunId, mut end: RunEnd, writer: Option<Box<dyn RunWriter>>) {
        let broken = lock(&self.state).broken.remove(id);
        if let Some(Broken { bytes, skip }) = &broken {
            if *skip == Skip::All {
                return;
            }
            let missing = format!("incomplete copy: {bytes} bytes were dropped");
            end.note = Some(match end.note {
                Some(note) => format!("{note}; {missing}"),
                None => missing,
            });
        }
        let ended = match writer {
            Some(writer) => writer.finish(end),
            None => self.store.finish(id, end),
        };
        match ended {
            Err(LogError::Finished { .. }) => {}
            // Then not even its first bytes arrived.
            Err(LogError::NotFound { .. }) if broken.is_some() => {}
            ended => self.count(ended),
        }
    }

    /// Marks a run as broken, with this many bytes dropped.
    fn give_up(&self, id: &JobRunId, skip: Skip, bytes: usize) {
        let mut state = lock(&self.state);
        let broken = state.broken.entry(id.clone()).or_default();
        broken.skip = skip;
        broken.bytes += bytes as u64;
        if bytes > 0 {
            self.vitals.count_dropped(bytes as u64, 1);
        }
    }

    fn count<T>(&self, result: Result<T, LogError>) {
        if let Err(error) = result {
            self.vitals.count(&error);
        }
    }
}

/// Says that the worker is gone, and counts what it left.
struct OnExit<'a>(&'a Queue);

impl Drop for OnExit<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.vitals.count_text("the store panicked and is not written to any more".to_owned());
        }
        let mut state = lock(&self.0.state);
        for entry in mem::take(&mut state.entries) {
            if let Command::Append(_, bytes) = entry.command {
                self.0.vitals.count_dropped(bytes.len() as u64, 1);
            }
        }
        state.bytes = 0;
        state.busy_since = None;
        state.exited = true;
        self.0.drained.notify_all();
    }
}
