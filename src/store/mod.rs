//! The stores: where the logs of runs are put, and where they are read.
//!
//! [`LogStore`] is the whole contract. [`FileLogStore`] keeps runs on disk, [`MemoryLogStore`] in memory for the
//! tests of those who embed us; [`BufferedLogStore`] and [`CompositeLogStore`] wrap other stores.

mod buffered;
mod composite;
pub mod conformance;
mod file;
mod follow;
mod memory;
mod read;

use std::ops::Range;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde::{Deserialize, Serialize};

use crate::error::LogError;
use crate::line::{ByteOffset, LineNumber, Stream, UnixMicros, View};
use crate::retention::{GcReport, GcRequest};
use crate::run::{Exit, JobMetadata, JobRunId, MissingDeps, RunSpec, RunState, StateKind};

pub use buffered::{BufferOptions, BufferedLogStore};
pub use composite::{CompositeLogStore, CompositeOptions, Member, MemberHealth, MemberMode};
pub use file::{
    CheckOptions, CheckReport, Durability, EvictionBench, FileLogStore, FileStoreOptions, Finding,
    FindingKind, RebuildProgress, RebuildReport, Repair, UnreadableRun, add_places, check_index,
    compact_index, dump_index, rebuild_index,
};
pub use memory::MemoryLogStore;
pub use read::{Batch, CutLine, Line, LineTime, Lines, ReadEnd, ReadEvent, ReadOptions, ReadStream, Start};

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

    /// Which bytes of a log are given up, because the run is larger than it may be. While the run goes on, the end of
    /// that part moves on. `None` if all are there.
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
/// Dropping it without [`finish`](Self::finish) leaves the run to be found as [lost](RunState::Lost).
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

/// How to stream the lines of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Keep streaming new lines until the run ends.
    pub follow: bool,
    /// Skip this many lines: start after line N.
    pub since_line: usize,
    /// End after this many lines.
    pub max_lines: Option<usize>,
    /// Start with the last N lines instead.
    pub tail: Option<usize>,
}

impl StreamOptions {
    fn read_options(&self, stream: Stream) -> ReadOptions {
        let after = LineNumber(self.since_line as u64);
        ReadOptions {
            start: match self.tail {
                Some(count) => Start::LastLines { count: count as u64, after },
                None => Start::After(after),
            },
            limit: self.max_lines.map(|lines| lines as u64),
            follow: self.follow,
            ..ReadOptions::new(View::One(stream))
        }
    }
}

/// How a command ended, or that nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended on its own.
    Exited(Exit),
    /// It ended because the run was cancelled.
    Cancelled(Exit),
    /// Its writer died first.
    Lost,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEnd {
    /// How it ended.
    pub outcome: Outcome,
    /// When.
    pub ended_at: UnixMicros,
    /// What the job said it lacks.
    pub missing_deps: Vec<MissingDeps>,
    /// See [`JobMetadata::note`].
    pub note: Option<String>,
    /// What the run was, where it differs from what it was started with: fields that are not empty override.
    pub spec: Option<RunSpec>,
    /// Further fields for `metadata.json`.
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl RunEnd {
    /// An end with this outcome, now.
    #[must_use]
    pub fn now(outcome: Outcome) -> Self {
        Self {
            outcome,
            ended_at: UnixMicros::now(),
            missing_deps: Vec::new(),
            note: None,
            spec: None,
            other: serde_json::Map::new(),
        }
    }

    fn from_metadata(metadata: JobMetadata) -> Result<Self, LogError> {
        let (outcome, ended_at) = match metadata.state {
            RunState::Running => {
                return Err(LogError::InvalidParameter {
                    name: "metadata.state",
                    given: StateKind::Running.to_string(),
                    expected: "expected how the run ended: succeeded, failed, cancelled or lost".to_owned(),
                });
            }
            RunState::Succeeded { ended } => (Outcome::Exited(Exit::Code(0)), ended),
            RunState::Failed { ended, exit } => (Outcome::Exited(exit), ended),
            RunState::Cancelled { ended, exit } => (Outcome::Cancelled(exit), ended),
            RunState::Lost { ended } => (Outcome::Lost, ended),
        };
        Ok(Self {
            outcome,
            ended_at,
            missing_deps: metadata.missing_deps,
            note: metadata.note,
            spec: Some(metadata.spec),
            other: metadata.other,
        })
    }

    /// The state that this end leaves the run in.
    #[must_use]
    pub const fn state(&self) -> RunState {
        let ended = self.ended_at;
        match self.outcome {
            Outcome::Exited(exit) => RunState::from_exit(exit, ended),
            Outcome::Cancelled(exit) => RunState::Cancelled { ended, exit },
            Outcome::Lost => RunState::Lost { ended },
        }
    }

    /// Writes this end into what is known of the run.
    pub(crate) fn apply_to(self, run: &mut JobMetadata) {
        run.state = self.state();
        run.missing_deps = self.missing_deps;
        run.note = self.note;
        run.other.extend(self.other);
        if let Some(spec) = self.spec {
            if !spec.command.is_empty() {
                run.spec.command = spec.command;
            }
            if !spec.building_partitions.is_empty() {
                run.spec.building_partitions = spec.building_partitions;
            }
            run.spec.labels.extend(spec.labels);
        }
    }
}

/// Which runs to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunQuery {
    /// At most this many; `None` for 100.
    pub limit: Option<usize>,
    /// Where the page before this one ended.
    pub cursor: Option<RunCursor>,
    /// Only runs in this state.
    pub state: Option<StateKind>,
    /// Only runs that build this partition.
    pub partition: Option<String>,
    /// Only runs whose id starts so.
    pub id_prefix: Option<String>,
}

