//! A part of a stream that is being lost, from where it began until the disk takes more.

use crate::line::UnixMicros;
use crate::logfile::count_lines;
use crate::run::GapReason;

/// The longest time between two tries to go on behind a hole, in microseconds.
pub(super) const MAX_RETRY_MICROS: u64 = 100_000;

/// A part of a stream that is being lost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hole {
    pub(super) lines: u64,
    pub(super) bytes: u64,
    /// Whether the last byte lost was not a `\n`: the rest of that line is lost too.
    pub(super) within_line: bool,
    pub(super) reason: GapReason,
    /// When going on was last tried, and how long to wait before the next time, in microseconds: a disk that
    /// refuses everything is not asked at every line.
    pub(super) tried: UnixMicros,
    pub(super) wait: u64,
}

impl Hole {
    /// A hole that begins at this moment and swallows this unterminated part of a line.
    pub(super) const fn new(unterminated: u64, now: UnixMicros) -> Self {
        Self {
            lines: 0,
            bytes: unterminated,
            within_line: unterminated > 0,
            reason: GapReason::DiskFull,
            tried: now,
            wait: 0,
        }
    }

    /// Whether it is time to try to go on. A clock that went back does not make it wait longer.
    pub(super) const fn may_end(&self, now: UnixMicros) -> bool {
        now.0 < self.tried.0 || now.0 - self.tried.0 >= self.wait
    }

    pub(super) fn failed_to_end(&mut self, now: UnixMicros) {
        self.tried = now;
        self.wait = (self.wait * 2).clamp(1_000, MAX_RETRY_MICROS);
    }

    pub(super) fn swallow(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.lines += count_lines(bytes);
        self.bytes += bytes.len() as u64;
        self.within_line = *last != b'\n';
    }
}
