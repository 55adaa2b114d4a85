//! Not a bench: makes the workload for those who work on files, and a job's output at a given pace.
//!
//! `cargo bench --bench workload -- write PATH LINES`, or `… -- print LINES RATE BURST`: that many lines a second, so
//! many of them a write. `… -- places FOLDER COUNT` makes the index of a log folder as large as if the log of each run
//! had so many places.

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
        ["places", folder, count] => {
            databuild_logs::add_places(folder.as_ref(), number(count)?).map_err(io::Error::other)
        }
        _ => Ok(()),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is not a number")))
}