impl RunQuery {
    /// The page size when none is asked for.
    pub const DEFAULT_LIMIT: usize = 100;

    pub(crate) fn page_size(&self) -> usize {
        self.limit.unwrap_or(Self::DEFAULT_LIMIT).max(1)
    }

    pub(crate) fn matches(&self, run: &JobMetadata) -> bool {
        self.state.is_none_or(|state| run.state.kind() == state)
            && self.partition.as_ref().is_none_or(|name| run.spec.building_partitions.contains(name))
            && self.id_prefix.as_ref().is_none_or(|prefix| run.id().as_str().starts_with(prefix.as_str()))
    }
}

/// Where a page of runs ended; the next page goes on below it. Only the store that gave it can tell what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunCursor(pub u64);

/// A page of runs, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunPage {
    /// The runs.
    pub runs: Vec<JobMetadata>,
    /// Where the next page begins; `None` on the last page.
    pub next: Option<RunCursor>,
    /// Which of the runs are pinned.
    pub pinned: Vec<JobRunId>,
}

fn append_line<S: LogStore + ?Sized>(
    store: &S,
    id: &str,
    stream: Stream,
    line: &str,
) -> Result<(), LogError> {
    let mut bytes = Vec::with_capacity(line.len() + 1);
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(b'\n');
    store.append(&id.parse()?, stream, &bytes)
}

fn stream_lines<S: LogStore + ?Sized>(
    store: &S,
    id: &str,
    stream: Stream,
    options: StreamOptions,
) -> BoxStream<'static, Result<String, LogError>> {
    let opened = id
        .parse::<JobRunId>()
        .map_err(LogError::from)
        .and_then(|id| store.read(&id, options.read_options(stream)));
    match opened {
        Ok(events) => events.flat_map(|event| stream::iter(strings(event))).boxed(),
        Err(error) => stream::iter([Err(error)]).boxed(),
    }
}

fn strings(event: Result<ReadEvent, LogError>) -> Vec<Result<String, LogError>> {
    match event {
        Ok(ReadEvent::Lines(batch)) => {
            batch.lines().map(|line| Ok(String::from_utf8_lossy(line.text).into_owned())).collect()
        }
        Ok(ReadEvent::Gap { gap, .. }) => vec![Err(LogError::Gap(gap))],
        Ok(ReadEvent::End(ReadEnd::Complete(_) | ReadEnd::Running { .. })) => Vec::new(),
        Ok(ReadEvent::End(ReadEnd::Evicted(tombstone))) => vec![Err(LogError::Evicted(tombstone))],
        Ok(ReadEvent::End(ReadEnd::Shutdown)) => vec![Err(LogError::Closed)],
        Err(error) => vec![Err(error)],
    }
}
