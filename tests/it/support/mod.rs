//! What several tests need.

pub(crate) mod address;
pub(crate) mod browser;
pub(crate) mod cli;
pub(crate) mod disk;
pub(crate) mod faulty;
pub(crate) mod http;
pub(crate) mod sse;
pub(crate) mod stores;

use std::time::{Duration, Instant};

/// Waits until something is so; panics when it has not become so after a time that no healthy machine needs.
#[track_caller]
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::yield_now();
    }
}
