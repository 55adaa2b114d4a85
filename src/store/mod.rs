//! The stores: where the logs of runs are put, and where they are read.
//!
//! [`LogStore`] is the whole contract. [`FileLogStore`] keeps runs on disk, [`MemoryLogStore`] in memory for the
//! tests of those who embed us; [`BufferedLogStore`] and [`CompositeLogStore`] wrap other stores.

mod buffered;
mod composite;
pub mod conformance;
mod end;
mod file;
mod follow;
mod memory;
mod query;
mod read;
mod strings;

use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::error::LogError;
use crate::line::{ByteOffset, LineNumber, Stream, View};
use crate::retention::{GcReport, GcRequest};
use crate::run::{JobMetadata, JobRunId, RunSpec};
use strings::{append_line, stream_lines};

pub use buffered::{BufferOptions, BufferedLogStore};
pub use composite::{CompositeLogStore, CompositeOptions, Member, MemberHealth, MemberMode};
pub use end::{Outcome, RunEnd};
pub use file::{
    CheckOptions, CheckReport, Durability, EvictionBench, FileLogStore, FileStoreOptions, Finding,
    FindingKind, RebuildProgress, RebuildReport, Repair, UnreadableRun, add_places, check_index,
    compact_index, dump_index, rebuild_index,
};
pub use memory::MemoryLogStore;
pub use query::{RunCursor, RunPage, RunQuery};
pub use read::{Batch, CutLine, Line, LineTime, Lines, ReadEnd, ReadEvent, ReadOptions, ReadStream, Start};
pub use strings::StreamOptions;

/// Storage and retrieval of the logs of job runs, shared as `Arc<dyn LogStore>`.
///
/// The five methods `append_stdout`, `append_stderr`, `stream_stdout`, `stream_stderr` and `write_metadata` speak
/// of lines and strings; they are provided, on top of the typed floor that everything inside uses.
///
/// Methods that are not streams may block for as long as a disk takes: async code calls them through
/// `spawn_blocking`, or appends through a [`BufferedLogStore`](crate::BufferedLogStore).
pub trait LogStore: Send + Sync {
    /// Starts a run and gives the one handle that writes it.
    ///
    /// # Errors
    ///
    /// [`LogError::AlreadyExists`] if the id is taken, [`LogError::Io`] if the run can't be created.
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError>;

    /// Appends bytes, any number of lines or parts of lines, to a stream of a run. A run that was never started
    /// is started.
    ///
    /// # Errors
    ///
    /// [`LogError::Finished`] if the run is over. When the bytes can't be kept, the error says so once, and the
    /// hole is counted and shown to readers.
    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError>;

    /// Ends a run: what it printed is made durable, then `metadata.json` says how it ended.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`], [`LogError::Finished`], or what the disk said.
    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError>;

    /// Reads a run. The stream gives whole lines in order and closes with exactly one [`ReadEvent::End`]; dropping
    /// it is always safe, and a new one from the last position seen goes on without loss or repetition.
    ///
    /// With `follow`, a run that does not exist yet is waited for.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`] without `follow`, [`LogError::Evicted`], or what the disk said.
    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError>;

    /// How many lines of a view lie before the first one that a read from `start` would give at this moment.
    /// A read from [`Start::After`] with that position gives the same lines, now and later.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`], [`LogError::Evicted`], or what the disk said.
    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError>;

    /// Where the first line of a read from `start` begins in its log file; the file's length if there is none yet.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`], [`LogError::Evicted`], or what the disk said.
    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError>;

    /// Reads the bytes of a log as they are, at most `length` from `offset` on; none are returned only at the
    /// present end of the log.
    ///
    /// # Errors
    ///
    /// As [`byte_offset`](Self::byte_offset); [`LogError::Gap`] where [`given_up`](Self::given_up) says that there is
    /// nothing any more: the log goes on behind it; [`LogError::Corrupt`] where bytes are missing that were kept once.
    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError>;

    /// Which bytes of a log are given up, because the run is larger than it may be or somebody else took them. While the
    /// run goes on, the end of that part moves on. `None` if all are there.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`] or [`LogError::Evicted`].
    fn given_up(&self, _id: &JobRunId, _stream: Stream) -> Result<Option<Range<ByteOffset>>, LogError> {
        Ok(None)
    }

    /// The same as [`read_bytes`](Self::read_bytes), but passes over what is given up; tells where the bytes are too.
    ///
    /// # Errors
    ///
    /// As [`byte_offset`](Self::byte_offset).
    fn read_kept_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<(ByteOffset, Bytes), LogError> {
        let mut at = offset;
        loop {
            match self.read_bytes(id, stream, at, length) {
                Err(LogError::Gap(gap)) => match self.given_up(id, stream)?.filter(|part| part.contains(&at))
                {
                    Some(part) => at = part.end,
                    None => return Err(LogError::Gap(gap)),
                },
                read => return read.map(|bytes| (at, bytes)),
            }
        }
    }

    /// What is known of a run at this moment.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`] or [`LogError::Evicted`].
    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError>;

    /// Lists runs, newest first.
    ///
    /// # Errors
    ///
    /// What the disk or the index said.
    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError>;

