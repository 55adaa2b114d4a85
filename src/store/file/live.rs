//! A run as its readers see it: how far it has come, and a signal that it has come further.
//!
//! Writers publish here after the bytes are in the file; readers never hold anything but their position, so they
//! can neither slow a writer down nor fall behind what is kept for them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::error::LogError;
use crate::index::RunNumber;
use crate::index::codec::RunRecord;
use crate::index::progress::{Checkpoints, Cuts, GapAt, LineCheckpoint, MAX_GAPS, Progress};
use crate::journal::Arrival;
use crate::layout::RunFolder;
use crate::line::{Stream, View};
use crate::run::{JobMetadata, JobRunId, Tombstone};
use crate::store::file::identity::is_of;

/// The most checkpoints that wait for the index; beyond that every second one is let go, and the searches that
/// would have used it take twice as long.
pub(crate) const MAX_WAITING: usize = 16_384;

/// A run that can be read. It may be over already.
#[derive(Debug)]
pub(crate) struct LiveRun {
    pub(crate) id: JobRunId,
    pub(crate) folder: RunFolder,
    /// The run's number in the index; `None` in a store without one.
    pub(crate) number: Option<RunNumber>,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
}

/// How far a run has come.
#[derive(Debug)]
pub(crate) struct State {
    /// What is known of the run; its stream totals are those of `progress` while it goes on.
    pub(crate) run: JobMetadata,
    pub(crate) progress: Progress,
    /// Bytes of each log file that may be read.
    pub(crate) visible: [u64; 2],
    /// What arrived and is not in the journal yet.
    pub(crate) tail: Vec<Arrival>,
    /// The first [`MAX_GAPS`] holes.
    pub(crate) gaps: Arc<Vec<GapAt>>,
    pub(crate) cuts: Cuts,
    pub(crate) has_journal: bool,
    /// Bytes that the folder takes up on disk, once the run is over.
    pub(crate) disk_bytes: u64,
    /// Whether its logs and its journal are compressed.
    pub(crate) compressed: bool,
    pub(crate) waiting: Waiting,
    /// Whether it is never to be evicted.
    pub(crate) pinned: bool,
    /// Whether the run is taken up anew: who reads it has to ask for it again.
    pub(crate) is_replaced: bool,
    /// What is left of the run, once it is evicted.
    pub(crate) evicted: Option<Box<Tombstone>>,
}

/// What waits to be written to the index.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Whether anything waits at all, the run's record included.
    pub(crate) dirty: bool,
    /// Whether a pin was set or taken away since the record was written.
    pub(crate) pin: bool,
    pub(crate) lines: Vec<LineCheckpoint>,
    pub(crate) places: Vec<Progress>,
}

impl Waiting {
    pub(crate) fn push(&mut self, found: Checkpoints) {
        self.extend(found.line, found.progress);
    }

    pub(crate) fn extend(
        &mut self,
        lines: impl IntoIterator<Item = LineCheckpoint>,
        places: impl IntoIterator<Item = Progress>,
    ) {
        self.lines.extend(lines);
        self.places.extend(places);
        thin_out(&mut self.lines);
        thin_out(&mut self.places);
    }

    /// Lets go of what the index has: the first so many of each.
    pub(crate) fn committed(&mut self, lines: usize, places: usize) {
        self.lines.drain(..lines.min(self.lines.len()));
        self.places.drain(..places.min(self.places.len()));
    }
}

fn thin_out<T>(waiting: &mut Vec<T>) {
    while waiting.len() > MAX_WAITING {
        let mut keep = false;
        waiting.retain(|_| {
            keep = !keep;
            keep
        });
    }
}

impl LiveRun {
    pub(crate) fn new(
        folder: RunFolder,
        number: Option<RunNumber>,
        run: JobMetadata,
        progress: Progress,
        has_journal: bool,
    ) -> Self {
        let state = State {
            visible: progress.streams.map(|stream| stream.bytes),
            progress,
            tail: Vec::new(),
            gaps: Arc::default(),
            cuts: Cuts::default(),
            has_journal,
            disk_bytes: 0,
            compressed: false,
            waiting: Waiting { dirty: true, ..Waiting::default() },
            pinned: false,
            is_replaced: false,
            evicted: None,
            run,
        };
        Self::with_state(folder, number, state)
    }

    /// A run that is over, from its record in the index.
    pub(crate) fn over(folder: RunFolder, number: Option<RunNumber>, record: RunRecord) -> Self {
        let RunRecord { run, gaps, cuts, has_journal, disk_bytes, compressed } = record;
        // The journal is read up to its end record, wherever that is.
        let journal = if has_journal { u64::MAX } else { 0 };
        let mut progress = Progress::start(run.state.ended().unwrap_or(run.started_at), journal);
        for stream in Stream::BOTH {
            let totals = run.totals(stream);
            let at = &mut progress.streams[stream.index()];
            (at.bytes, at.lines) = (totals.bytes, totals.lines);
            at.line_start = totals.bytes;
        }
        let state = State {
            visible: [run.stdout.bytes, run.stderr.bytes],
            progress,
            tail: Vec::new(),
            gaps: Arc::new(gaps),
            cuts,
            has_journal,
            disk_bytes,
            compressed,
            waiting: Waiting::default(),
            pinned: false,
            is_replaced: false,
            evicted: None,
            run,
        };
        Self::with_state(folder, number, state)
    }

