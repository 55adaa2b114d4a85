//! What several tests need.

pub(crate) mod address;
pub(crate) mod browser;
pub(crate) mod cli;
pub(crate) mod disk;
pub(crate) mod faulty;
pub(crate) mod http;
pub(crate) mod mutate;
pub(crate) mod sse;
pub(crate) mod stores;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Copies a folder with everything in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Where the first record of a journal is over, which ends with its text; behind it all are numbers.
pub(crate) fn end_of_start(journal: &[u8]) -> Option<usize> {
    let end = journal.windows(2).position(|pair| pair == b"}}")?;
    Some(end + 2)
}

/// Waits until something is so; panics when it has not become so after a time that no healthy machine needs.
#[track_caller]
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::yield_now();
    }
}