    /// Compresses what is kept of a run that is over, now, and gives when it is done. It reads the same as before, also
    /// for who is reading it. A run that is compressed stays as it is.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`], [`LogError::Evicted`]; [`LogError::Unfinished`] while the run goes on;
    /// [`LogError::InUse`] if somebody is at it; [`LogError::Unsupported`] by a store that keeps no files; or what the
    /// disk said. Nothing is lost then.
    fn compress(&self, id: &JobRunId) -> Result<Compression, LogError> {
        self.run(id)?;
        Err(LogError::Unsupported { what: "this store keeps nothing that could be compressed" })
    }

    /// Evicts runs that are over: what the store's own policy says, with other limits where the request has them.
    /// Runs that go on and runs that are pinned are never evicted.
    ///
    /// # Errors
    ///
    /// [`LogError::Unsupported`] if this store evicts nothing, or what the disk or the index said.
    fn gc(&self, _request: &GcRequest) -> Result<GcReport, LogError> {
        Err(LogError::Unsupported { what: "this store evicts nothing" })
    }

    /// Pins a run, so that it is never evicted, or takes the pin away. Doing it again changes nothing.
    ///
    /// # Errors
    ///
    /// [`LogError::NotFound`], [`LogError::Evicted`], [`LogError::Unsupported`] if this store evicts nothing, or what
    /// the disk said.
    fn set_pinned(&self, _id: &JobRunId, _pinned: bool) -> Result<(), LogError> {
        Err(LogError::Unsupported { what: "this store evicts nothing, so there is nothing to pin" })
    }

    /// Ends every open stream with [`ReadEnd::Shutdown`] and writes down what is still in memory. Runs that are
    /// being written go on. Calling it again does nothing.
    ///
    /// # Errors
    ///
    /// What could not be written down.
    fn close(&self) -> Result<(), LogError>;

    /// Appends a line, given without its `\n`, to standard output.
    ///
    /// # Errors
    ///
    /// As [`append`](Self::append); [`LogError::InvalidId`] if the id is not one.
    fn append_stdout(&self, job_run_id: &str, line: &str) -> Result<(), LogError> {
        append_line(self, job_run_id, Stream::Stdout, line)
    }

    /// Appends a line, given without its `\n`, to standard error.
    ///
    /// # Errors
    ///
    /// As [`append`](Self::append); [`LogError::InvalidId`] if the id is not one.
    fn append_stderr(&self, job_run_id: &str, line: &str) -> Result<(), LogError> {
        append_line(self, job_run_id, Stream::Stderr, line)
    }

    /// Streams the lines of standard output, without their `\n`, invalid UTF-8 replaced by U+FFFD.
    ///
    /// The stream ends after the last line. An error that is a [`LogError::Gap`] stands where lines could not be
    /// kept, and the stream goes on behind it; every other error is the last item.
    fn stream_stdout(
        &self,
        job_run_id: &str,
        options: StreamOptions,
    ) -> BoxStream<'static, Result<String, LogError>> {
        stream_lines(self, job_run_id, Stream::Stdout, options)
    }

    /// Streams the lines of standard error; otherwise as [`stream_stdout`](Self::stream_stdout).
    fn stream_stderr(
        &self,
        job_run_id: &str,
        options: StreamOptions,
    ) -> BoxStream<'static, Result<String, LogError>> {
        stream_lines(self, job_run_id, Stream::Stderr, options)
    }

    /// Ends the run with this document; a run that was never started is started first. Stream totals and the
    /// start time are the store's own and override those in the document.
    ///
    /// # Errors
    ///
    /// As [`finish`](Self::finish); [`LogError::InvalidParameter`] if the document is about another run or its
    /// state is `running`.
    fn write_metadata(&self, job_run_id: &str, metadata: JobMetadata) -> Result<(), LogError> {
        let id: JobRunId = job_run_id.parse()?;
        if *metadata.id() != id {
            return Err(LogError::InvalidParameter {
                name: "metadata.job_run_id",
                given: metadata.id().to_string(),
                expected: format!("expected {id}, the run that it is written for"),
            });
        }
        let spec = metadata.spec.clone();
        let end = RunEnd::from_metadata(metadata)?;
        match self.finish(&id, end.clone()) {
            Err(LogError::NotFound { .. }) => self.start(spec)?.finish(end).map(drop),
            other => other.map(drop),
        }
    }
}

/// What became of a run's files when they were compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    /// Bytes that the run took up on disk before.
    pub bytes_before: u64,
    /// Bytes that it takes up now.
    pub bytes_after: u64,
}

/// The one handle that writes a run.
///
/// Dropping it without [`finish`](Self::finish) leaves the run to be found as [lost](crate::RunState::Lost).
pub trait RunWriter: Send {
    /// The run's id.
    fn id(&self) -> &JobRunId;

    /// Appends bytes, any number of lines or parts of lines.
    ///
    /// # Errors
    ///
    /// As [`LogStore::append`].
    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError>;

    /// Hands everything appended so far to the operating system and to readers in other processes.
    ///
    /// # Errors
    ///
    /// What the disk said.
    fn flush(&mut self) -> Result<(), LogError>;

    /// Ends the run; an append after the end does not compile.
    ///
    /// # Errors
    ///
    /// As [`LogStore::finish`].
    fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError>;
}