    fn with_state(folder: RunFolder, number: Option<RunNumber>, state: State) -> Self {
        let id = state.run.id().clone();
        Self { id, folder, number, state: Mutex::new(state), changes: watch::Sender::new(0) }
    }

    /// The state, for a look; nothing may block while it is held.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes the readers.
    ///
    /// Where nobody reads, nobody is woken: that took a fifth of what the append of a line takes. Whoever begins to read
    /// has the signal before the state is looked at, so under its lock it is seen who reads.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let value = change(&mut state);
        let is_read = self.changes.receiver_count() > 0;
        drop(state);
        if is_read {
            self.changes.send_modify(|count| *count += 1);
        }
        value
    }

    /// A signal that changes whenever the state does, from when it is had; the state is to be looked at after that.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state().run.state.is_over()
    }

    /// Whether another run is in its folder by now.
    pub(crate) fn is_outlived(&self) -> bool {
        let record = self.state().record();
        matches!(self.folder.is_there(), Ok(true)) && !is_of(&self.folder, &record)
    }

    /// What is known of the run at this moment.
    pub(crate) fn metadata(&self) -> JobMetadata {
        self.state().metadata()
    }
}

impl State {
    /// What is known of the run at this moment.
    pub(crate) fn metadata(&self) -> JobMetadata {
        let mut run = self.run.clone();
        if !run.state.is_over() {
            [run.stdout, run.stderr] = self.progress.streams.map(|stream| stream.totals());
        }
        run
    }

    /// Takes in holes that come behind those that are known.
    pub(crate) fn add_gaps(&mut self, gaps: &[GapAt]) {
        let room = MAX_GAPS.saturating_sub(self.gaps.len()).min(gaps.len());
        if room > 0 {
            Arc::make_mut(&mut self.gaps).extend_from_slice(&gaps[..room]);
        }
    }

    /// Whether every hole is known here; if not, only the journal tells of all of them.
    pub(crate) fn has_all_gaps(&self) -> bool {
        self.gaps.len() < MAX_GAPS
    }

    /// The run's record for the index.
    pub(crate) fn record(&self) -> RunRecord {
        RunRecord {
            run: self.metadata(),
            gaps: self.gaps.to_vec(),
            cuts: self.cuts,
            has_journal: self.has_journal,
            disk_bytes: self.disk_bytes,
            compressed: self.compressed,
        }
    }

    /// The lines of a view at this moment; an unterminated last one counts once the run is over.
    pub(crate) fn lines(&self, view: View) -> u64 {
        match view {
            View::One(stream) => self.end_of(stream).0,
            View::All => self.end_of(Stream::Stdout).0.saturating_add(self.end_of(Stream::Stderr).0),
        }
    }

    /// The lines of a stream at this moment, and the bytes up to the end of the last of them.
    pub(crate) fn end_of(&self, stream: Stream) -> (u64, u64) {
        if self.run.state.is_over() {
            let totals = self.run.totals(stream);
            (totals.lines, totals.bytes)
        } else {
            let at = self.progress.of(stream);
            (at.lines, at.line_start)
        }
    }

    /// The place in a log file that was last kept before `line` and waits for the index: (lines before, offset).
    pub(crate) fn waiting_line_floor(&self, stream: Stream, line: u64) -> Option<(u64, u64)> {
        let mut waiting = self.waiting.lines.iter().rev();
        waiting.find(|at| at.stream == stream && at.line <= line).map(|at| (at.line, at.offset))
    }

    /// The last waiting place in the journal for which `is_before` holds.
    pub(crate) fn waiting_place(&self, is_before: impl Fn(&Progress) -> bool) -> Option<Progress> {
        self.waiting.places.iter().rev().find(|place| is_before(place)).copied()
    }
}

/// The error for a run that nothing can be appended to any more.
pub(crate) fn finished(id: &JobRunId) -> LogError {
    LogError::Finished { id: id.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line::UnixMicros;

    #[test]
    fn however_many_places_come_at_once_few_wait_and_they_lie_apart() {
        let place = |line| LineCheckpoint {
            stream: Stream::Stdout,
            line,
            offset: 100 * line,
            time: UnixMicros::default(),
        };
        let all = 5 * MAX_WAITING as u64;
        let mut waiting = Waiting::default();
        waiting.extend((0..all).map(place), []);
        assert!(waiting.lines.len() <= MAX_WAITING);
        let steps = waiting.lines.windows(2).map(|pair| pair[1].line - pair[0].line);
        assert!(steps.into_iter().all(|step| step == 8), "of eight one is left");
    }
}
