//! What a run's folder tells without its journal: by `metadata.json`, by the times of its files, by silence.

use std::fs;
use std::time::{Duration, SystemTime};

use crate::error::LogError;
use crate::layout::{RunFolder, is_news, metadata_of};
use crate::line::UnixMicros;
use crate::logfile::ReadFile;
use crate::run::{JobMetadata, JobRunId, RunSpec, RunState};
use crate::store::file::copied;

/// A folder without a journal and without `metadata.json` counts as a run that goes on for as long as its logs
/// grew within this time.
const QUIET: Duration = Duration::from_secs(60 * 60);

/// The end of a run without a journal: `metadata.json` by another tool, or long silence.
pub(super) fn plain_end(folder: &RunFolder, run: &JobMetadata) -> Result<Option<Box<JobMetadata>>, LogError> {
    if let Some(run) = written_end(folder, run.id(), run.started_at)? {
        let [stdout, stderr] = copied::lengths(folder)?;
        let is_whole = run.stdout.bytes <= stdout && run.stderr.bytes <= stderr;
        return Ok((is_whole || !copied::is_changing(folder)).then(|| Box::new(run)));
    }
    let touched = last_touched(folder);
    let is_quiet = touched.elapsed().is_ok_and(|silence| silence > QUIET);
    // A folder that is gone says nothing of how its run ended.
    if !(is_quiet || journal_is_abandoned(folder)?) || !folder.is_there()? {
        return Ok(None);
    }
    Ok(Some(Box::new(JobMetadata { state: RunState::Lost { ended: touched.into() }, ..run.clone() })))
}

/// A run as its `metadata.json` says that it ended, if it says so.
pub(crate) fn written_end(
    folder: &RunFolder,
    id: &JobRunId,
    started_at: UnixMicros,
) -> Result<Option<JobMetadata>, LogError> {
    match folder.read_metadata_with(&|| (started_at, last_touched(folder).into())) {
        Ok(Some(mut run)) if run.state.is_over() => {
            // A folder that was copied or renamed still has the name of the other in it.
            run.spec.id = id.clone();
            Ok(Some(run))
        }
        Ok(_) => Ok(None),
        Err(error @ LogError::Corrupt { .. }) => {
            say_once(folder, &error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether there is a journal that tells nothing, and nobody who writes it: of a run that had just begun when the
/// machine stopped.
fn journal_is_abandoned(folder: &RunFolder) -> Result<bool, LogError> {
    let journal = ReadFile::open_if_there(&folder.journal())?;
    let is_free = journal.map_or(Ok(false), |journal| journal.is_locked().map(|locked| !locked))?;
    Ok(is_free && !copied::is_changing(folder))
}

/// What is known of a run whose folder has no journal.
pub(crate) fn plain_metadata(folder: &RunFolder, id: &JobRunId) -> Result<JobMetadata, LogError> {
    let started = created(folder)?;
    match folder.read_metadata_with(&|| (started, last_touched(folder).into())) {
        Ok(Some(run)) if run.id() == id => return Ok(run),
        Ok(_) => {}
        Err(error @ LogError::Corrupt { .. }) => say_once(folder, &error),
        Err(error) => return Err(error),
    }
    Ok(JobMetadata::started(RunSpec { created_at: started, ..RunSpec::new(id.clone()) }, started))
}

/// A document that can't be read may be half written, by a tool that does not rename.
fn say_once(folder: &RunFolder, error: &LogError) {
    if is_news(folder.path(), &error.to_string()) {
        tracing::warn!(%error, "until it can be read the run counts as one that goes on");
    }
}

fn created(folder: &RunFolder) -> Result<UnixMicros, LogError> {
    let path = folder.path();
    let created = fs::metadata(path).and_then(|folder| folder.created().or_else(|_| folder.modified()));
    Ok(created.map_err(LogError::io("looking at", path))?.into())
}

/// When something was last written to a run's logs or journal.
pub(crate) fn last_touched(folder: &RunFolder) -> SystemTime {
    let own = fs::metadata(folder.path());
    let files = folder.parts().map(|part| metadata_of(&part)).into_iter().chain([own]);
    let touched = files.filter_map(|file| file.and_then(|file| file.modified()).ok());
    touched.max().unwrap_or(SystemTime::UNIX_EPOCH)
}
