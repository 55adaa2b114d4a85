//! Job-run logs that cost no memory, survive crashes, stream live and resume exactly where they were cut.
//!
//! What a job prints goes to plain files, byte for byte, as it is printed. A small index beside them turns "line
//! N", "the last N lines", "since 10:42" and "the newest runs" into look-ups. One reader serves the library, HTTP,
//! the command line and the page. `README.md` is for those who use it; this page is for those who change it.
//!
//! # Where to begin
//!
//! [`LogStore`] is the whole contract: where runs are put, and where they are read. [`FileLogStore`] is the store
//! on disk; [`MemoryLogStore`] is one for tests; [`BufferedLogStore`] and [`CompositeLogStore`] wrap others;
//! [`conformance`] is what all of them have to do. [`SubProcessBackend`] runs jobs and writes what they print.
//! `router` and `serve` put a store on HTTP, and `Client` reads it from there (features `server` and `client`).
//!
//! Three things are numbered, and each has a type: [`LineNumber`] (from 1; as a position, "after line N"),
//! [`ByteOffset`] and [`UnixMicros`]. Every stream of lines ends with a [`ReadEnd`] that says why.
//!
//! # The map
//!
//! From the top down: a file imports only what stands in its own row or below (`tests/it/layers.rs` sees to that).
//! Within a folder, `mod.rs` wires the others and is the file to read first.
//!
//! | where | which question it answers |
//! | --- | --- |
//! | `bin/databuild/` | What does a command line mean, what is printed, and which exit code is it? One file a verb: `run`, `logs`, `runs`, `gc`, `serve`, `index`. `locate` finds the run that is meant, `source` is a service or a folder. |
//! | `config.rs` | Which folder, which address, which token, and who said so? |
//! | `http/` | How does a request become a call of the store, and the answer bytes? `stream` is the events of a log, `sse` and `json` their frames, `raw` the bytes, `runs` the lists, `retention` what changes something, `metrics` what is counted, `params` and `problem` what is asked and refused, `auth` who is let in, `serve` connections and their end, `web/` the page. |
//! | `client/` | How is a log read over connections that break? `sse` parses, `decode` makes batches of events, `reader` reconnects, `transport` tells what speaks no HTTP. |
//! | `wire.rs` | What do the service and its client say to each other? The cursor, and the JSON. |
//! | `runner/` | How is a job executed, and how does its output get into the log? `command` starts it, `pump` is its thread, `directive` what a job says to us, `events` what its caller is told, `control` signals, `tee` the copy for who watches. |
//! | `store/` | What can one ask of logs? The trait; `read`, `end` and `query` its words, `strings` what speaks of strings, `follow` the one loop behind every read. |
//! | `store/file/` | How are runs kept in files? See below. |
//! | `store/buffered/`, `store/composite/` | How are appends gathered; how do several stores act as one? |
//! | `store/conformance/` | What does every store have to do? |
//! | `index/` | Where is line N, which runs are there? `schema` the tables, `codec` the bytes of a record, `progress` which places are kept, `checkpoints` their rows, `retention` which runs are oldest and what all take up, `committer` the thread that writes, `handle` the open index, `database` its file, `failure` what can go wrong with it, `building` a new index beside the old one, `looking` one that is only looked at. |
//! | `retention.rs` | Which runs are to be evicted, and why? The policy, and the plan from rows alone. |
//! | `journal.rs` | What happened to a run, and when? The records and their bytes. |
//! | `logfile/`, `layout/` | How is a file appended to and read, plain or compressed (`append` writes, `seekable` reads what is compressed, `compress` makes it, `frames` has its bytes); what are the files called, and is the folder still where it was (`home`)? |
//! | `error.rs`, `run/`, `line.rs` | The words that everything speaks. |
//! | `meter.rs` | What is counted? The names of all metrics. |
//!
//! In `store/file/`, a run in memory is a `LiveRun` (`live`): how far it has come, and a signal that it has come
//! further. Whoever writes publishes there, whoever reads waits there, and neither knows the other. `writer` writes the
//! runs of this process; `adopt` and `watch` see the runs of other processes, and `copied` tells whether somebody is
//! just copying one; `shared` holds the runs in memory by id. `source` is a read of one run: `places` finds where it
//! begins, `lines` cuts lines out of a log, `marks` says in which order they came, and `cuts` what is given up of a run
//! that is too large, which `writer/cap.rs` decides, or that somebody else took, which `writer/changed.rs` sees.
//! `commit` brings what waits to the index, and `list` lists. What a run is by its folder alone is found out by
//! `tracker`, and `derive` makes rows of it: for `reconcile`, which brings the index and the folders together while a
//! store is open, and offline for `rebuild` and `check` (`check_run` finds, `repair` mends). `identity` tells whether
//! the run in a folder is the one that the index speaks of: ids are used again. `power`
//! knows what a power cut leaves, and mends it, `durability` when files are synced, `space` how much of the disk is left
//! free. `evict` removes runs step by step (`evict/victims` looks whether they may go, `evict/by_folder` makes room where
//! the disk has none for an index), and `evictor` is the thread that sees when it is time; `compressor` is the thread that
//! compresses runs some time after their end, and `compress` puts the files in their place. `handle` says who keeps a store
//! open, and how its threads get at it.
//!
//! `migrations-docs/` has every byte on disk. `tests/it/` is one test binary, a file a subject. `benches/`
//! measures.
//!
//! # A line is written
//!
//! 1. The job writes to its standard output: a pipe. The job's `Pump` (`runner/pump.rs`), a thread, waits in
//!    `Pump::wait` for both of its pipes at once, for the command's end and for a cancel. `Pump::pump_once` reads
//!    what is there, up to 256 KiB, into the job's one buffer. `Sink::take` gives it to the log first, then to the
//!    tee, then to `Scanner::scan`, which looks for directives.
//! 2. The log is a [`RunWriter`]. That of a file store goes through `Shared::append` to `OwnRun::append`
//!    (`store/file/writer/`), where `AppendFile::append` (`logfile/append.rs`) writes the bytes. Now they are safe from
//!    a crash of this process. If the disk refuses them, the log is cut back to the end of its last whole line, a
//!    `Hole` counts what comes until the disk takes it again, and the job hears nothing of it.
//!    Of a run that becomes larger than it may be, `WriterHalf::give_up` (`writer/cap.rs`) gives up a part in the
//!    middle: the journal is told, then the readers, then the disk gets it back.
//! 3. `WriterHalf::arrived` counts the lines, and `WriterHalf::mark` adds them to the open mark: "so many bytes and
//!    lines of this stream, at this microsecond". A mark takes in what comes within a millisecond;
//!    `WriterHalf::write_marks_if_due` then writes it to the journal (`JournalWriter::append_arrivals`). On the
//!    way, `Checkpointer::after` (`index/progress.rs`) keeps a place about every 64 KiB.
//! 4. `OwnRun::publish` puts the new length, the marks that are not in the journal yet and the places that are for
//!    the index into the `LiveRun`, and `LiveRun::change` wakes its readers.
//! 5. `Shared::nudge` tells the `Committer` (`index/committer.rs`) that something waits; nobody waits for it.
//!    Within a second its thread gathers what all runs have (`commit_all` in `store/file/commit.rs`) and writes it
//!    in one transaction, `Index::commit`.
//! 6. When the job goes quiet for a millisecond, the pump calls [`RunWriter::flush`], and the mark that waited goes
//!    to the journal.
//! 7. When the command has ended and its pipes are closed, `Pump::end` calls [`RunWriter::finish`].
//!    `OwnRun::finish` syncs the logs, appends the end to the journal and syncs that; then
//!    `RunFolder::write_metadata` writes `metadata.json` under another name, syncs and renames it. Only then is the
//!    run over for its readers.
//!
//! `databuild run` does steps 1 to 4, 6 and 7 in a process of its own, with a store that has no index. The service
//! sees it through inotify: `on_event` (`store/file/watch.rs`) calls `ForeignRun::catch_up`
//! (`store/file/adopt.rs`), which reads the new records of the journal through the same `Progress` and
//! `Checkpointer`, and publishes as the writer does. While a run goes on, its writer holds a lock on the journal.
//! If that is gone and there is no end, `ForeignRun::recover` takes the journal over, notes what lies in the logs
//! behind the last mark, and tells the readers that the run is lost; `ForeignRun::complete_end` then waits for the disk.
//!
//! # A browser reconnects
//!
//! 1. An `EventSource` whose connection broke sends the same request again, with the last `id` it saw as
//!    `Last-Event-ID`. It passes `check_host` and `require_token` (`http/auth.rs`) and arrives at `events`
//!    (`http/stream.rs`).
//! 2. `request` reads the parameters (`http/params.rs`; each is right or refused by name) and the header, a
//!    [`Cursor`]. [`Cursor::Ended`], an id with `!`, has nothing to go on with: the answer is 204, which makes a
//!    browser stop. [`Cursor::After`] becomes [`Start::After`] and beats where the URL says to start.
//! 3. `open` asks the store, on a thread that may wait for a disk. A start that is counted from the end was turned
//!    into a position by [`LogStore::position`]. [`LogStore::read`] of the file store goes to `Shared::open_read`;
//!    a run that does not exist yet is waited for in `Shared::wait_and_read`. `Shared::find` looks in memory, then
//!    in the index, then for a folder.
//! 4. `FileSource::open` (`store/file/source/mod.rs`) asks `Places::line_floor` (`store/file/places.rs`) for a place at
//!    or before the line: among those that wait for the index, with `Index::line_floor`, or without an index in the
//!    journal. Where the next place is nearer, the line is counted back from there. The index is not trusted: if the
//!    byte before the place is not `\n`, the log is read from its beginning.
//! 5. A `LineReader` (`store/file/lines.rs`) begins there and skips to the line: at most 64 KiB and one line are
//!    read in vain, half of that where places are near.
//! 6. `drive` (`store/follow.rs`) is the loop of every read, of a backlog and of a live run alike: mark the signal
//!    as seen, ask the source, give what it has; if it has nothing, wait for the signal. A source first looks only
//!    at what is in the page cache; if that is not enough it is asked again on a thread that may wait. For both
//!    streams in order, or with times, the source follows the journal (`Arrivals` in `store/file/marks.rs`) in
//!    place of one file.
//! 7. `EventStream::gather` takes the batches as fast as the connection takes the bytes, and `Frames::event`
//!    (`http/sse.rs`) turns each into frames, `id` by `id`. A client that does not read is not read for.
//!    [`ReadEnd`] becomes the last event.
//!
//! # The five laws
//!
//! Each is a test by its name in `tests/it/laws.rs`, of the executable and the service as they are used. What goes into it
//! farther:
//!
//! | law | held by | tests |
//! | --- | --- | --- |
//! | **Files are the truth, the index is derived.** Bytes, then journal, then index; an index that can't be used is made anew. | `OwnRun::append`, `Index::open`, `Places` | `store::runs_and_their_places_outlive_the_store`, `store::folders_that_were_there_before_the_store_are_listed`, `store::a_log_cut_short_by_somebody_is_a_gap_and_not_a_wrong_line`, `index::…::a_second_opener_is_told_so_and_damage_is_moved_aside`, `conformance::files_without_an_index` |
//! | **The job is never hurt.** What can't be kept is counted and shown, and line numbers never shift. | `Sink`, `Hole`, `BestEffort` | `runner::…::a_full_disk_does_not_hurt_the_job`, `runner::…::a_stalled_disk_blocks_neither_the_caller_nor_a_cancel`, `runner::a_tee_that_nobody_reads_holds_up_neither_the_job_nor_its_record`, `lines::…::a_gap_stands_where_it_is_and_shifts_no_number`, `composite::a_stuck_copy_slows_nobody_and_does_not_pretend_to_be_whole` |
//! | **Exactly once per reader.** The cursor is a line number, never a time. | [`Cursor`], `drive`, `client/reader.rs` | `http::resume::cut_at_every_byte_nothing_is_missed_or_repeated`, `http::resume::a_run_that_is_followed_while_it_is_written_comes_exactly_once`, `cli::folder::a_service_that_is_killed_and_started_again_costs_no_line`, `web::a_restart_of_the_service_loses_and_repeats_no_line`, [`conformance::law_3_exactly_once_per_reader`] |
//! | **Memory does not grow** with the log, the line, the run's length or the reader's slowness. | the pump's one buffer; readers that pull and hold only a position; bounded queues | `runner::…::a_line_of_100_mb_passes_through_one_buffer`, `http::server::a_client_that_stops_reading_stops_its_own_reading_and_nothing_else`, `buffered::memory_is_bounded_however_many_runs_there_are`, `runner::missing_deps_without_end_are_bounded_and_the_run_says_how_many_were_left_out` |
//! | **Every stream ends**, and says why. | [`ReadEnd`], `EndGuard`, `ForeignRun::recover`, [`LogStore::close`] | [`conformance::law_5_every_stream_ends`], [`conformance::law_5_a_dropped_writer_leaves_a_lost_run`], `store::what_was_running_and_has_no_writer_is_lost_on_open`, `http::server::the_shutdown_ends_streams_with_an_event` |
//!
//! Tests without a link are in `tests/it/`; those with `…` are in the file that they test.
#![doc(test(attr(deny(warnings))))]

