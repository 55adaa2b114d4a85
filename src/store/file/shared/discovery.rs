//! Whether every folder is known that was there when the store was opened, or when the index was made anew.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What is known of how far the folders were gone through.
#[derive(Debug)]
pub(crate) struct Discovery {
    state: Mutex<State>,
    done: Condvar,
    /// How often the index was made anew.
    renewals: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// Whether every folder is known.
    is_done: bool,
    /// Whether the index was made anew and the runs are to be numbered again.
    is_renewed: bool,
}

impl Discovery {
    pub(super) fn new(is_done: bool) -> Self {
        let state = Mutex::new(State { is_done, is_renewed: false });
        Self { state, done: Condvar::new(), renewals: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that all folders are known now.
    pub(crate) fn set_done(&self) {
        self.state().is_done = true;
        self.done.notify_all();
    }

    /// Says that all folders are known now, unless the index was made anew in the meantime.
    pub(crate) fn set_done_unless_renewed(&self) -> bool {
        let mut state = self.state();
        state.is_done = !state.is_renewed;
        self.done.notify_all();
        state.is_done
    }

    pub(crate) fn is_done(&self) -> bool {
        self.state().is_done
    }

    /// Waits until all folders are known.
    pub(crate) fn wait_until_done(&self) {
        let mut state = self.state();
        while !state.is_done {
            state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that the index was made anew: every folder has to be taken up again.
    pub(crate) fn set_renewed(&self) {
        let mut state = self.state();
        (state.is_done, state.is_renewed) = (false, true);
        self.renewals.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether the index was made anew since this was last asked.
    pub(crate) fn take_renewed(&self) -> bool {
        std::mem::take(&mut self.state().is_renewed)
    }

    /// How often the index was made anew.
    pub(crate) fn renewals(&self) -> u64 {
        self.renewals.load(Ordering::Acquire)
    }
}
