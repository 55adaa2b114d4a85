//! `databuild index`: looks after the index of a log folder, while no service has it.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use databuild_logs::{
    CheckOptions, CheckReport, Finding, FindingKind, LogError, RebuildProgress, RebuildReport, Repair,
    check_index, compact_index, dump_index, rebuild_index,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{CheckArgs, DumpArgs, IndexCommand, OfflineArgs, RebuildArgs, RunsFormat};
use crate::failure::{Code, Failure, shown};
use crate::printing::{byte_count, note};
use crate::settings::Settings;

/// How often to ask whether the index is free by now.
const WAIT: Duration = Duration::from_millis(200);
/// How often a line says how far it is, where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Does what is asked for with the index of the log folder.
pub(crate) fn run(command: &IndexCommand, settings: &Settings) -> Result<ExitCode, Failure> {
    let dir = settings.log_dir()?.value;
    let is_there = match dir.is_dir() {
        true => Ok(()),
        false => {
            let what = format_args!("the log folder {} does not exist", dir.display());
            Err(Failure::new(Code::General, what))
        }
    };
    match command {
        IndexCommand::Rebuild(args) => is_there.and_then(|()| rebuild(args, &dir)),
        IndexCommand::Check(args) => show_check(args, is_there.and_then(|()| check(args, &dir))),
        IndexCommand::Compact(args) => is_there.and_then(|()| compact(*args, &dir)),
        IndexCommand::Dump(args) => is_there.and_then(|()| dump(args, &dir)),
    }
}

fn rebuild(args: &RebuildArgs, dir: &Path) -> Result<ExitCode, Failure> {
    let began = Instant::now();
    let report = when_free(args.offline, || {
        let mut shown = Shown::new("rebuilding");
        rebuild_index(dir, |progress| shown.tell(progress))
    })?;
    let mut out = io::stdout().lock();
    let printed = match args.output {
        RunsFormat::Json => print_json(&mut out, &report),
        RunsFormat::Text => print_rebuilt(&mut out, &report, began.elapsed()),
    };
    if let Some(why) = &report.old_index {
        note(format_args!("databuild: what the old index knew of evicted runs is lost: {why}"));
    }
    for run in &report.unreadable {
        note(format_args!("databuild: run {} is left out: {}", run.run, run.why));
    }
    shown(report.unreadable.is_empty(), printed)
}

fn check(args: &CheckArgs, dir: &Path) -> Result<CheckReport, Failure> {
    let options = CheckOptions { deep: args.deep, repair: args.repair };
    when_free(args.offline, || {
        let mut shown = Shown::new("checking");
        check_index(dir, options, |progress| shown.tell(progress))
    })
}

/// Shows what a check found. Where it could not look, that is another code than that of findings.
fn show_check(args: &CheckArgs, checked: Result<CheckReport, Failure>) -> Result<ExitCode, Failure> {
    let mut out = BufWriter::new(io::stdout().lock());
    let report = match checked {
        Ok(report) => report,
        Err(failure) => {
            if args.output == RunsFormat::Json {
                // The same is said on stderr, and the code tells it whether this is read or not.
                drop(print_json(&mut out, &serde_json::json!({ "error": failure.message() })));
            }
            return Err(failure.with(Code::NotChecked));
        }
    };
    let printed = match args.output {
        RunsFormat::Json => print_json(&mut out, &report),
        RunsFormat::Text => print_check(&mut out, &report),
    };
    shown(report.is_clean(), printed)
}

fn compact(args: OfflineArgs, dir: &Path) -> Result<ExitCode, Failure> {
    let (before, after) = when_free(args, || compact_index(dir))?;
    writeln!(io::stdout(), "index.redb: {} before, {} after", byte_count(before), byte_count(after))?;
    Ok(ExitCode::SUCCESS)
}

