//! Who keeps a store open: its handles do, and its threads only borrow it.
//!
//! A thread that has just borrowed the store may be the last to let go of it, and closes the index then. So whoever
//! drops the last handle waits for the threads: the next one who opens the folder finds it free.

use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use crate::store::file::shared::Shared;

/// Keeps a store open.
pub(crate) struct Handle {
    shared: Arc<Shared>,
    /// Dropped behind the reference above.
    _last: WaitForBorrowers,
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>) -> Arc<Self> {
        let borrowers = Arc::clone(&shared.borrowers);
        Arc::new(Self { shared, _last: WaitForBorrowers(borrowers) })
    }
}

impl Deref for Handle {
    type Target = Arc<Shared>;

    fn deref(&self) -> &Arc<Shared> {
        &self.shared
    }
}

struct WaitForBorrowers(Arc<Borrowers>);

impl Drop for WaitForBorrowers {
    fn drop(&mut self) {
        let mut count = self.0.count();
        while *count > 0 {
            count = self.0.one_less.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// How many threads have borrowed a store at this moment. Borrowing never waits: a thread that is waited for may wait
/// for another one.
#[derive(Debug, Default)]
pub(crate) struct Borrowers {
    count: Mutex<usize>,
    one_less: Condvar,
}

impl Borrowers {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a thread of a store gets at it.
#[derive(Clone)]
pub(crate) struct Lent {
    shared: Weak<Shared>,
    borrowers: Arc<Borrowers>,
}

impl Lent {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::downgrade(shared), borrowers: Arc::clone(&shared.borrowers) }
    }

    /// Does something with the store; `None` if it is gone.
    pub(crate) fn with<T>(&self, action: impl FnOnce(&Arc<Shared>) -> T) -> Option<T> {
        let _borrowed = Borrowed::begin(&self.borrowers);
        let shared = self.shared.upgrade()?;
        Some(action(&shared))
    }
}

/// Dropped when the reference that was borrowed is.
struct Borrowed<'a>(&'a Borrowers);

impl<'a> Borrowed<'a> {
    fn begin(borrowers: &'a Borrowers) -> Self {
        *borrowers.count() += 1;
        Self(borrowers)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.one_less.notify_all();
    }
}
