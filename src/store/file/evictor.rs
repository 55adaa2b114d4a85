//! The thread that keeps the policy: after each run's end, every minute, and when the disk gets full.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::LogError;
use crate::index::{Changes, Index, RunNumber};
use crate::line::UnixMicros;
use crate::store::file::handle::Lent;
use crate::store::file::reconcile::mend;
use crate::store::file::shared::Shared;

/// How often the policy is looked at, whatever happens.
const EVERY: Duration = Duration::from_secs(60);
/// How often to ask whether the disk is full: other processes write too.
const LOOK: Duration = Duration::from_secs(1);
/// How often to try to make an index where the disk had no room for one.
const MAKE_INDEX: Duration = Duration::from_secs(10);
/// How much room is made for it: what a new one takes, and more if that does not do.
const ROOM_FOR_INDEX: [u64; 3] = [256 * 1024, 1024 * 1024, 4 * 1024 * 1024];
/// How soon after a run's end: many that end together are looked at once.
const AFTER_AN_END: Duration = Duration::from_millis(50);
/// How often what the index says of sizes is compared with the disk.
const AUDIT_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// Runs that are compared before others get their turn with the index.
const AUDITED_AT_ONCE: usize = 500;

/// The thread.
#[derive(Debug)]
pub(crate) struct Evictor {
    tasks: Mutex<mpsc::Sender<Task>>,
}

#[derive(Debug)]
enum Task {
    /// A run that is over is in the index.
    Ended,
    Stop,
}

impl Evictor {
    /// Starts it. It ends with the store.
    pub(crate) fn start(store: Lent) -> std::io::Result<Self> {
        let (tasks, inbox) = mpsc::channel();
        thread::Builder::new().name("evictor".into()).spawn(move || work(&store, &inbox))?;
        Ok(Self { tasks: Mutex::new(tasks) })
    }

    /// Says that a run has ended.
    pub(crate) fn run_ended(&self) {
        self.send(Task::Ended);
    }

    /// Ends it before the store goes.
    pub(crate) fn stop(&self) {
        self.send(Task::Stop);
    }

    fn send(&self, task: Task) {
        let _ = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).send(task);
    }
}

fn work(store: &Lent, inbox: &mpsc::Receiver<Task>) {
    let now = Instant::now();
    let mut next = Next { policy: now, look: now, index: now };
    loop {
        let due = next.policy.min(next.look);
        match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(Task::Ended) => next.policy = next.policy.min(Instant::now() + AFTER_AN_END),
            Ok(Task::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let is_open = store.with(|shared| {
            next.take(shared);
            !shared.is_closed()
        });
        if is_open != Some(true) {
            return;
        }
    }
}

/// When what is due next.
struct Next {
    policy: Instant,
    look: Instant,
    index: Instant,
}

impl Next {
    /// Does what is due.
    fn take(&mut self, shared: &Shared) {
        if shared.is_closed() {
            return;
        }
        let (now, is_home) = (Instant::now(), shared.check_home().is_ok());
        if is_home && now >= self.index && make_index_if_missing(shared) {
            self.index = now + MAKE_INDEX;
        }
        if now >= self.policy {
            self.policy = now + EVERY;
            if is_home && let Err(error) = shared.keep_policy().and_then(|()| audit_if_due(shared)) {
                tracing::warn!(%error, "evicting what is to be evicted");
            }
        }
        if now >= self.look {
            self.look = now + LOOK;
            if !is_home {
                return;
            }
            let is_missing = shared.index.as_ref().is_some_and(|index| index.is_missing());
            if !is_missing && shared.options.retention.is_on() && shared.lacks_room() {
                shared.make_room(0);
            }
            shared.tell_metrics();
        }
    }
}

/// Makes the index that there was no room for, and room for it if runs are evicted at all. Gives whether it came to that.
fn make_index_if_missing(shared: &Shared) -> bool {
    let Some(index) = shared.index.as_ref().filter(|index| index.lacks_room()) else { return false };
    mend(shared, index);
    if index.lacks_room() && shared.options.retention.is_on() {
        shared.make_room_by_folder(&ROOM_FOR_INDEX, || {
            mend(shared, index);
            !index.lacks_room()
        });
    }
    true
}

fn audit_if_due(shared: &Shared) -> Result<(), LogError> {
    let Some(index) = &shared.index else { return Ok(()) };
    let now = UnixMicros::now();
    match index.audited_at()? {
        // The rows of a new index are new themselves.
        None => index.set_audited_at(now),
        Some(at) if now.0.saturating_sub(at.0) < AUDIT_EVERY.as_micros() as u64 => Ok(()),
        Some(_) => {
            audit(shared, index)?;
            shared.forget_what_was_seen();
            index.set_audited_at(now)
        }
    }
}

/// Compares what the index says of sizes and pins with the disk, and corrects it. Gives how many rows were wrong.
pub(crate) fn audit(shared: &Shared, index: &Index) -> Result<u64, LogError> {
    let (mut below, mut wrong) = (RunNumber::MAX, 0);
    loop {
        let _turn = shared.evictions.none_for_now();
        let mut found = Vec::new();
        index.newest_below(below, |number, record| {
            found.push((number, record));
            found.len() < AUDITED_AT_ONCE
        })?;
        let Some(&(last, _)) = found.last() else { break };
        below = last;
        let mut changes = Changes::default();
        for (number, mut record) in found.into_iter().filter(|(_, record)| record.run.state.is_over()) {
            let id = record.run.id().clone();
            let folder = shared.layout.run(&id);
            match folder.is_there() {
                Ok(true) if shared.tracked(&id).is_none() => {}
                Ok(_) => continue,
                Err(error) => {
                    tracing::warn!(%error, run = %id, "what a run takes up can't be compared");
                    continue;
                }
            }
            let pinned = folder.is_pinned();
            if pinned != index.is_pinned(number)? {
                changes.pins.push((number, pinned));
            }
            let bytes = folder.disk_bytes();
            if bytes != record.disk_bytes {
                record.disk_bytes = bytes;
                changes.runs.push((number, record));
            }
        }
        wrong += changes.rows() as u64;
        if !changes.is_empty() {
            index.commit(&changes)?;
        }
        if shared.is_closed() {
            return Ok(wrong);
        }
    }
    if index.correct_finished_bytes()? || wrong > 0 {
        tracing::warn!(wrong, "what the index said of sizes was not what is on the disk; it is corrected");
    }
    Ok(wrong)
}