fn dump(args: &DumpArgs, dir: &Path) -> Result<ExitCode, Failure> {
    let mut out = BufWriter::new(io::stdout().lock());
    let mut failed = None;
    let dumped = when_free(args.offline, || {
        dump_index(dir, |row| {
            let written = serde_json::to_writer(&mut out, &row).map_err(io::Error::from);
            written.and_then(|()| out.write_all(b"\n")).map_err(|error| {
                failed = Some(error);
                LogError::Closed
            })
        })
    });
    if let Some(error) = failed {
        return Err(error.into());
    }
    dumped?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Does what needs the index for itself, and waits for that if it is asked to.
fn when_free<T>(args: OfflineArgs, mut act: impl FnMut() -> Result<T, LogError>) -> Result<T, Failure> {
    let mut waiting = false;
    loop {
        match act() {
            Err(LogError::InUse { .. }) if args.wait => {
                if !waiting {
                    note("waiting until nobody else has the index");
                }
                waiting = true;
                std::thread::sleep(WAIT);
            }
            Err(error @ LogError::InUse { .. }) => {
                let hint = "stop the service first, or let --wait wait for that";
                return Err(Failure::from(error).hint(hint));
            }
            done => return Ok(done?),
        }
    }
}

fn print_json(out: &mut impl Write, report: &impl serde::Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, report)?;
    out.write_all(b"\n")?;
    out.flush()
}

fn print_rebuilt(out: &mut impl Write, report: &RebuildReport, took: Duration) -> io::Result<()> {
    let RebuildReport { runs, places, live, scanned, tombstones, .. } = report;
    let seconds = took.as_secs_f64();
    writeln!(out, "{runs} runs and {places} places in their logs indexed in {seconds:.1} s")?;
    writeln!(
        out,
        "{live} of them not over, {scanned} without a sound journal, {tombstones} evicted runs kept"
    )
}

fn print_check(out: &mut impl Write, report: &CheckReport) -> io::Result<()> {
    for Finding { kind, run, detail, repair } in &report.findings {
        let run = run.as_ref().map(|run| format!(" of run {run}")).unwrap_or_default();
        let done = match repair {
            Repair::NotAsked => String::new(),
            Repair::Done { how } => format!("; mended: {how}"),
            Repair::Impossible { why } => format!("; not mended: {why}"),
        };
        writeln!(out, "{}{run}: {detail}{done}", words(*kind))?;
    }
    let CheckReport { runs, live, findings } = report;
    let of_them = if *live > 0 { format!(" ({live} of them being written)") } else { String::new() };
    match findings.len() {
        0 => writeln!(out, "{runs} runs looked at{of_them}: everything agrees")?,
        1 => writeln!(out, "{runs} runs looked at{of_them}: 1 finding")?,
        count => writeln!(out, "{runs} runs looked at{of_them}: {count} findings")?,
    }
    out.flush()
}

const fn words(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::IndexMissing => "no index",
        FindingKind::IndexDamaged => "damaged index",
        FindingKind::Ghost => "rows without a folder",
        FindingKind::Orphan => "folder without rows",
        FindingKind::RecordDiffers => "outdated row",
        FindingKind::PlacesDiffer => "wrong places",
        FindingKind::StrayRows => "stray rows",
        FindingKind::Abandoned => "lost writer",
        FindingKind::JournalTorn => "torn journal",
        FindingKind::JournalDamaged => "damaged journal",
        FindingKind::MetadataMissing => "no metadata.json",
        FindingKind::MetadataDiffers => "wrong metadata.json",
        FindingKind::LogShort => "short log",
        FindingKind::LogLong => "long log",
        FindingKind::LinesDiffer => "changed log",
        FindingKind::CompressedDamaged => "damaged frame",
        FindingKind::TotalsDiffer => "wrong sizes",
        FindingKind::Leftover => "leftover",
        FindingKind::Unreadable => "unreadable folder",
    }
}

/// How far something is: a bar on a terminal, a line now and then elsewhere.
struct Shown {
    what: &'static str,
    bar: Option<ProgressBar>,
    last: Instant,
}

impl Shown {
    fn new(what: &'static str) -> Self {
        Self { what, bar: None, last: Instant::now() }
    }

    fn tell(&mut self, progress: RebuildProgress) {
        let RebuildProgress { runs, of_runs } = progress;
        if io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(|| bar(self.what, of_runs));
            bar.set_position(runs);
        } else if self.last.elapsed() >= LINE_EVERY {
            self.last = Instant::now();
            note(format_args!("{}: {runs} of {of_runs} runs", self.what));
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &'static str, of_runs: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {human_pos} of {human_len} runs, {eta} left");
    let bar = ProgressBar::new(of_runs).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
