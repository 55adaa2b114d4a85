//! The files of a run that is being written.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::LogError;
use crate::journal::JournalWriter;
use crate::layout::{FileId, RunFolder, file_at};
use crate::line::Stream;
use crate::logfile::{AppendFile, Changed};
use crate::run::JobMetadata;
use crate::store::file::FileStoreOptions;
use crate::store::file::space::Floor;

/// Both logs and the journal.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) logs: [AppendFile; 2],
    pub(super) journal: JournalWriter,
    pub(super) floor: Floor,
    /// The run's folder, so that another at its path is told from it.
    folder: Option<FileId>,
    /// Whether the end of the run waits for the disk.
    pub(super) syncs: bool,
    /// How far the logs and the journal were when they were last synced while the run went on.
    pub(super) synced: [u64; 3],
    /// Whether the journal has the run's end.
    ended: bool,
}

impl Files {
    pub(super) fn new(logs: [AppendFile; 2], journal: JournalWriter, options: &FileStoreOptions) -> Self {
        let floor = Floor::new(options.min_free_bytes);
        let folder = journal.path().parent().and_then(file_at);
        let syncs = options.durability.syncs_ends();
        Self { logs, journal, floor, folder, syncs, synced: [0; 3], ended: false }
    }

    pub(super) fn create(
        folder: &RunFolder,
        run: &JobMetadata,
        options: &FileStoreOptions,
    ) -> Result<Self, LogError> {
        let mut journal = AppendFile::create(folder.journal())?;
        if !journal.try_lock()? {
            return Err(LogError::InUse { path: folder.journal() });
        }
        let log = |stream: Stream| AppendFile::create(folder.log(stream));
        let logs = [log(Stream::Stdout)?, log(Stream::Stderr)?];
        let journal = JournalWriter::begin(journal, run)?;
        if journal.reserve() > 0
            && let Err(error) = folder.reserve_metadata(journal.reserve())
        {
            tracing::warn!(%error, "a run begins without room for its end");
        }
        Ok(Self::new(logs, journal, options))
    }

    pub(super) fn moved_to(mut self, folder: &RunFolder) -> Self {
        for stream in Stream::BOTH {
            self.logs[stream.index()].moved_to(folder.log(stream));
        }
        self.journal.moved_to(folder.journal());
        self
    }

    pub(super) fn lengths(&self) -> [u64; 3] {
        [self.logs[0].len(), self.logs[1].len(), self.journal.len()]
    }

    /// What somebody else made of a log, which is made anew if it is not at its path.
    pub(super) fn changed(&mut self, stream: Stream) -> Result<Option<Changed>, LogError> {
        let log = &mut self.logs[stream.index()];
        // Where the whole folder was moved away, its run goes on in it.
        if !log.is_at_its_path()? && log.path().parent().and_then(file_at) == self.folder {
            log.make_anew()?;
        }
        log.changed()
    }

    /// The logs, then the journal.
    pub(super) fn handles(&self) -> [(Arc<File>, PathBuf); 3] {
        let [out, err] = &self.logs;
        let of_log = |log: &AppendFile| (log.handle(), log.path().to_owned());
        [of_log(out), of_log(err), (self.journal.handle(), self.journal.path().to_owned())]
    }

    /// Makes the logs durable, then says in the journal that the run is over, makes that durable, and writes
    /// `metadata.json`. Each is done even when one before it failed: the more is there of a run's end, the better.
    pub(super) fn end(&mut self, run: &mut JobMetadata, folder: &RunFolder) -> Result<(), LogError> {
        let mut failed = None;
        let mut note = |result: Result<(), LogError>| {
            let error = result.err();
            failed = LogError::both(failed.take(), error);
        };
        if self.syncs {
            self.logs.iter().filter(|log| log.len() > 0).for_each(|log| note(log.sync()));
        }
        let mut ended = self.journal.append_end(run);
        if ended.is_err() && !run.missing_deps.is_empty() {
            // It is the only part that can be larger than the room that is kept.
            run.missing_deps.clear();
            let shorter = "what the job said it lacks is only in its log: the disk was full";
            run.note = Some(run.note.take().map_or(shorter.to_owned(), |note| format!("{note}; {shorter}")));
            ended = self.journal.append_end(run);
        }
        note(ended);
        if self.syncs {
            note(self.journal.sync());
        }
        note(self.write_metadata(run, folder));
        failed.map_or(Ok(()), Err)
    }

    /// The same for a run that somebody can end later too: nothing is done before all that comes before it was. What
    /// was done stays done, and calling again goes on there.
    pub(super) fn end_in_order(&mut self, run: &JobMetadata, folder: &RunFolder) -> Result<(), LogError> {
        if self.syncs {
            self.logs.iter().filter(|log| log.len() > 0).try_for_each(AppendFile::sync)?;
        }
        if !self.ended {
            self.journal.append_end(run)?;
            self.ended = true;
        }
        if self.syncs {
            self.journal.sync()?;
        }
        self.write_metadata(run, folder)
    }

    /// Writes `metadata.json`, unless the folder is that of another run by now: its id was used again.
    fn write_metadata(&self, run: &JobMetadata, folder: &RunFolder) -> Result<(), LogError> {
        if self.folder.zip(file_at(folder.path())).is_some_and(|(ours, found)| ours != found) {
            let why = io::Error::other("the folder is that of another run by now");
            return Err(LogError::io("writing", folder.metadata())(why));
        }
        folder.write_metadata(run, self.syncs)
    }
}
