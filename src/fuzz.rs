//! For the tests that give a parser bytes which are almost right: `fuzz.rs` beside each.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

#[path = "../tests/it/support/mutate.rs"]
mod mutate;

pub(crate) use mutate::*;

/// Runs `read` on an input, and checks that the memory it takes is bounded by the input's length: a document takes
/// many times its text, since each `[]` or `0` of a list is a value of 32 bytes, and lists double when they grow.
#[track_caller]
pub(crate) fn in_bounded_memory<T>(input: &[u8], read: impl FnOnce(&[u8]) -> T) -> T {
    in_memory_of(16 * 1024 + 128 * input.len(), || read(input))
}

/// Runs `read`, and checks that it takes at most so many bytes of memory at once.
#[track_caller]
pub(crate) fn in_memory_of<T>(allowed: usize, read: impl FnOnce() -> T) -> T {
    let mut outcome = None;
    // A panic would leave the count open.
    let measured = || outcome = Some(catch_unwind(AssertUnwindSafe(read)));
    let taken = allocation_counter::measure(measured).bytes_max;
    let value = outcome.expect("it was run").unwrap_or_else(|panic| resume_unwind(panic));
    assert!(taken <= allowed as u64, "{taken} bytes of memory where {allowed} are allowed");
    value
}

/// A file of the fixtures.
pub(crate) fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
