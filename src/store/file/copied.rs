//! Folders that somebody is just copying to where runs are. Until a copy is whole its run goes on, and nothing is
//! written into its folder: what copies would find files there, or write over them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use crate::error::LogError;
use crate::layout::{RunFolder, metadata_of};
use crate::line::{Stream, UnixMicros};
use crate::logfile::length;

/// How long nothing may change in a folder before nobody copies to it any more.
const QUIET: Duration = Duration::from_secs(5);
/// A journal is made when its run starts. One that was made later than this is a copy: a machine that is very busy may
/// take some time for it.
const MADE_WITHIN: Duration = Duration::from_millis(500);

/// Whether the journal of a run that started at this time is a copy of the one that its writer made.
pub(crate) fn is_copy(folder: &RunFolder, started_at: UnixMicros) -> bool {
    let made = metadata_of(&folder.journal()).and_then(|file| file.created());
    made.is_ok_and(|made| is_within(MADE_WITHIN, started_at, made.into()).is_some_and(|within| !within))
}

/// Whether something in a run's folder changed a moment ago.
pub(crate) fn is_changing(folder: &RunFolder) -> bool {
    let [stdout, stderr] = Stream::BOTH.map(|stream| folder.log(stream));
    let files = [stdout, stderr, folder.journal(), folder.metadata(), folder.path().to_owned()];
    // What was copied can have the times of the original; when it got them is always told.
    let changed = files.iter().filter_map(|path| metadata_of(path).ok()).map(|file| {
        let micros = file.ctime() * 1_000_000 + file.ctime_nsec() / 1_000;
        UnixMicros(micros.try_into().unwrap_or(0))
    });
    changed.max().is_some_and(is_new)
}

/// Whether a run's folder was made a moment ago.
pub(crate) fn is_made_just_now(folder: &RunFolder) -> bool {
    let made = fs::metadata(folder.path()).and_then(|folder| folder.created());
    made.is_ok_and(|made| is_new(made.into()))
}

fn is_new(time: UnixMicros) -> bool {
    is_within(QUIET, time, UnixMicros::now()).unwrap_or(true)
}

/// Whether no more than this lies between two times; `None` if the later one is the earlier.
fn is_within(most: Duration, from: UnixMicros, to: UnixMicros) -> Option<bool> {
    to.0.checked_sub(from.0).map(|micros| u128::from(micros) <= most.as_micros())
}

/// How many bytes of text each log has.
///
/// # Errors
///
/// What the system said when it could not tell.
pub(crate) fn lengths(folder: &RunFolder) -> Result<[u64; 2], LogError> {
    let [stdout, stderr] = Stream::BOTH.map(|stream| length(&folder.log(stream)));
    Ok([stdout?, stderr?])
}
