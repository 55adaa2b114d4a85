//! What a reader has to know of a log whose middle is given up, also while it is being read.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use memchr::memchr;

use crate::error::LogError;
use crate::index::progress::{Cuts, gap_of_cut};
use crate::journal::{Cut, Record};
use crate::layout::compressed;
use crate::line::Stream;
use crate::logfile::{Fetched, Io, ReadFile};
use crate::store::file::live::LiveRun;
use crate::store::file::marks::{Entry, JournalReader};

/// Tells what is given up of a run's logs.
///
/// Whoever reads a log beside its writer can find zeros where lines were. The writer says what it gives up before it
/// does so: to its own process in the [`LiveRun`], to others in the journal. So bytes that were read and then are not
/// in what [`look`](Self::look) gives are those that were written.
#[derive(Debug)]
pub(crate) struct CutWatch {
    run: Arc<LiveRun>,
    seen: Mutex<Cuts>,
}

/// What a look found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Look {
    /// What is given up of the stream by now, if anything is.
    Known(Option<Cut>),
    /// The journal is not in the page cache.
    WouldBlock,
}

impl CutWatch {
    pub(crate) fn new(run: Arc<LiveRun>) -> Self {
        Self { run, seen: Mutex::default() }
    }

    /// What is known to be given up of a stream. It may be more by now.
    pub(crate) fn known(&self, stream: Stream) -> Option<Cut> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.take_all(&self.run.state().cuts);
        seen.of(stream)
    }

    /// What is given up of a stream by now, by what its writer says.
    pub(crate) fn look(&self, stream: Stream, io: Io) -> Result<Look, LogError> {
        let (mut journal_at, is_told) = {
            let state = self.run.state();
            (state.progress.journal, state.run.state.is_over() || !state.has_journal)
        };
        let journal = if is_told { None } else { ReadFile::open_if_there(&self.run.folder.journal())? };
        if let Some(journal) = journal {
            let mut journal = JournalReader::new(journal);
            loop {
                match journal.at(journal_at, io)? {
                    Entry::Record(record, behind) => {
                        journal_at = behind;
                        if let Record::Cut(further) = record {
                            self.seen.lock().unwrap_or_else(PoisonError::into_inner).take(further.cut);
                        }
                    }
                    Entry::WouldBlock => return Ok(Look::WouldBlock),
                    Entry::Nothing | Entry::Damaged => break,
                }
            }
        }
        Ok(Look::Known(self.known(stream)))
    }

    /// Reads bytes of a log as they were written, at most `length` of a part of it and none that are given up.
    ///
    /// # Errors
    ///
    /// [`LogError::Gap`] if what is given up begins or goes on where the part begins.
    pub(crate) fn read_bytes(
        &self,
        mut file: ReadFile,
        stream: Stream,
        part: Range<u64>,
        length: usize,
    ) -> Result<Bytes, LogError> {
        let mut cut = self.known(stream);
        loop {
            if let Some(cut) = cut.filter(|cut| cut.covers(part.start)) {
                let gaps = Arc::clone(&self.run.state().gaps);
                let of_stream: Vec<_> = gaps.iter().filter(|at| at.gap.stream == stream).copied().collect();
                return Err(LogError::Gap(gap_of_cut(&cut, cut.begin, &of_stream)));
            }
            let end = match cut {
                Some(cut) if part.start < cut.begin.offset => part.end.min(cut.begin.offset),
                _ => part.end,
            };
            let left = usize::try_from(end.saturating_sub(part.start)).unwrap_or(usize::MAX);
            let bytes = match file.read(part.start, length.min(left), Io::MayBlock)? {
                Fetched::Bytes(bytes) => bytes,
                Fetched::WouldBlock => continue,
                Fetched::Damaged(sound) => {
                    return Err(LogError::Corrupt {
                        path: compressed(&self.run.folder.log(stream)),
                        what: format!("the bytes from {} to {} are damaged", part.start, sound.offset),
                    });
                }
            };
            if memchr(0, &bytes).is_none() {
                return Ok(bytes);
            }
            let Look::Known(now) = self.look(stream, Io::MayBlock)? else { continue };
            if now == cut {
                return Ok(bytes);
            }
            cut = now;
        }
    }
}
