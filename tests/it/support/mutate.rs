//! Bytes that are almost right, for what has to read them. Unit tests use this file too, through `src/fuzz.rs`.
//!
//! All targets together take a few seconds; `README.md` says how they go on for a night. What fails is made smaller, shown,
//! and comes again with the `DATABUILD_TEST_FUZZ_SEED` that is printed with it.

use std::collections::hash_map::RandomState;
use std::fmt::Debug;
use std::hash::BuildHasher;
use std::str::FromStr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// How many inputs a target is given. One whose inputs are slow takes a part of them.
pub(crate) fn rounds() -> u32 {
    number("DATABUILD_TEST_FUZZ_ROUNDS").unwrap_or(2_000)
}

fn number<T: FromStr<Err: Debug>>(variable: &str) -> Option<T> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable} is {text:?}: {error:?}")))
}

/// Gives `check` so many inputs; it panics at what is wrong.
#[track_caller]
pub(crate) fn fuzz<T: Debug>(rounds: u32, inputs: impl Strategy<Value = T>, check: impl Fn(T)) {
    let seed = number("DATABUILD_TEST_FUZZ_SEED").unwrap_or_else(|| RandomState::new().hash_one(0));
    let config = Config {
        cases: rounds.max(1),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    };
    let found = TestRunner::new(config).run(&inputs, |input| {
        check(input);
        Ok(())
    });
    if let Err(found) = found {
        panic!("again with DATABUILD_TEST_FUZZ_SEED={seed} DATABUILD_TEST_FUZZ_ROUNDS={rounds}: {found}");
    }
}

/// One of the samples with a few changes, or bytes that have nothing to do with them. `words` are what means
/// something to the reader: they are put in between.
pub(crate) fn mutated(samples: Vec<Vec<u8>>, words: &[&str]) -> impl Strategy<Value = Vec<u8>> + use<> {
    let words: Vec<Vec<u8>> = words.iter().map(|word| word.as_bytes().to_vec()).collect();
    let edits = vec(edit(samples.clone(), words), 0..6);
    prop_oneof![
        9 => (select(samples), edits).prop_map(|(mut bytes, edits)| {
            edits.iter().for_each(|edit| edit.apply(&mut bytes));
            bytes
        }),
        1 => vec(any::<u8>(), 0..300),
    ]
}

/// A change.
#[derive(Clone, Debug)]
enum Edit {
    Flip { at: Index, bit: u8 },
    Overwrite { at: Index, with: Vec<u8> },
    Insert { at: Index, piece: Vec<u8> },
    Cut { from: Index, to: Index },
    Repeat { from: Index, to: Index, at: Index },
    End { at: Index },
}

fn edit(samples: Vec<Vec<u8>>, words: Vec<Vec<u8>>) -> impl Strategy<Value = Edit> {
    let place = any::<Index>;
    let numbers = select(vec![[0; 9].to_vec(), [0xff; 9].to_vec(), [0x80; 9].to_vec(), vec![0x7f, 0xff]]);
    let word = if words.is_empty() { numbers.clone().boxed() } else { select(words).boxed() };
    let of_another = (select(samples), place(), place())
        .prop_map(|(sample, from, to)| sample[range(&sample, from, to)].to_vec());
    let piece = prop_oneof![vec(any::<u8>(), 1..9), numbers, word, of_another];
    prop_oneof![
        (place(), 0..8_u8).prop_map(|(at, bit)| Edit::Flip { at, bit }),
        (place(), piece.clone()).prop_map(|(at, with)| Edit::Overwrite { at, with }),
        (place(), piece).prop_map(|(at, piece)| Edit::Insert { at, piece }),
        (place(), place()).prop_map(|(from, to)| Edit::Cut { from, to }),
        (place(), place(), place()).prop_map(|(from, to, at)| Edit::Repeat { from, to, at }),
        place().prop_map(|at| Edit::End { at }),
    ]
}

/// A short range more often than a long one.
fn range(bytes: &[u8], from: Index, to: Index) -> std::ops::Range<usize> {
    let from = from.index(bytes.len() + 1);
    let longest = bytes.len() - from;
    let length = to.index(longest + 1);
    from..from + if length.is_multiple_of(4) { length } else { length % 16 }.min(longest)
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let place = |at: &Index| at.index(bytes.len() + 1);
        match self {
            Self::Flip { .. } if bytes.is_empty() => {}
            Self::Flip { at, bit } => {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            Self::Overwrite { at, with } => {
                let at = place(at);
                let end = bytes.len().min(at + with.len());
                bytes.splice(at..end, with.iter().copied());
            }
            Self::Insert { at, piece } => {
                let at = place(at);
                bytes.splice(at..at, piece.iter().copied());
            }
            Self::Cut { from, to } => drop(bytes.drain(range(bytes, *from, *to))),
            Self::Repeat { from, to, at } => {
                let piece = bytes[range(bytes, *from, *to)].to_vec();
                let at = place(at);
                bytes.splice(at..at, piece);
            }
            Self::End { at } => bytes.truncate(place(at)),
        }
    }
}
