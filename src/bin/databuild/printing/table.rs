//! A table of runs, fitted to the terminal.

use std::collections::HashSet;
use std::io::{self, IsTerminal, Write};

use databuild_logs::{Exit, JobMetadata, JobRunId, StateKind, UnixMicros};

use super::command;
use super::units::{bytes, duration};

const HEAD: [&str; 8] = ["RUN", "STATE", "EXIT", "STARTED", "TOOK", "LINES", "SIZE", "COMMAND"];

/// What stands to the right in its column: numbers.
const TO_THE_RIGHT: [bool; 8] = [false, false, true, false, true, true, true, false];

/// The column of the state, which is coloured.
const STATE: usize = 1;

/// Runs in rows and columns.
pub(crate) struct Table {
    rows: Vec<(StateKind, [String; 8])>,
}

impl Table {
    /// The runs as they are at this moment.
    pub(crate) fn new(runs: &[JobMetadata], pinned: &HashSet<JobRunId>, now: UnixMicros) -> Self {
        let row = |run: &JobMetadata| (run.state.kind(), row(run, pinned.contains(run.id()), now));
        Self { rows: runs.iter().map(row).collect() }
    }

    /// Writes the table. Only the last column is shortened to fit the width, if there is one.
    pub(crate) fn write(&self, out: &mut impl Write, width: Option<usize>, color: bool) -> io::Result<()> {
        let head = HEAD.map(str::to_owned);
        let longest = |column: usize| {
            let cells = self.rows.iter().map(|(_, row)| &row[column]).chain([&head[column]]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: [usize; 8] = std::array::from_fn(longest);
        let states = self.rows.iter().map(|(state, row)| (color.then_some(*state), row));
        for (state, row) in [(None, &head)].into_iter().chain(states) {
            let mut used = 0;
            for (column, cell) in row.iter().enumerate() {
                let padding = widths[column] - cell.chars().count();
                if column == HEAD.len() - 1 {
                    let room = width.map_or(usize::MAX, |width| width.saturating_sub(used).max(1));
                    writeln!(out, "{}", shortened(cell, room))?;
                    break;
                }
                let (before, after) = if TO_THE_RIGHT[column] { (padding, 0) } else { (0, padding) };
                let (on, off) = match state.filter(|_| column == STATE) {
                    Some(state) => (color_of(state), "\x1b[0m"),
                    None => ("", ""),
                };
                write!(out, "{:before$}{on}{cell}{off}{:after$}  ", "", "")?;
                used += widths[column] + 2;
            }
        }
        Ok(())
    }
}

fn row(run: &JobMetadata, pinned: bool, now: UnixMicros) -> [String; 8] {
    let exit = match run.state.exit() {
        Some(Exit::Code(code)) => code.to_string(),
        Some(Exit::Signal(signal)) => format!("SIG {signal}"),
        None => "-".to_owned(),
    };
    let totals = run.stdout.plus(run.stderr);
    let took = run.duration_ms().unwrap_or_else(|| now.millis_since(run.started_at));
    [
        run.id().to_string(),
        format!("{}{}", run.state.kind(), if pinned { ", pinned" } else { "" }),
        exit,
        seconds(run.started_at),
        duration(took),
        totals.lines.to_string(),
        bytes(totals.bytes),
        command(run),
    ]
}

/// A time to the second: `2026-01-31 10:42:00Z`.
fn seconds(time: UnixMicros) -> String {
    let text = time.to_string();
    match text.split_once('.') {
        Some((seconds, _)) => format!("{}Z", seconds.replace('T', " ")),
        None => text,
    }
}

const fn color_of(state: StateKind) -> &'static str {
    match state {
        StateKind::Running => "\x1b[36m",
        StateKind::Succeeded => "\x1b[32m",
        StateKind::Failed | StateKind::Lost => "\x1b[31m",
        StateKind::Cancelled => "\x1b[33m",
    }
}

fn shortened(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    text.chars().take(room - 1).chain(['…']).collect()
}

/// How many columns standard output has, if it is a terminal.
pub(crate) fn terminal_width() -> Option<usize> {
    let stdout = io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok()).flatten()?;
    Some(usize::from(size.ws_col)).filter(|&columns| columns > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use databuild_logs::{RunSpec, RunState, StreamTotals};

    fn table(width: Option<usize>, color: bool) -> String {
        let started = UnixMicros(1_790_000_000_000_000);
        let run = |id: &str, state| {
            let spec = RunSpec::new(id.parse().unwrap()).command(["make", "everything"]);
            let stdout = StreamTotals { bytes: 3400, lines: 12, ..StreamTotals::default() };
            JobMetadata { state, stdout, ..JobMetadata::started(spec, started) }
        };
        let ended = UnixMicros(started.0 + 1_234_000);
        let runs =
            [run("a", RunState::Running), run("longer", RunState::Failed { ended, exit: Exit::Signal(9) })];
        let mut out = Vec::new();
        let now = UnixMicros(started.0 + 61_000_000);
        let pinned = HashSet::from(["longer".parse().unwrap()]);
        Table::new(&runs, &pinned, now).write(&mut out, width, color).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let expected = "\
RUN     STATE            EXIT  STARTED                    TOOK  LINES    SIZE  COMMAND
a       running             -  2026-09-21 14:13:20Z  1 min 1 s     12  3.4 kB  make everything
longer  failed, pinned  SIG 9  2026-09-21 14:13:20Z    1.234 s     12  3.4 kB  make everything
";
        assert_eq!(table(None, false), expected);
    }

    #[test]
    fn the_command_is_shortened_to_the_terminal() {
        let text = table(Some(87), false);
        assert!(text.lines().all(|line| line.chars().count() <= 87), "{text}");
        assert!(text.contains("make ev…"), "{text}");
        assert!(table(Some(3), false).lines().skip(1).all(|line| line.ends_with('…')));
    }

    #[test]
    fn states_are_coloured_only_when_that_is_wanted() {
        assert!(table(None, true).contains("\x1b[31mfailed, pinned\x1b[0m"));
        assert!(!table(None, false).contains('\x1b'));
    }
}
