//! A log from whose end somebody else takes something while its run goes on: `> stdout.log` because the disk is full,
//! `logrotate` with `copytruncate`, `rm`. What was taken becomes a cut, as if it had been given up, and what is written
//! next stands where it would have stood. So no line gets the place or the number of another.

use super::cap::RunCap;
use super::half::{MERGE_MICROS, WriterHalf};
use super::hole::Hole;
use crate::error::LogError;
use crate::journal::{Cut, CutFurther, Place};
use crate::line::{Stream, UnixMicros};
use crate::logfile::ReadFile;
use crate::run::GapReason;
use crate::store::file::marks::JournalReader;

impl WriterHalf {
    /// Looks whether a log is as long as it was written, unless that was done a moment ago: a line after a silence never
    /// gets to a wrong place, and a flood of lines costs a look a millisecond.
    pub(super) fn look_if_due(&mut self, stream: Stream, now: UnixMicros) {
        let before = &mut self.looked[stream.index()];
        if now < *before || now.0 - before.0 >= MERGE_MICROS {
            *before = now;
            self.look(stream, now);
        }
    }

    /// The same of both logs, at once.
    pub(super) fn look_for_what_was_taken(&mut self) {
        let now = UnixMicros::now();
        Stream::BOTH.into_iter().for_each(|stream| self.look(stream, now));
    }

    fn look(&mut self, stream: Stream, now: UnixMicros) {
        // While a hole is open, the log ends where it began.
        if self.holes[stream.index()].is_some() {
            return;
        }
        let Some(files) = &mut self.files else { return };
        let taken = match files.logs[stream.index()].shortened() {
            Ok(None) => return,
            Ok(Some(length)) => self.cut_from(stream, length, now),
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            tracing::debug!(%error, %stream, "what was taken from a log is not told of yet");
        }
    }

    /// Gives up what stands behind the last mark that ends within the first `length` bytes of a log, and brings the log
    /// back to the length that it had.
    fn cut_from(&mut self, stream: Stream, length: u64, now: UnixMicros) -> Result<(), LogError> {
        self.write_marks();
        let Some(files) = self.files.as_ref().filter(|_| self.unwritten.is_empty()) else { return Ok(()) };
        let path = files.logs[stream.index()].path().to_owned();
        let known = self.cuts.of(stream);
        // A stream has one cut. In a run with a cap it begins within the head, and what its middle gives up joins it.
        let head = self.cap.as_ref().map(RunCap::head);
        let target = [known.map(|cut| cut.begin.offset), head].into_iter().flatten().fold(length, u64::min);
        let mut journal = JournalReader::new(ReadFile::open_when_there(files.journal.path())?);
        let begin = journal.last_while(self.written.journal, |at| at.of(stream).line_start <= target)?;
        let (from, to) = (*begin.of(stream), *self.progress.of(stream));
        tracing::warn!(path = %path.display(), length, written = to.bytes, "somebody else made the log of a run shorter; what is missing is counted");
        if to.line_start > from.line_start {
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
        }
        let unterminated = to.unterminated();
        if unterminated > 0 {
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
}
