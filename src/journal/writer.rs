//! Appending records to a run's journal.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Arrival, CutFurther, HEADER, Record};
use crate::error::LogError;
use crate::logfile::AppendFile;
use crate::run::JobMetadata;

/// Bytes kept for the last marks and the end of a run, beside those of a second start record.
const END_BYTES: u64 = 16 * 1024;
/// Blocks are asked for so many bytes at a time.
const ALLOCATION_BYTES: u64 = 16 * 1024;

/// Writes the records of one run.
///
/// Behind the records, blocks of the disk are kept for the run's last marks and its end, so that these find room on
/// a disk that is full; other records are only written where they leave that much.
#[derive(Debug)]
pub(crate) struct JournalWriter {
    file: AppendFile,
    /// Where the last sound record ends. The file is longer when a write failed half-way and could not be undone.
    end: u64,
    /// Bytes to keep behind the records; 0 if the file system can't.
    reserve: u64,
    /// Up to where the file has blocks of the disk.
    allocated: u64,
    scratch: Vec<u8>,
    ends: Vec<u64>,
}

impl JournalWriter {
    /// Begins a journal in an empty file.
    pub(crate) fn begin(file: AppendFile, run: &JobMetadata) -> Result<Self, LogError> {
        let mut writer = Self { scratch: HEADER.to_vec(), ..Self::resume(file) };
        let start = Record::Start(Box::new(run.clone()));
        start.encode(HEADER.len() as u64, &mut writer.scratch).map_err(|error| writer.unwritable(&error))?;
        writer.write_scratch()?;
        // The end says again what the start says.
        writer.allocated = 0;
        writer.reserve = END_BYTES + writer.end;
        if let Err(error) = writer.make_room(0) {
            tracing::warn!(%error, "a run begins without room for its end");
        }
        Ok(writer)
    }

    /// Goes on behind the last sound record of an existing journal.
    pub(crate) const fn resume(file: AppendFile) -> Self {
        let end = file.len();
        // What the writer before had kept for the end may still be there.
        Self { file, end, reserve: 0, allocated: u64::MAX, scratch: Vec::new(), ends: Vec::new() }
    }

    /// Bytes that are kept for the run's end.
    pub(crate) const fn reserve(&self) -> u64 {
        self.reserve
    }

    pub(crate) fn moved_to(&mut self, path: PathBuf) {
        self.file.moved_to(path);
    }

    /// Appends the record with which the run ends, whole or not at all, and what room is left over is given back.
    pub(crate) fn append_end(&mut self, run: &JobMetadata) -> Result<(), LogError> {
        self.scratch.clear();
        let record = Record::End(Box::new(run.clone()));
        record.encode(self.end, &mut self.scratch).map_err(|error| self.unwritable(&error))?;
        self.write_scratch()?;
        if self.allocated > self.end
            && let Err(error) = self.file.cut(self.end)
        {
            tracing::warn!(%error, "room that was kept for the end of a run stays taken");
        }
        Ok(())
    }

    /// Appends arrivals in one write, all or none of them, and then tells of each where its record ends. With
    /// `last` they may use the room that is kept for the end.
    pub(crate) fn append_arrivals(
        &mut self,
        arrivals: &[Arrival],
        last: bool,
        mut written: impl FnMut(&Arrival, u64),
    ) -> Result<(), LogError> {
        let begin = self.end;
        self.scratch.clear();
        self.ends.clear();
        for arrival in arrivals {
            arrival.encode(begin + self.scratch.len() as u64, &mut self.scratch);
            self.ends.push(begin + self.scratch.len() as u64);
        }
        if !last {
            self.make_room(self.scratch.len() as u64)?;
        }
        self.write_scratch()?;
        for (arrival, &end) in arrivals.iter().zip(&self.ends) {
            written(arrival, end);
        }
        Ok(())
    }

    /// Appends what is given up of a log, whole or not at all; tells where the record ends.
    pub(crate) fn append_cut(&mut self, cut: &CutFurther) -> Result<u64, LogError> {
        self.scratch.clear();
        cut.encode(self.end, &mut self.scratch);
        self.make_room(self.scratch.len() as u64)?;
        self.write_scratch()?;
        Ok(self.end)
    }

    /// The length in bytes.
    pub(crate) const fn len(&self) -> u64 {
        self.end
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file itself, to be synced while others go on appending.
    pub(crate) fn handle(&self) -> Arc<File> {
        self.file.handle()
    }

    /// Waits until the records are on the disk.
    pub(crate) fn sync(&self) -> Result<(), LogError> {
        self.file.sync()
    }

    /// Sees to it that so many bytes can be appended and leave room for the end.
    fn make_room(&mut self, bytes: u64) -> Result<(), LogError> {
        let needed = self.end + bytes + self.reserve;
        if self.reserve == 0 || needed <= self.allocated {
            return Ok(());
        }
        let wanted = needed + ALLOCATION_BYTES;
        if self.file.allocate(wanted)? {
            self.allocated = wanted;
        } else {
            self.reserve = 0;
        }
        Ok(())
    }

    fn write_scratch(&mut self) -> Result<(), LogError> {
        self.cut_torn_record()?;
        let written = self.file.append(&self.scratch);
        if written.is_ok() {
            self.end = self.file.len();
        } else if let Err(error) = self.cut_torn_record() {
            tracing::warn!(%error, "the beginning of a journal record stays until it can be cut off");
        }
        written
    }

    /// Nothing may stand behind a record that is torn: readers would never get to it.
    fn cut_torn_record(&mut self) -> Result<(), LogError> {
        if self.file.len() == self.end { Ok(()) } else { self.file.cut(self.end) }
    }

    fn unwritable(&self, error: &serde_json::Error) -> LogError {
        LogError::Corrupt {
            path: self.file.path().to_owned(),
            what: format!("a record can't be written: {error}"),
        }
    }
}
