//! Job-run logs that cost no memory, survive crashes, stream live and resume exactly where they were cut.
#![doc(test(attr(deny(warnings))))]

#[cfg(feature = "client")]
mod client;
mod config;
mod error;
#[cfg(feature = "server")]
mod http;
mod index;
mod journal;
mod layout;
mod line;
mod logfile;
mod run;
mod runner;
mod store;
mod wire;

#[cfg(feature = "client")]
pub use client::{Client, ClientEnd, ClientError, ClientEvent, LogQuery};
pub use config::{ConfigError, Environment, Origin, Setting};
pub use error::LogError;
#[cfg(feature = "server")]
pub use http::{ServerOptions, listen, router, serve, stop_signal};
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
    Batch, BufferOptions, BufferedLogStore, CheckOptions, CheckReport, CompositeLogStore, CompositeOptions,
    CutLine, FileLogStore, FileStoreOptions, Finding, FindingKind, Line, LineTime, Lines, LogStore, Member,
    MemberHealth, MemberMode, MemoryLogStore, Outcome, ReadEnd, ReadEvent, ReadOptions, ReadStream,
    RebuildProgress, RebuildReport, Repair, RunCursor, RunEnd, RunPage, RunQuery, RunWriter, Start,
    StreamOptions, UnreadableRun, check_index, compact_index, conformance, dump_index, rebuild_index,
};
pub use wire::{Cursor, Eof, GapNotice, InvalidCursor, LogLine, Problem, RunList};
