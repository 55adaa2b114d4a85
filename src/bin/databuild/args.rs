//! The command line as it is written. What it means is checked by each verb.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use databuild_logs::{LineNumber, StateKind};

use crate::run;

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 not understood, 3 no such run, 4 `databuild index check` could not look, 5 no service \
answers, 130 after Ctrl-C. `databuild run` and `databuild logs --exit-status` exit with the code of the job; \
`databuild run --help` says what 125 to 127 mean.";

/// Runs jobs, keeps their logs, and shows them while they are written and after.
#[derive(Debug, Parser)]
#[command(name = "databuild", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every verb takes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Globals {
    /// The folder that holds the logs [env: DATABUILD_LOG_DIR] [default: /var/log/databuild, or the user's own]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) log_dir: Option<PathBuf>,
    /// The service to ask [env: DATABUILD_LOG_SERVER] [default: http://127.0.0.1:7780]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) server: Option<String>,
    /// When to use colours; NO_COLOR turns `auto` off
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: ColorWhen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorWhen {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::RunArgs),
    /// Serve the logs in a folder over HTTP
    Serve(ServeArgs),
    /// Show the log of a run
    Logs(LogsArgs),
    /// List runs, newest first
    Runs(RunsArgs),
    /// Evict runs that are over: what the policy says, or what the flags say in its place; exits with 1 if some of
    /// it failed
    Gc(GcArgs),
    /// Look after the index of a log folder, while no service has it
    #[command(subcommand)]
    Index(IndexCommand),
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen [env: DATABUILD_LOG_LISTEN] [default: 127.0.0.1:7780]; an address that other machines
    /// reach needs a token in DATABUILD_LOG_TOKEN
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The run: its id, the beginning of it, or `latest`
    pub(crate) run: String,
    /// Go on with new lines until the run ends; wait for one that has not started
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines; with --follow, of those that are there already
    #[arg(short = 'n', long, value_name = "N|all", default_value = "all", allow_negative_numbers = true)]
    pub(crate) tail: Tail,
    /// Only what comes after line N
    #[arg(long, value_name = "N", value_parser = line_number, allow_negative_numbers = true)]
    pub(crate) since_line: Option<LineNumber>,
    #[command(flatten)]
    pub(crate) view: ViewArgs,
    /// Show when each line arrived; with --all, its stream too
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// text: lines; json: an object a line; raw: the bytes as they are
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: LogFormat,
    /// With --follow, do not wait for a run that has not started
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Exit with the code that the run exited with
    #[arg(long)]
    pub(crate) exit_status: bool,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct ViewArgs {
    /// Show standard output (the default)
    #[arg(long)]
    pub(crate) stdout: bool,
    /// Show standard error
    #[arg(long)]
    pub(crate) stderr: bool,
    /// Show both, in the order in which their lines arrived
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
    Raw,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct RunsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<RunsCommand>,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

/// What can be done with one run.
#[derive(Debug, Subcommand)]
pub(crate) enum RunsCommand {
    /// Never evict a run
    Pin(PinArgs),
    /// Let a run be evicted again when its time comes
    Unpin(PinArgs),
    /// Compress the logs and the journal of a run that is over; it reads the same
    Compress(CompressArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PinArgs {
    /// The run: its id, the beginning of it, or `latest`
    pub(crate) run: String,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one)]
    pub(crate) limit: u64,
    /// Only runs in this state: running, succeeded, failed, cancelled or lost
    #[arg(long)]
    pub(crate) state: Option<StateKind>,
    /// Only runs that build this partition
    #[arg(long)]
    pub(crate) partition: Option<String>,
    /// text: a table; json: an object a line
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: RunsFormat,
}

#[derive(Debug, Args)]
pub(crate) struct CompressArgs {
    /// The run: its id, the beginning of it, or `latest`
    pub(crate) run: String,
    /// text: a line; json: an object
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: RunsFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunsFormat {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// Only say what would be evicted
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Evict runs that ended longer ago than this, such as 7d, 12h, 30m or 45s; 0: however old [default: the policy]
    #[arg(long, value_name = "AGE", value_parser = age, allow_negative_numbers = true)]
    pub(crate) older_than: Option<Duration>,
    /// Evict the oldest runs until all takes up no more than this, such as 10GB, 500MB or 1GiB; 0: whatever it takes up
    /// [default: the policy]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_negative_numbers = true)]
    pub(crate) max_size: Option<u64>,
    /// Keep the newest N runs in any case [default: the policy]
    #[arg(long, value_name = "N", value_parser = number_of_runs, allow_negative_numbers = true)]
    pub(crate) keep_last: Option<u64>,
    /// text: a line a run; json: an object
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: RunsFormat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum IndexCommand {
    /// Make the index anew from the run folders
    Rebuild(RebuildArgs),
    /// Compare files, journals, index and metadata; exits with 1 if something does not agree, with 4 if it could not look
    Check(CheckArgs),
    /// Give the space in the index that is not used back to the file system
    Compact(OfflineArgs),
    /// Show every row of the index, with run ids in place of run numbers
    Dump(DumpArgs),
}

/// What all that needs the index for itself takes.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OfflineArgs {
    /// Wait until no service and no other command has the index
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RebuildArgs {
    #[command(flatten)]
    pub(crate) offline: OfflineArgs,
    /// text: a summary; json: an object
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: RunsFormat,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) offline: OfflineArgs,
    /// Read every log, count its lines and look at every checkpoint
    #[arg(long)]
    pub(crate) deep: bool,
    /// Mend what can be mended, and say what was done; exits with 0 if everything agrees then
    #[arg(long)]
    pub(crate) repair: bool,
    /// text: a line a finding; json: an object
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: RunsFormat,
}

#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    #[command(flatten)]
    pub(crate) offline: OfflineArgs,
    /// json: an object a line
    #[arg(short, long, value_name = "FORMAT", default_value = "json")]
    pub(crate) output: DumpFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DumpFormat {
    Json,
}

/// How many of the last lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    All,
    Lines(u64),
}

impl FromStr for Tail {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "all" => Ok(Self::All),
            _ => digits(text).map(Self::Lines).ok_or("expected a number of lines, or all"),
        }
    }
}

