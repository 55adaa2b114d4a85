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

/// Groups what changed and commits it. Nobody waits for it but [`flush`](Self::flush).
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
    /// Commits begun, and commits done.
    begun: u64,
    done: u64,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Committer {
    /// Starts the thread; `commit` gathers what waits and writes it.
    pub(crate) fn spawn(commit: impl FnMut() + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread =
            thread::Builder::new().name("committer".into()).spawn(move || run(&of_thread, commit))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Says that something waits to be committed.
    pub(crate) fn nudge(&self, urgency: Urgency) {
        let due = Instant::now() + urgency.delay();
        let mut wanted = self.shared.lock();
        if wanted.due.is_none_or(|earlier| due < earlier) {
            wanted.due = Some(due);
            self.shared.changed.notify_all();
        }
    }

    /// Commits now and waits until that is done.
    pub(crate) fn flush(&self) {
        let mut wanted = self.shared.lock();
        let ours = wanted.begun + 1;
        wanted.due = Some(Instant::now());
        self.shared.changed.notify_all();
        while wanted.done < ours && !wanted.stop {
            wanted = self.shared.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
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

fn run(shared: &Shared, mut commit: impl FnMut()) {
    loop {
        let stop = wait_until_due(shared);
        commit();
        let mut wanted = shared.lock();
        wanted.done = wanted.begun;
        shared.changed.notify_all();
        if stop {
            return;
        }
    }
}

/// Waits for the next commit to be due and marks it as begun; gives whether it is the last.
fn wait_until_due(shared: &Shared) -> bool {
    let mut wanted = shared.lock();
    loop {
        let now = Instant::now();
        let left = wanted.due.map(|due| due.saturating_duration_since(now));
        if wanted.stop || left.is_some_and(|left| left.is_zero()) {
            wanted.due = None;
            wanted.begun += 1;
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
    fn a_flush_waits_for_a_commit_that_began_after_it() {
        let value = Arc::new(AtomicU64::new(0));
        let seen = Arc::new(AtomicU64::new(0));
        let committer = {
            let (value, seen) = (Arc::clone(&value), Arc::clone(&seen));
            Committer::spawn(move || seen.store(value.load(Ordering::SeqCst), Ordering::SeqCst)).unwrap()
        };
        for round in 1..100 {
            value.store(round, Ordering::SeqCst);
            committer.flush();
            assert!(seen.load(Ordering::SeqCst) >= round);
        }
        value.store(1000, Ordering::SeqCst);
        committer.nudge(Urgency::Soon);
        committer.stop();
        assert_eq!(seen.load(Ordering::SeqCst), 1000, "what waits is committed before the thread ends");
    }
}