#[cfg(feature = "client")]
mod client;
mod config;
mod error;
#[cfg(test)]
mod fuzz;
#[cfg(feature = "server")]
mod http;
mod index;
mod journal;
mod layout;
mod line;
mod logfile;
mod meter;
mod retention;
mod run;
mod runner;
mod store;
mod wire;

#[cfg(feature = "client")]
pub use client::{Client, ClientEnd, ClientError, ClientEvent, LogQuery};
pub use config::{ConfigError, Environment, Origin, Setting};
pub use error::LogError;
#[cfg(feature = "server")]
pub use http::{ServerOptions, listen, record_metrics, router, serve, stop_signal};
pub use line::{ByteOffset, InvalidTime, LineNumber, Stream, UnixMicros, UnknownView, View};
pub use retention::{EvictedRun, EvictionReason, GcReport, GcRequest, KeptRun, RetentionPolicy};
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
    Compression, CutLine, Durability, FileLogStore, FileStoreOptions, Finding, FindingKind, Line, LineTime,
    Lines, LogStore, Member, MemberHealth, MemberMode, MemoryLogStore, Outcome, ReadEnd, ReadEvent,
    ReadOptions, ReadStream, RebuildProgress, RebuildReport, Repair, RunCursor, RunEnd, RunPage, RunQuery,
    RunWriter, Start, StreamOptions, UnreadableRun, check_index, compact_index, conformance, dump_index,
    rebuild_index,
};
pub use wire::{Cursor, Eof, GapNotice, InvalidCursor, LogLine, Problem, RunList};

#[doc(hidden)]
pub use store::{EvictionBench, add_places};

/// The examples of `README.md`, so that they are compiled.
#[cfg(all(doctest, feature = "cli"))]
#[doc = include_str!("../README.md")]
pub struct ReadmeExamples;
