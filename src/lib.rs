//! Job-run logs that cost no memory, survive crashes, stream live and resume exactly where they were cut.
#![doc(test(attr(deny(warnings))))]

mod error;
mod line;
mod run;
mod runner;
mod store;
mod wire;

pub use error::LogError;
pub use line::{ByteOffset, InvalidTime, LineNumber, Stream, UnixMicros, UnknownView, View};
pub use run::{
    Completion, Exit, FORMAT_VERSION, Gap, GapReason, InvalidId, JobMetadata, JobRunId, MissingDeps,
    PartitionRef, RunSpec, RunState, StateKind, StreamTotals, Tombstone, UnknownState,
};
pub use runner::{
    JobCommand, JobEnd, JobEvent, JobInput, JobSignal, RunnerError, RunnerOptions, SubProcessBackend,
    SubProcessRunning, Tee,
};
pub use store::{
    Batch, CutLine, Line, LineTime, Lines, LogStore, MemoryLogStore, Outcome, ReadEnd, ReadEvent,
    ReadOptions, ReadStream, RunCursor, RunEnd, RunPage, RunQuery, RunWriter, Start, StreamOptions,
    conformance,
};
pub use wire::{Cursor, Eof, GapNotice, InvalidCursor, LogLine, Problem, RunList};
