//! The members of a composite store, and how they are.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::lock;
use crate::error::LogError;
use crate::store::LogStore;

/// What a composite store expects of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberMode {
    /// Its errors are the caller's, and the caller waits for it.
    Required,
    /// It gets what it can take, and nobody waits for it.
    BestEffort,
}

/// One of the stores behind a [`CompositeLogStore`](crate::CompositeLogStore).
#[derive(Clone)]
pub struct Member {
    /// The name that errors and health go by.
    pub name: String,
    /// What is expected of it.
    pub mode: MemberMode,
    /// The store.
    pub store: Arc<dyn LogStore>,
}

impl Member {
    /// A member whose errors are the caller's.
    #[must_use]
    pub fn required(name: impl Into<String>, store: Arc<dyn LogStore>) -> Self {
        Self { name: name.into(), mode: MemberMode::Required, store }
    }

    /// A member that gets what it can take.
    #[must_use]
    pub fn best_effort(name: impl Into<String>, store: Arc<dyn LogStore>) -> Self {
        Self { name: name.into(), mode: MemberMode::BestEffort, store }
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("name", &self.name).field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// How a member is; everything is counted since the composite store was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberHealth {
    /// Its name.
    pub name: String,
    /// What is expected of it.
    pub mode: MemberMode,
    /// Calls that failed, those not counted whose answer was about the run (not found, finished and the like).
    pub failures: u64,
    /// Bytes that a best-effort member was not given.
    pub dropped_bytes: u64,
    /// Appends that a best-effort member was not given.
    pub dropped_appends: u64,
    /// Bytes that wait for a best-effort member.
    pub queued_bytes: usize,
    /// The last failure, in words.
    pub last_error: Option<String>,
}

/// A required member.
pub(super) struct Required {
    pub(super) store: Arc<dyn LogStore>,
    vitals: Vitals,
}

impl Required {
    pub(super) fn new(member: Member) -> Self {
        Self { store: member.store, vitals: Vitals::new(member.name, MemberMode::Required) }
    }

    pub(super) fn vitals(&self) -> &Vitals {
        &self.vitals
    }

    /// See [`Vitals::failed`].
    pub(super) fn failed(&self, index: usize, doing: &str, error: LogError) -> LogError {
        self.vitals.failed(index, doing, error)
    }

    pub(super) fn health(&self) -> MemberHealth {
        self.vitals.health(0)
    }
}

/// What is counted of a member.
pub(super) struct Vitals {
    name: String,
    mode: MemberMode,
    failures: AtomicU64,
    dropped_bytes: AtomicU64,
    dropped_appends: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Vitals {
    pub(super) fn new(name: String, mode: MemberMode) -> Self {
        Self {
            name,
            mode,
            failures: AtomicU64::new(0),
            dropped_bytes: AtomicU64::new(0),
            dropped_appends: AtomicU64::new(0),
            last_error: Mutex::default(),
        }
    }

    /// Counts a failure and gives the error as the caller is to see it: with the member's name, unless it is about
    /// the run itself and the member is the one that all answers come from, the first.
    pub(super) fn failed(&self, index: usize, doing: &str, error: LogError) -> LogError {
        let plain = match error {
            LogError::NotFound { .. } | LogError::Evicted(_) => true,
            _ => index == 0 && error.is_about_the_run(),
        };
        if plain {
            return error;
        }
        self.count(&error);
        let kind = match self.mode {
            MemberMode::Required => "required",
            MemberMode::BestEffort => "best-effort",
        };
        LogError::Inner { what: format!("{doing} in {kind} store {:?}", self.name), source: Box::new(error) }
    }

    pub(super) fn count(&self, error: &LogError) {
        self.count_text(error.to_string());
    }

    pub(super) fn count_text(&self, error: String) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        *lock(&self.last_error) = Some(error);
    }

    pub(super) fn count_dropped(&self, bytes: u64, appends: u64) {
        self.dropped_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.dropped_appends.fetch_add(appends, Ordering::Relaxed);
    }

    pub(super) fn health(&self, queued_bytes: usize) -> MemberHealth {
        MemberHealth {
            name: self.name.clone(),
            mode: self.mode,
            failures: self.failures.load(Ordering::Relaxed),
            dropped_bytes: self.dropped_bytes.load(Ordering::Relaxed),
            dropped_appends: self.dropped_appends.load(Ordering::Relaxed),
            queued_bytes,
            last_error: lock(&self.last_error).clone(),
        }
    }
}
