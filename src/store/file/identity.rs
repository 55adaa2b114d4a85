//! Which run is in a folder: the one that a record of the index tells of, or another. Whoever removes the folder of a
//! run that is over may use its id again, while no service runs or behind the back of one.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

use crate::error::LogError;
use crate::index::RunNumber;
use crate::index::codec::RunRecord;
use crate::layout::{FolderStamp, RunFolder};
use crate::line::UnixMicros;
use crate::logfile::ReadFile;
use crate::run::{JobMetadata, JobRunId};
use crate::store::file::tracker::{Began, began};

/// Runs of which it is kept that their folders were looked into.
const MOST_SEEN: usize = 4096;

/// What is in the folder that a record leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// The run that it tells of, as far as can be told.
    ItsRun,
    /// Another that got its id since.
    AnotherRun,
    /// There is no such folder.
    Nobody,
}

/// Folders that were looked into and have not changed since, so that it costs little to be sure again.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    seen: Mutex<HashMap<JobRunId, (RunNumber, FolderStamp)>>,
    /// The lowest number of those runs that were looked at in their turn; 0 when all were.
    reached: AtomicU64,
}

impl Looks {
    /// Below which number are the runs whose turn it is to be looked at; once all were, it is that of the newest again.
    pub(crate) fn turn_below(&self) -> RunNumber {
        match self.reached.load(Ordering::Relaxed) {
            0 => RunNumber::MAX,
            reached => reached,
        }
    }

    /// Notes down to which number runs were looked at in their turn; 0 for all.
    pub(crate) fn set_reached(&self, reached: RunNumber) {
        self.reached.store(reached, Ordering::Relaxed);
    }

    /// What is in the folder that the record under a number leads to.
    ///
    /// # Errors
    ///
    /// What the system said when it could not tell.
    pub(crate) fn holder(
        &self,
        folder: &RunFolder,
        number: RunNumber,
        record: &RunRecord,
    ) -> Result<Holder, LogError> {
        let Some(stamp) = folder.stamp()? else { return Ok(Holder::Nobody) };
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let id = record.run.id();
        if seen().get(id) == Some(&(number, stamp)) {
            return Ok(Holder::ItsRun);
        }
        if !is_of(folder, record) {
            return Ok(Holder::AnotherRun);
        }
        let mut seen = seen();
        if seen.len() >= MOST_SEEN {
            seen.clear();
        }
        seen.insert(id.clone(), (number, stamp));
        Ok(Holder::ItsRun)
    }
}

/// Whether the run in a folder is the one that a record tells of. What can't be read tells nothing: then it is, unless
/// the folder was made after that run had ended.
pub(crate) fn is_of(folder: &RunFolder, record: &RunRecord) -> bool {
    is_surely_of(folder, record).unwrap_or(true)
}

/// The same for who must not go wrong.
///
/// # Errors
///
/// What the system said when it could not tell.
pub(crate) fn is_surely_of(folder: &RunFolder, record: &RunRecord) -> Result<bool, LogError> {
    let written = known(folder.read_metadata())?.flatten();
    if record.has_journal {
        is_of_journaled(folder, record, written)
    } else {
        is_of_plain(folder, record, written)
    }
}

/// What was read; `None` if there is something that is no such file, or is damaged: looking again would not help.
fn known<T>(read: Result<T, LogError>) -> Result<Option<T>, LogError> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(LogError::Io { source, .. }) if is_no_such_file(&source) => Ok(None),
        Err(error @ LogError::Io { .. }) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Whether an error says that what is at a path is no file: a folder, a link or a pipe.
fn is_no_such_file(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, None | Some(Errno::LOOP | Errno::NXIO))
}

fn is_of_journaled(
    folder: &RunFolder,
    record: &RunRecord,
    written: Option<JobMetadata>,
) -> Result<bool, LogError> {
    // It is small, and plain when the rest is compressed.
    if written.as_ref().is_some_and(|written| written.started_at == record.run.started_at) {
        return Ok(true);
    }
    Ok(match known(began(folder, record.run.id()))? {
        Some(Began::At(time)) => time == record.run.started_at,
        Some(Began::Unknown) => written.is_none() && !is_newer(folder, record),
        None => true,
    })
}

fn is_of_plain(
    folder: &RunFolder,
    record: &RunRecord,
    written: Option<JobMetadata>,
) -> Result<bool, LogError> {
    if !record.run.state.is_over() {
        return Ok(true);
    }
    if matches!(known(began(folder, record.run.id()))?, Some(Began::At(_))) {
        return Ok(false);
    }
    // Where nothing else tells when a run began, it is when its folder was made.
    let is_not_later = folder.made() == Some(record.run.started_at) || !is_newer(folder, record);
    let Some(written) = written else { return Ok(is_not_later) };
    let is_known = |time: UnixMicros| time != UnixMicros::default();
    let (was, is) = (record.run.state, written.state);
    let told = is.ended().filter(|&ended| is_known(ended));
    let ended_then = told.is_none_or(|ended| was.ended() == Some(ended));
    let began_then = match is_known(written.started_at) {
        true => written.started_at == record.run.started_at,
        // A document need not tell that; a copy of a folder is made after its run ended.
        false => told.is_some() || is_not_later,
    };
    Ok(began_then && ended_then && (!is.is_over() || was.exit() == is.exit()))
}

/// Whether a folder was made after the run of a record had ended.
fn is_newer(folder: &RunFolder, record: &RunRecord) -> bool {
    record.run.state.ended().is_some_and(|ended| folder.made().is_some_and(|made| made > ended))
}

/// Whether a writer that lives has the journal in a folder locked. No writer has what is no file.
///
/// # Errors
///
/// What the system said when it could not tell.
pub(crate) fn is_being_written(folder: &RunFolder) -> Result<bool, LogError> {
    match known(ReadFile::open_if_there(&folder.journal()))?.flatten() {
        Some(journal) => journal.is_locked(),
        None => Ok(false),
    }
}
