//! What a job's caller is told, and the bounded queue that it waits in.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use crate::error::LogError;
use crate::run::{Exit, JobMetadata, MissingDeps};
use crate::store::Outcome;

/// Something that a job said or that happened to it.
#[derive(Clone, Debug)]
pub enum JobEvent {
    /// The job lacks what it reads: a `DATABUILD_MISSING_DEPS_JSON:` line.
    MissingDeps(Vec<MissingDeps>),
    /// A `DATABUILD_<NAME>_JSON:` line with another name.
    Directive {
        /// The name.
        name: String,
        /// Its value: one valid JSON value, as text.
        json: String,
    },
    /// A directive line that can't be used. It is in the log as text, as every line is.
    Malformed {
        /// The directive's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More directives came than wait for a caller that does not ask: these were not kept here. Their lines are
    /// in the log.
    NotKept {
        /// How many.
        directives: u64,
    },
    /// The run is over and recorded. Nothing comes after this.
    Ended(Arc<JobEnd>),
}

/// How a job ended, and what was recorded.
#[derive(Debug)]
pub struct JobEnd {
    /// How the command ended.
    pub outcome: Outcome,
    /// See [`JobMetadata::note`].
    pub note: Option<String>,
    /// The run as it was recorded, or why its end could not be.
    pub metadata: Result<JobMetadata, LogError>,
}

impl JobEnd {
    /// How the process ended; `None` when nobody can know.
    #[must_use]
    pub const fn exit(&self) -> Option<Exit> {
        match self.outcome {
            Outcome::Exited(exit) | Outcome::Cancelled(exit) => Some(exit),
            Outcome::Lost => None,
        }
    }
}

/// The most directives that wait for the caller.
const MAX_PENDING: usize = 1024;
/// The most text of directives that waits for the caller, in bytes.
const MAX_PENDING_BYTES: usize = 2 * 1024 * 1024;

/// Carries events from the pump to the caller. No lock is held for longer than it takes to move one event.
#[derive(Debug)]
pub(super) struct Events {
    queue: Mutex<Queue>,
    arrived: Notify,
    end: watch::Sender<Option<Arc<JobEnd>>>,
}

#[derive(Debug, Default)]
struct Queue {
    pending: VecDeque<(JobEvent, usize)>,
    bytes: usize,
    not_kept: u64,
    ended: Option<Arc<JobEnd>>,
    closed: bool,
}

/// What the queue has for the caller.
#[derive(Debug)]
pub(super) enum Next {
    Event(JobEvent),
    /// Nothing yet.
    Empty,
    /// The end was given.
    Closed,
}

impl Events {
    pub(super) fn new() -> Self {
        Self { queue: Mutex::default(), arrived: Notify::new(), end: watch::Sender::new(None) }
    }

    /// Adds an event that stands for this many bytes of the log. When the queue is full, the event is only
    /// counted: the oldest are kept, so the caller gets the job's first words and the number of the others.
    pub(super) fn push(&self, event: JobEvent, bytes: usize) {
        let mut queue = self.lock();
        let full = queue.pending.len() >= MAX_PENDING || queue.bytes + bytes > MAX_PENDING_BYTES;
        // Once something is left out, everything is until the caller has caught up: the order stays true.
        if full || queue.not_kept > 0 {
            queue.not_kept += 1;
        } else {
            queue.bytes += bytes;
            queue.pending.push_back((event, bytes));
        }
        drop(queue);
        self.arrived.notify_one();
    }

    /// Adds the last event.
    pub(super) fn end(&self, end: JobEnd) {
        let end = Arc::new(end);
        self.lock().ended = Some(Arc::clone(&end));
        self.end.send_replace(Some(end));
        self.arrived.notify_one();
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    pub(super) fn next(&self) -> Next {
        let mut queue = self.lock();
        if let Some((event, bytes)) = queue.pending.pop_front() {
            queue.bytes -= bytes;
            Next::Event(event)
        } else if queue.not_kept > 0 {
            Next::Event(JobEvent::NotKept { directives: std::mem::take(&mut queue.not_kept) })
        } else if let Some(end) = queue.ended.take() {
            queue.closed = true;
            Next::Event(JobEvent::Ended(end))
        } else if queue.closed {
            Next::Closed
        } else {
            Next::Empty
        }
    }

    /// Waits until [`next`](Self::next) has something; for one waiter at a time.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    pub(super) async fn wait(&self) -> Arc<JobEnd> {
        let mut end = self.end.subscribe();
        loop {
            let seen = end.borrow_and_update().clone();
            if let Some(end) = seen {
                return end;
            }
            // The sender is in `self`, so this can't fail.
            let _ = end.changed().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl PartialEq for JobEvent {
    fn eq(&self, other: &Self) -> bool {
        format!("{self:?}") == format!("{other:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directive(n: usize) -> JobEvent {
        JobEvent::Directive { name: "N".to_owned(), json: n.to_string() }
    }

    fn drain(events: &Events) -> (usize, u64, bool) {
        let (mut kept, mut not_kept) = (0, 0);
        loop {
            match events.next() {
                Next::Event(JobEvent::NotKept { directives }) => not_kept += directives,
                Next::Event(JobEvent::Ended(_)) => return (kept, not_kept, true),
                Next::Event(event) => {
                    assert_eq!(event, directive(kept), "the oldest are kept, in order");
                    kept += 1;
                }
                Next::Empty | Next::Closed => return (kept, not_kept, false),
            }
        }
    }

    fn ended() -> JobEnd {
        let metadata = Err(LogError::Closed);
        JobEnd { outcome: Outcome::Lost, note: None, metadata }
    }

    #[test]
    fn a_queue_that_nobody_empties_is_bounded_and_counts_what_it_left_out() {
        let events = Events::new();
        for n in 0..MAX_PENDING + 10 {
            events.push(directive(n), 1);
        }
        events.end(ended());
        assert_eq!(drain(&events), (MAX_PENDING, 10, true));
        assert!(matches!(events.next(), Next::Closed));
    }

    #[test]
    fn a_queue_is_bounded_by_bytes_too_and_takes_new_events_when_it_was_emptied() {
        let events = Events::new();
        for n in 0..3 {
            events.push(directive(n), MAX_PENDING_BYTES / 2);
        }
        assert_eq!(drain(&events), (2, 1, false));
        events.push(directive(0), MAX_PENDING_BYTES / 2);
        assert_eq!(drain(&events), (1, 0, false));
    }
}