/// A number and its unit: `1.5GB` is (1.5, "GB").
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim_start()))
}

fn age(text: &str) -> Result<Duration, &'static str> {
    let expected = "expected an age such as 7d, 12h, 30m or 45s, or 0 for no limit";
    let (number, unit) = number_and_unit(text).ok_or(expected)?;
    let seconds = match unit {
        "d" => 86_400.0,
        "h" => 3_600.0,
        "m" => 60.0,
        "s" => 1.0,
        "" if number == 0.0 => 1.0,
        _ => return Err(expected),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| expected)
}

fn size(text: &str) -> Result<u64, &'static str> {
    let expected = "expected a size such as 10GB, 500MB, 1GiB or a number of bytes, or 0 for no limit";
    let (number, unit) = number_and_unit(text).ok_or(expected)?;
    let bytes = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "tib" => 1_099_511_627_776.0,
        _ => return Err(expected),
    };
    let bytes = number * bytes;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is neither")]
    let whole = bytes as u64;
    if bytes < 1e19 { Ok(whole) } else { Err(expected) }
}

fn line_number(text: &str) -> Result<LineNumber, &'static str> {
    digits(text).map(LineNumber).ok_or("expected a line number, or 0 for all lines")
}

fn number_of_runs(text: &str) -> Result<u64, &'static str> {
    digits(text).ok_or("expected a number of runs")
}

fn digits(text: &str) -> Option<u64> {
    text.parse().ok().filter(|_| !text.starts_with('+'))
}

fn at_least_one(text: &str) -> Result<u64, &'static str> {
    text.parse().ok().filter(|&count| count > 0).ok_or("expected a number of runs, 1 or more")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ages_and_sizes_have_units() {
        let ages = ["0", "45s", "30m", "12h", "7d", "0.5d"].map(|text| age(text).unwrap().as_secs());
        assert_eq!(ages, [0, 45, 1_800, 43_200, 604_800, 43_200]);
        for bad in ["", "7", "d", "-1d", "1w", "1.2.3d", "nan", "99999999999999999999999d"] {
            assert!(age(bad).is_err(), "{bad:?}");
        }
        let sizes =
            ["0", "17", "1.5kB", "500MB", "10GB", "10 gb", "1KiB", "2GiB"].map(|text| size(text).unwrap());
        assert_eq!(sizes, [0, 17, 1_500, 500_000_000, 10_000_000_000, 10_000_000_000, 1_024, 2_147_483_648]);
        for bad in ["", "GB", "-1GB", "1XB", "all", "99999999999TB"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_tail_is_a_number_or_all() {
        assert_eq!("all".parse(), Ok(Tail::All));
        assert_eq!("0".parse(), Ok(Tail::Lines(0)));
        for bad in ["", "-1", "+1", "many", "1.5", "99999999999999999999"] {
            assert!(bad.parse::<Tail>().is_err(), "{bad:?}");
        }
    }
}
