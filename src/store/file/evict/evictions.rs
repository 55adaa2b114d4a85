//! What is known of evictions under way: whose turn it is, which runs are just going, and who reads them.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use crate::index::RunNumber;
use crate::run::{JobRunId, Tombstone};
use crate::store::file::live::LiveRun;

/// What has to be known of evictions under way, and of who reads what may be evicted.
#[derive(Debug, Default)]
pub(crate) struct Evictions {
    /// One eviction at a time.
    pub(super) turn: Mutex<Turn>,
    /// Runs that are being evicted: their folders are gone, and the index may still have them.
    pub(super) going: Mutex<HashMap<JobRunId, Tombstone>>,
    /// Runs that are being read, whether they are over or not yet.
    readers: Mutex<Readers>,
}

/// What only the one that evicts looks at.
#[derive(Debug)]
pub(crate) struct Turn {
    /// Whether something may be in the trash.
    pub(super) trash: bool,
    /// Runs that could not be evicted: others go in their place.
    pub(super) refused: HashSet<RunNumber>,
    /// Those of them that may go the next time.
    pub(super) busy: Vec<RunNumber>,
    /// When freeing space was last tried in vain.
    pub(super) in_vain: Option<Instant>,
    /// What takes up space beside the runs and the index, as it was seen last.
    pub(super) beside: Option<u64>,
    /// When what the index has added up was last compared with its rows.
    pub(super) confirmed: Option<Instant>,
    /// How often the index had been made anew: the numbers are those of that one.
    pub(super) renewals: u64,
}

impl Turn {
    /// Begins to evict by the index that was made anew so often.
    pub(super) fn begin(&mut self, renewals: u64) {
        for number in mem::take(&mut self.busy) {
            self.refused.remove(&number);
        }
        if mem::replace(&mut self.renewals, renewals) != renewals {
            self.refused.clear();
        }
    }

    /// Passes over a run until somebody evicts the next time.
    pub(super) fn refuse_for_now(&mut self, number: RunNumber) {
        self.refused.insert(number);
        self.busy.push(number);
    }
}

impl Default for Turn {
    fn default() -> Self {
        Self {
            trash: true,
            refused: HashSet::new(),
            busy: Vec::new(),
            in_vain: None,
            beside: None,
            confirmed: None,
            renewals: 0,
        }
    }
}

#[derive(Debug, Default)]
struct Readers {
    by_id: HashMap<JobRunId, Weak<LiveRun>>,
    /// How many there may be before those that are done are let go of.
    sweep_at: usize,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Evictions {
    /// Keeps everybody from evicting.
    pub(crate) fn none_for_now(&self) -> MutexGuard<'_, Turn> {
        lock(&self.turn)
    }

    /// What is left of a run that is just being evicted.
    pub(crate) fn going(&self, id: &JobRunId) -> Option<Tombstone> {
        lock(&self.going).get(id).cloned()
    }

    /// What is left of all of them.
    pub(super) fn all_going(&self) -> Vec<Tombstone> {
        lock(&self.going).values().cloned().collect()
    }

    /// Notes that a run is read: who reads it wants to know when it is evicted. Gives the run that others read
    /// already.
    pub(crate) fn note_reader(&self, run: Arc<LiveRun>) -> Arc<LiveRun> {
        let mut readers = lock(&self.readers);
        if let Some(known) = readers.by_id.get(&run.id).and_then(Weak::upgrade)
            && known.number == run.number
        {
            return known;
        }
        if readers.by_id.len() >= readers.sweep_at {
            readers.by_id.retain(|_, run| run.strong_count() > 0);
            readers.sweep_at = 64.max(readers.by_id.len() * 2);
        }
        readers.by_id.insert(run.id.clone(), Arc::downgrade(&run));
        run
    }

    /// Whether somebody reads a run at this moment.
    pub(crate) fn has_reader(&self, id: &JobRunId) -> bool {
        lock(&self.readers).by_id.get(id).is_some_and(|run| run.strong_count() > 0)
    }

    /// From now on nobody finds the run, and who reads it knows that it is going.
    pub(super) fn hide(&self, stone: &Tombstone) {
        lock(&self.going).insert(stone.id.clone(), stone.clone());
        self.tell_readers(&stone.id, Some(stone));
    }

    /// The run stays after all.
    pub(super) fn show(&self, id: &JobRunId) {
        lock(&self.going).remove(id);
        self.tell_readers(id, None);
    }

    fn tell_readers(&self, id: &JobRunId, stone: Option<&Tombstone>) {
        let run = lock(&self.readers).by_id.get(id).and_then(Weak::upgrade);
        if let Some(run) = run {
            run.change(|state| state.evicted = stone.cloned().map(Box::new));
        }
    }
}
