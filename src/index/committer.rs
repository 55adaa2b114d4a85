//! The one thread that writes the index while a store is open.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How soon what is waiting has to be in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// Within a second.
    Soon,
    /// Within 50 ms: a run has started or ended, or many rows wait.
    Now,
}

impl Urgency {
    const fn delay(self) -> Duration {
        match self {
            Self::Soon => Duration::from_secs(1),
            Self::Now => Duration::from_millis(50),
        }
    }
}

/// How soon a commit that failed is tried again: at first, and at the longest. In between it doubles each time.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(15);

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Committed {
    /// Nothing that waited is left.
    Done,
    /// The disk refused; what waits is kept, and is to be tried again.
    Failed,
}

/// Groups what changed and commits it. Nobody waits for it.
///
/// What is to be committed stays with those who have it; they only say that there is something, so a disk that
/// stalls holds up nothing and costs no memory.
#[derive(Debug)]
pub(crate) struct Committer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    /// When the next commit is due; `None` while nothing waits.
    due: Option<Instant>,
    /// Not earlier than this, however urgent: the last commit failed.
    not_before: Option<Instant>,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Committer {
    /// Starts the thread; `commit` gathers what waits and writes it.
    pub(crate) fn spawn(commit: impl FnMut() -> Committed + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread =
            thread::Builder::new().name("committer".into()).spawn(move || run(&of_thread, commit))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Says that something waits to be committed.
    pub(crate) fn nudge(&self, urgency: Urgency) {
        let mut wanted = self.shared.lock();
        let due = Instant::now() + urgency.delay();
        let due = wanted.not_before.map_or(due, |earliest| due.max(earliest));
        if wanted.due.is_none_or(|earlier| due < earlier) {
            wanted.due = Some(due);
            self.shared.changed.notify_all();
        }
    }

    /// Commits what waits and ends the thread.
    pub(crate) fn stop(&self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The thread itself may hold the last reference to the store, and can't wait for its own end.
        let thread = thread.filter(|thread| thread.thread().id() != thread::current().id());
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that writes the index panicked");
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(shared: &Shared, mut commit: impl FnMut() -> Committed) {
    let mut retry = FIRST_RETRY;
    loop {
        let stop = wait_until_due(shared);
        let committed = commit();
        if stop {
            return;
        }
        let mut wanted = shared.lock();
        match committed {
            Committed::Done => (wanted.not_before, retry) = (None, FIRST_RETRY),
            Committed::Failed => {
                let again = Instant::now() + retry;
                wanted.not_before = Some(again);
                wanted.due = Some(wanted.due.map_or(again, |due| due.max(again)));
                retry = (retry * 2).min(LAST_RETRY);
            }
        }
    }
}

/// Waits for the next commit to be due; gives whether it is the last.
fn wait_until_due(shared: &Shared) -> bool {
    let mut wanted = shared.lock();
    loop {
        let now = Instant::now();
        let left = wanted.due.map(|due| due.saturating_duration_since(now));
        if wanted.stop || left.is_some_and(|left| left.is_zero()) {
            wanted.due = None;
            return wanted.stop;
        }
        wanted = match left {
            Some(left) => shared.changed.wait_timeout(wanted, left).unwrap_or_else(PoisonError::into_inner).0,
            None => shared.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn what_waits_is_committed_soon_and_before_the_thread_ends() {
        let (value, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let committer = {
            let (value, seen) = (Arc::clone(&value), Arc::clone(&seen));
            Committer::spawn(move || {
                seen.store(value.load(Ordering::SeqCst), Ordering::SeqCst);
                Committed::Done
            })
            .unwrap()
        };
        value.store(1, Ordering::SeqCst);
        committer.nudge(Urgency::Soon);
        committer.nudge(Urgency::Now);
        while seen.load(Ordering::SeqCst) != 1 {
            thread::yield_now();
        }
        value.store(2, Ordering::SeqCst);
        committer.nudge(Urgency::Soon);
        committer.stop();
        assert_eq!(seen.load(Ordering::SeqCst), 2);
    }
    #[test]
    fn a_commit_that_fails_is_tried_again_by_itself_but_not_without_a_pause() {
        let tries = Arc::new(Mutex::new(Vec::new()));
        let committer = {
            let tries = Arc::clone(&tries);
            Committer::spawn(move || {
                let mut tries = tries.lock().unwrap();
                tries.push(Instant::now());
                if tries.len() < 3 { Committed::Failed } else { Committed::Done }
            })
            .unwrap()
        };
        committer.nudge(Urgency::Now);
        while tries.lock().unwrap().len() < 3 {
            // However urgent everything is.
            committer.nudge(Urgency::Now);
            thread::sleep(Duration::from_millis(1));
        }
        let tries = tries.lock().unwrap().clone();
        assert!(tries[1] - tries[0] >= FIRST_RETRY && tries[2] - tries[1] >= 2 * FIRST_RETRY, "{tries:?}");
    }
}
