//! Not a bench: makes the workload for those who work on files, and a job's output at a given pace.
//!
//! `cargo bench --bench workload -- write PATH LINES`, or `… -- print LINES RATE BURST`: that many lines a second, so
//! many of them a write.

mod support;

use std::fs::File;
use std::io;

use support::{drip, workload};

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["write", path, lines] => workload::write(number(lines)?, &mut File::create(path)?),
        ["print", lines, rate, burst] => drip::print_paced(number(lines)?, number(rate)?, number(burst)?),
        _ => Ok(()),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is not a number")))
}
