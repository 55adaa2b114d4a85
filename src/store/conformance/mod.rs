//! What every store has to do, whatever it keeps its runs in and however many stores it wraps.
//!
//! [`run_all`] runs every check; each check is also a function of its own, which takes a store that it may fill and
//! close. A check that fails panics with what it expected and what it got.
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! use std::sync::Arc;
//! use databuild_logs::{MemoryLogStore, conformance};
//!
//! conformance::run_all(|| Arc::new(MemoryLogStore::new())).await;
//! # });
//! # Ok::<(), std::io::Error>(())
//! ```

mod following;
mod lifecycle;
mod listing;
mod reading;
mod text;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;

use crate::error::LogError;
use crate::line::{LineNumber, Stream, UnixMicros, View};
use crate::run::{Exit, JobMetadata, JobRunId, RunSpec};
use crate::store::{
    Batch, CutLine, LogStore, Outcome, ReadEnd, ReadEvent, ReadOptions, ReadStream, RunEnd, RunWriter, Start,
};

pub use following::*;
pub use lifecycle::*;
pub use listing::*;
pub use reading::*;
pub use text::*;

/// How long a check may take before it counts as stuck.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(120);

/// A check: it is given a store of its own.
type Check = fn(Arc<dyn LogStore>) -> BoxFuture<'static, ()>;

macro_rules! checks {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), |store| Box::pin($name(store)))),*]
    };
}

const CHECKS: &[(&str, Check)] = checks![
    bytes_come_back_exactly,
    odd_bytes_stay_as_they_are,
    strings_replace_what_is_not_utf8,
    an_unterminated_line_waits_for_the_end,
    a_long_line_is_cut_and_its_neighbours_are_not,
    appends_may_be_split_at_every_byte,
    a_read_starts_behind_any_line,
    last_lines_and_since_start_where_they_say,
    times_never_go_back,
    a_limit_ends_a_read,
    batches_keep_to_their_size,
    byte_offsets_are_where_lines_begin,
    streams_are_independent,
    both_streams_are_read_in_the_order_of_completed_lines,
    a_read_of_both_streams_resumes_anywhere,
    string_options_mean_what_they_say,
    a_follower_gets_what_comes_later,
    a_follower_waits_for_a_run_that_is_not_there,
    a_follower_of_an_unfinished_line_gets_it_whole,
    a_follower_stops_at_its_limit,
    only_new_lines_are_given_to_who_asks_for_none_of_the_old,
    law_3_exactly_once_per_reader,
    law_3_a_reader_that_reconnects_misses_and_repeats_nothing,
    many_followers_see_the_same,
    dropped_followers_hurt_nobody,
    law_5_every_stream_ends,
    law_5_a_dropped_writer_leaves_a_lost_run,
    close_ends_followers_and_not_runs,
    a_run_is_started_once,
    an_append_starts_a_run,
    nothing_is_added_after_the_end,
    unknown_runs_are_not_found,
    ids_that_are_none_are_refused,
    totals_count_bytes_and_lines,
    what_is_known_of_a_run_is_kept,
    an_end_says_how_a_run_ended,
    write_metadata_ends_a_run,
    a_run_may_be_written_through_the_store_and_its_writer,
    runs_are_listed_newest_first,
    pages_cover_every_run_once,
    runs_are_filtered,
];

/// Runs every check, each on a new and empty store from `factory`, under a tokio runtime with its timer enabled.
/// The name of each check is printed to standard error as it begins.
///
/// # Panics
///
/// If a check fails, or does not end within [`CHECK_TIMEOUT`].
pub async fn run_all(factory: impl Fn() -> Arc<dyn LogStore>) {
    for (name, check) in CHECKS {
        eprintln!("conformance: {name}");
        let checked = tokio::time::timeout(CHECK_TIMEOUT, check(factory())).await;
        assert!(checked.is_ok(), "the check {name} did not end within {CHECK_TIMEOUT:?}");
    }
}

/// A line that a read gave.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    stream: Stream,
    number: u64,
    position: u64,
    text: Vec<u8>,
    time: Option<UnixMicros>,
    cut: Option<CutLine>,
}

/// All that a read gave.
#[derive(Debug)]
struct Transcript {
    lines: Vec<Seen>,
    end: ReadEnd,
}

impl Transcript {
    fn texts(&self) -> Vec<&[u8]> {
        self.lines.iter().map(|line| line.text.as_slice()).collect()
    }

    /// How the run ended, which the read must have been told.
    fn completed(&self) -> &JobMetadata {
        let ReadEnd::Complete(run) = &self.end else {
            panic!("the run is over, but a read of it ended with {:?}", self.end);
        };
        run
    }

    /// The position where another read goes on, which the read must have been told.
    fn running(&self) -> u64 {
        let ReadEnd::Running { next } = self.end else {
            panic!("the run goes on, but a read of it ended with {:?}", self.end);
        };
        next.0
    }
}

