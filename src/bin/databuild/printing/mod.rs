//! What is shown, and how.

mod lines;
mod table;
mod units;

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use databuild_logs::{Completion, GapNotice, GapReason, JobMetadata, JobRunId, StateKind};

pub(crate) use lines::{Format, Printer, Style, Terminal, printable};
pub(crate) use table::{Table, terminal_width};
pub(crate) use units::bytes as byte_count;
use units::bytes;
pub(crate) use units::duration;

/// A line on stderr, in one write: whoever reads it gets a whole line, whatever others write there. Nothing can be
/// done when it can't be written.
pub(crate) fn note(line: impl Display) {
    drop(io::stderr().write_all(format!("{line}\n").as_bytes()));
}

/// A line on stderr for somebody who watches; left out when stderr goes to a file or a pipe.
pub(crate) fn status(line: impl Display) {
    if io::stderr().is_terminal() {
        note(line);
    }
}

/// The hole in a log, as a line.
pub(crate) fn gap(gap: &GapNotice) -> String {
    let reason = match gap.reason {
        GapReason::DiskFull => "disk full",
        GapReason::RunSizeCap => "the run reached its size limit",
        GapReason::Corrupt => "the file is damaged",
    };
    let lines = if gap.lines == 1 { "1 line".to_owned() } else { format!("{} lines", gap.lines) };
    let were = if gap.lines == 1 { "was" } else { "were" };
    format!("-- {lines} of {} ({}) {were} not kept: {reason} --", gap.stream, bytes(gap.bytes))
}

/// How a run ended, as a line.
pub(crate) fn outcome(id: &JobRunId, end: &Completion) -> String {
    let (before, after) = match end.duration_ms {
        Some(ms) => (format!(" in {}", duration(ms)), format!(" after {}", duration(ms))),
        None => (String::new(), String::new()),
    };
    match (end.state, end.exit_code, end.signal) {
        (StateKind::Running, ..) => format!("run {id} goes on"),
        (StateKind::Succeeded, ..) => format!("run {id} succeeded{before}"),
        (StateKind::Cancelled, ..) => format!("run {id} was cancelled{after}"),
        (StateKind::Lost, ..) => format!("run {id} was lost: its writer died"),
        (StateKind::Failed, _, Some(signal)) => format!("run {id} was killed by signal {signal}{after}"),
        (StateKind::Failed, Some(code), None) => format!("run {id} failed with exit code {code}{after}"),
        (StateKind::Failed, None, None) => format!("run {id} failed{after}"),
    }
}

/// The command of a run on one line, with nothing in it that a terminal would obey.
pub(crate) fn command(run: &JobMetadata) -> String {
    let words = run.spec.command.iter().map(|word| match word.is_empty() || word.contains(' ') {
        true => format!("'{word}'"),
        false => word.clone(),
    });
    lines::printable(&words.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use databuild_logs::{LineNumber, RunSpec, Stream, UnixMicros};

    #[test]
    fn every_end_has_its_words() {
        let id: JobRunId = "r".parse().unwrap();
        let say = |state, exit_code, signal| {
            let duration_ms = Some(1234);
            let (lines, dropped_bytes, note) = (0, 0, None);
            let end = Completion { exit_code, signal, duration_ms, state, lines, dropped_bytes, note };
            outcome(&id, &end)
        };
        assert_eq!(say(StateKind::Succeeded, Some(0), None), "run r succeeded in 1.234 s");
        assert_eq!(say(StateKind::Failed, Some(2), None), "run r failed with exit code 2 after 1.234 s");
        assert_eq!(say(StateKind::Failed, None, Some(9)), "run r was killed by signal 9 after 1.234 s");
        assert_eq!(say(StateKind::Cancelled, None, Some(15)), "run r was cancelled after 1.234 s");
        assert_eq!(say(StateKind::Lost, None, None), "run r was lost: its writer died");
    }

    #[test]
    fn a_gap_says_how_much_and_why() {
        let (stream, from) = (Stream::Stderr, LineNumber(1));
        let hole = GapNotice { stream, from, lines: 12, bytes: 3400, reason: GapReason::DiskFull };
        assert_eq!(gap(&hole), "-- 12 lines of stderr (3.4 kB) were not kept: disk full --");
        let hole = GapNotice { lines: 1, bytes: 7, reason: GapReason::RunSizeCap, ..hole };
        assert_eq!(gap(&hole), "-- 1 line of stderr (7 B) was not kept: the run reached its size limit --");
    }

    #[test]
    fn a_command_cannot_drive_the_terminal() {
        let spec = RunSpec::new("r".parse().unwrap()).command(["echo", "a b", "\x1b[2J", ""]);
        assert_eq!(command(&JobMetadata::started(spec, UnixMicros(0))), "echo 'a b' ^[[2J ''");
    }
}
