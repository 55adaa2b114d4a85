//! For the tests that give a parser bytes which are almost right: `fuzz.rs` beside each.

#[path = "../tests/it/support/mutate.rs"]
mod mutate;

pub(crate) use mutate::*;

/// The most bytes of memory that reading `bytes` of them may take at once. A document takes many times its text: each
/// `[]` or `0` of a list is a value of 32 bytes, and lists double when they grow.
const fn allowance(bytes: usize) -> u64 {
    16 * 1024 + 128 * bytes as u64
}

/// Runs `read` on an input, and checks that the memory it takes is bounded by the input's length.
#[track_caller]
pub(crate) fn in_bounded_memory<T>(input: &[u8], read: impl FnOnce(&[u8]) -> T) -> T {
    let mut value = None;
    let taken = allocation_counter::measure(|| value = Some(read(input))).bytes_max;
    let allowed = allowance(input.len());
    assert!(taken <= allowed, "{taken} bytes of memory for {} bytes", input.len());
    value.expect("it was run")
}