/// The lines of a batch; a batch that is not well-formed fails the check.
fn lines_of(batch: &Batch) -> Vec<Seen> {
    let lines: Vec<Seen> = batch
        .lines()
        .map(|line| Seen {
            stream: batch.stream,
            number: line.number.0,
            position: line.position.0,
            text: line.text.to_vec(),
            time: line.time,
            cut: line.cut,
        })
        .collect();
    assert!(batch.lines > 0, "a batch must hold at least one line");
    let ends = memchr::memchr_iter(b'\n', &batch.bytes).count() as u64;
    let open = u64::from(!batch.bytes.ends_with(b"\n"));
    assert_eq!(ends + open, batch.lines, "a batch says how many lines it holds, and holds nothing else");
    assert!(batch.cut.is_none() || batch.lines == 1, "a line that was cut must be in a batch of its own");
    assert!(
        batch.times.is_empty() || batch.times[0].from <= batch.first_line,
        "the times of a batch begin at {:?}, but its lines at {}",
        batch.times[0],
        batch.first_line
    );
    assert!(batch.times.is_sorted_by(|a, b| a.from < b.from && a.time <= b.time), "{:?}", batch.times);
    lines
}

/// Reads a stream of events to its end; lines must follow one another without a hole.
async fn drain(mut events: ReadStream) -> Transcript {
    let mut lines: Vec<Seen> = Vec::new();
    loop {
        let event = events.next().await.expect("a read must close with an end, but its stream just stopped");
        match event.expect("a read of a whole run must not fail") {
            ReadEvent::Lines(batch) => {
                for line in lines_of(&batch) {
                    if let Some(last) = lines.last() {
                        assert_eq!(line.position, last.position + 1, "positions must be numbered through");
                    }
                    if let Some(last) = lines.iter().rfind(|seen| seen.stream == line.stream) {
                        assert_eq!(line.number, last.number + 1, "lines must be numbered through");
                    }
                    lines.push(line);
                }
            }
            ReadEvent::Gap { gap, .. } => panic!("nothing was dropped, but a read shows the hole {gap:?}"),
            ReadEvent::End(end) => {
                assert!(events.next().await.is_none(), "an event came after the end");
                return Transcript { lines, end };
            }
        }
    }
}

fn open(store: &dyn LogStore, id: &JobRunId, options: ReadOptions) -> ReadStream {
    store.read(id, options).unwrap_or_else(|error| panic!("opening a read of {id} failed: {error}"))
}

async fn read(store: &dyn LogStore, id: &JobRunId, options: ReadOptions) -> Transcript {
    drain(open(store, id, options)).await
}

async fn read_from(store: &dyn LogStore, id: &JobRunId, view: View, start: Start) -> Transcript {
    read(store, id, ReadOptions { start, ..ReadOptions::new(view) }).await
}

const fn after(line: u64) -> Start {
    Start::After(LineNumber(line))
}

fn following(view: View) -> ReadOptions {
    ReadOptions { follow: true, ..ReadOptions::new(view) }
}

/// The next `count` lines of a stream; more than that, or an end, fail the check.
async fn next_lines(events: &mut ReadStream, count: usize) -> Vec<Seen> {
    let mut lines = Vec::new();
    while lines.len() < count {
        match events.next().await {
            Some(Ok(ReadEvent::Lines(batch))) => lines.extend(lines_of(&batch)),
            other => panic!("expected {count} lines, got {} and then {other:?}", lines.len()),
        }
    }
    assert_eq!(lines.len(), count, "more lines came than were appended: {lines:?}");
    lines
}

fn start(store: &dyn LogStore) -> (JobRunId, Box<dyn RunWriter>) {
    let id = JobRunId::generate();
    let writer = store.start(RunSpec::new(id.clone())).expect("a run with a new id can be started");
    assert_eq!(*writer.id(), id, "a writer must know its run");
    (id, writer)
}

fn append(writer: &mut dyn RunWriter, stream: Stream, bytes: impl AsRef<[u8]>) {
    writer.append(stream, bytes.as_ref()).expect("bytes can be appended to a live run");
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

fn finish(writer: Box<dyn RunWriter>) -> JobMetadata {
    writer.finish(success()).expect("a live run can be finished")
}

/// A finished run with this standard output.
fn finished(store: &dyn LogStore, stdout: &[u8]) -> JobRunId {
    let (id, mut writer) = start(store);
    append(&mut *writer, Stream::Stdout, stdout);
    finish(writer);
    id
}

/// All bytes of a log, read a few at a time.
fn all_bytes(store: &dyn LogStore, id: &JobRunId, stream: Stream, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let offset = crate::line::ByteOffset(all.len() as u64);
        let part = store.read_bytes(id, stream, offset, length).expect("bytes of a run can be read");
        assert!(part.len() <= length, "{} bytes were asked for, {} were given", length, part.len());
        if part.is_empty() {
            return all;
        }
        all.extend_from_slice(&part);
    }
}

/// The lines of a text, as bytes without their `\n`.
fn split(text: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
    if lines.last().is_some_and(|last| last.is_empty()) {
        lines.pop();
    }
    lines
}

fn show(lines: &[&[u8]]) -> Vec<String> {
    lines.iter().map(|line| line.escape_ascii().to_string()).collect()
}

/// Lets time go on until the store's clock must give another time than before.
async fn let_the_clock_move() {
    let then = UnixMicros::now();
    // Appends within a millisecond may share a time.
    while UnixMicros::now().0 < then.0 + 2_000 {
        tokio::task::yield_now().await;
    }
}

#[track_caller]
fn assert_not_found<T: std::fmt::Debug>(result: Result<T, LogError>, what: &str) {
    assert!(matches!(result, Err(LogError::NotFound { .. })), "{what} of an unknown run gave {result:?}");
}

#[track_caller]
fn assert_finished<T: std::fmt::Debug>(result: Result<T, LogError>, what: &str) {
    assert!(matches!(result, Err(LogError::Finished { .. })), "{what} after the end gave {result:?}");
}
