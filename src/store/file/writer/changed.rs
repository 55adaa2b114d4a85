//! A log that somebody else changes while its run goes on: `> stdout.log` because the disk is full, `logrotate`, `rm`,
//! `sed -i`. What was taken becomes a cut, as if it had been given up, and what is written next stands where it would have
//! stood; what was added stays. So no line gets the place or the number of another.
//!
//! The length of a log is looked at before an append, but not more often than each [`LOOK_MICROS`]. What was appended in
//! between is told by where it ended if it got to a wrong place, and counts as taken too.

use std::io;

use super::cap::RunCap;
use super::half::{MERGE_MICROS, WriterHalf};
use super::hole::Hole;
use crate::error::LogError;
use crate::journal::{Cut, CutFurther, Place};
use crate::line::{Stream, UnixMicros};
use crate::logfile::{Changed, ReadFile};
use crate::run::GapReason;
use crate::store::file::marks::JournalReader;

/// So many microseconds after a log was looked at it is as it was then. Two calls to the system for each line of 100
/// bytes would take a third of the speed at which such lines are appended; a job's output is read in longer steps.
const LOOK_MICROS: u64 = 5;

/// When a log was looked at last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looked {
    length: UnixMicros,
    path: UnixMicros,
}

/// Whether so much time has gone by; also if the clock was set back.
fn is_past(before: UnixMicros, micros: u64, now: UnixMicros) -> bool {
    now < before || now.0 - before.0 >= micros
}

impl WriterHalf {
    /// Looks whether somebody else has changed a log, unless that was done a moment ago.
    ///
    /// # Errors
    ///
    /// As [`look`](Self::look).
    pub(super) fn look_if_due(&mut self, stream: Stream, now: UnixMicros) -> Result<(), LogError> {
        let before = &mut self.looked[stream.index()];
        if !is_past(before.length, LOOK_MICROS, now) {
            return Ok(());
        }
        before.length = now;
        if is_past(before.path, MERGE_MICROS, now) {
            before.path = now;
            return self.look(stream, now).map(drop);
        }
        let Some(files) = &mut self.files else { return Ok(()) };
        let changed = files.logs[stream.index()].changed()?;
        self.take_in(stream, changed, now).map(drop)
    }

    /// The same of both logs, at once.
    pub(super) fn look_for_what_was_taken(&mut self) {
        let now = UnixMicros::now();
        for stream in Stream::BOTH {
            if let Err(error) = self.look(stream, now) {
                tracing::warn!(%error, %stream, "what was taken from a log is not told of");
            }
        }
    }

    /// Looks whether a log is where it was, and as long as it was written. What is missing is counted, and what others
    /// appended is taken over; true says that there was something.
    ///
    /// # Errors
    ///
    /// What kept the journal from being told. What is appended then would get to a wrong place.
    pub(super) fn look(&mut self, stream: Stream, now: UnixMicros) -> Result<bool, LogError> {
        let Some(files) = &mut self.files else { return Ok(false) };
        let changed = files.changed(stream)?;
        self.take_in(stream, changed, now)
    }

    fn take_in(
        &mut self,
        stream: Stream,
        changed: Option<Changed>,
        now: UnixMicros,
    ) -> Result<bool, LogError> {
        match changed {
            None => return Ok(false),
            Some(Changed::Shorter(length)) => self.cut_from(stream, length, now)?,
            // Behind a hole that is still open nothing is kept.
            Some(Changed::Longer(_)) if self.holes[stream.index()].is_some() => {
                let Some(files) = &mut self.files else { return Ok(false) };
                let log = &mut files.logs[stream.index()];
                log.cut(log.len())?;
            }
            Some(Changed::Longer(length)) => self.take_over(stream, length, now)?,
        }
        Ok(true)
    }

    /// Counts what somebody else has appended to a log as what was printed: readers may have been given it.
    fn take_over(&mut self, stream: Stream, length: u64, now: UnixMicros) -> Result<(), LogError> {
        let mut buffer = vec![0; 64 * 1024];
        while let Some(files) = &mut self.files {
            let log = &mut files.logs[stream.index()];
            let left = usize::try_from(length - log.len()).unwrap_or(usize::MAX);
            if left == 0 {
                break;
            }
            let piece = &mut buffer[..left.min(64 * 1024)];
            log.take_over(piece)?;
            self.arrived(stream, piece, now);
            // It may be much.
            self.write_marks();
        }
        tracing::warn!(%stream, length, "somebody else wrote into the log of a run; that counts as printed");
        Ok(())
    }

    /// Gives up what stands behind the last mark that ends within the first `length` bytes of a log, if a line is missing
    /// that had ended, and brings the log back to the length that it had.
    fn cut_from(&mut self, stream: Stream, length: u64, now: UnixMicros) -> Result<(), LogError> {
        self.write_marks();
        let Some(files) = &self.files else { return Ok(()) };
        if !self.unwritten.is_empty() {
            let waits = io::Error::other("what came before has not been written yet");
            return Err(LogError::io("telling the journal", files.journal.path())(waits));
        }
        let path = files.logs[stream.index()].path();
        let to = *self.progress.of(stream);
        tracing::warn!(path = %path.display(), length, written = to.bytes, "somebody else made the log of a run shorter; what is missing is counted");
        if length < to.line_start {
            self.give_up_from(stream, length)?;
        }
        let unterminated = to.unterminated();
        // What has a hole open lost its unfinished line to that.
        if unterminated > 0 && self.holes[stream.index()].is_none() {
            self.holes[stream.index()] =
                Some(Hole { reason: GapReason::Corrupt, ..Hole::new(unterminated, now) });
        }
        let Some(files) = &mut self.files else { return Ok(()) };
        let log = &mut files.logs[stream.index()];
        if to.line_start == 0 {
            return log.cut(0);
        }
        // The place behind a cut is known by the end of the line before it.
        log.cut(to.line_start - 1)?;
        log.append(b"\n").or_else(|_| log.cut(to.line_start))?;
        if files.syncs {
            // After a power cut, what was taken must not look like what the power cut took.
            files.journal.sync()?;
        }
        Ok(())
    }

    /// Tells the journal of lines that are missing behind the last mark that ends within the first `length` bytes.
    fn give_up_from(&mut self, stream: Stream, length: u64) -> Result<(), LogError> {
        let Some(files) = &self.files else { return Ok(()) };
        let known = self.cuts.of(stream);
        // A stream has one cut. In a run with a cap it begins within the head, and what its middle gives up joins it.
        let head = self.cap.as_ref().map(RunCap::head);
        let target = [known.map(|cut| cut.begin.offset), head].into_iter().flatten().fold(length, u64::min);
        let mut journal = JournalReader::new(ReadFile::open_when_there(files.journal.path())?);
        let begin = journal.last_while(self.written.journal, |at| at.of(stream).line_start <= target)?;
        let (from, to) = (*begin.of(stream), *self.progress.of(stream));
        if to.line_start <= from.line_start {
            return Ok(());
        }
        let cut = Cut {
            stream,
            begin: Place { lines: from.lines, offset: from.line_start },
            end: Place { lines: to.lines, offset: to.line_start },
            by_others: true,
        };
        let lost_before = to.dropped_lines - from.dropped_lines;
        let given_up_before = known.map_or(0, |cut| cut.bytes());
        self.tell_of_cut(&CutFurther {
            cut,
            lines: cut.lines() - lost_before,
            bytes: cut.bytes() - given_up_before,
        })?;
        if let Some(cap) = &mut self.cap {
            cap.was_taken(stream, cut.begin, self.written);
        }
        Ok(())
    }
}
