//! The HTTP service over real connections.

mod api;
mod frames;
mod raw;
mod resume;
mod server;

use databuild_logs::{Exit, JobRunId, LogStore, MemoryLogStore, Outcome, RunEnd, Stream};

pub(crate) fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

pub(crate) fn exited(code: i32) -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(code)))
}

/// A store with the run `r` that printed this, and has ended with 0.
fn finished(stdout: &[u8]) -> MemoryLogStore {
    let store = running(stdout);
    store.finish(&id("r"), exited(0)).unwrap();
    store
}

/// The same with the run still going on.
fn running(stdout: &[u8]) -> MemoryLogStore {
    let store = MemoryLogStore::new();
    store.append(&id("r"), Stream::Stdout, stdout).unwrap();
    store
}

/// `1\n2\n…` up to this number.
fn numbered(lines: u64) -> Vec<u8> {
    (1..=lines).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}
