//! `databuild run`: executes a command and records it. Needs no service and works beside one.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::builder::{OsStringValueParser, TypedValueParser};
use databuild_logs::{
    Completion, FileStoreOptions, InvalidId, JobCommand, JobEnd, JobEvent, JobInput, JobMetadata, JobRunId,
    JobSignal, LogError, RunSpec, RunnerError, Stream, SubProcessBackend, SubProcessRunning, Tee,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::printing::note;
use crate::store::{open_folder, survive_file_size_limit};

/// Own failures have this exit code.
const OWN_FAILURE: u8 = 125;

/// Execute a command and record what it prints
///
/// The exit code is the command's, or 128 + N when signal N killed it; 125 when recording could not start, 126 when
/// the command can't be executed, 127 when there is no such command.
///
/// The command runs in a process group of its own; INT, TERM, HUP and QUIT are passed on to the group. Its input
/// is ours, but never the terminal.
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// The run's id; one that exists is refused [default: a new one]
    #[arg(long, value_name = "ID", value_parser = new_id)]
    id: Option<JobRunId>,
    /// A partition that the run builds; may be given several times
    #[arg(long, short, value_name = "P")]
    partition: Vec<String>,
    /// A label for the run; may be given several times
    #[arg(long, short, value_name = "K=V", value_parser = pair)]
    label: Vec<(String, String)>,
    /// The folder to run the command in
    #[arg(long, value_name = "D")]
    cwd: Option<PathBuf>,
    /// A variable for the command's environment; may be given several times
    #[arg(long, short, value_name = "K=V", value_parser = OsStringValueParser::new().try_map(os_pair))]
    env: Vec<(OsString, OsString)>,
    /// Only record: do not copy the command's output to ours
    #[arg(long, short)]
    quiet: bool,
    /// The command and its arguments
    #[arg(value_name = "CMD", required = true, trailing_var_arg = true)]
    command: Vec<OsString>,
}

/// Executes the command, records it under `log_dir` and gives its exit code.
pub(crate) fn run(args: RunArgs, log_dir: &Path, options: FileStoreOptions) -> ExitCode {
    match record(args, log_dir, options) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            note(format_args!("databuild: {error}"));
            if matches!(error, RunnerError::Log(LogError::Io { .. })) {
                note(format_args!("  the log folder is {}: --log-dir takes another", log_dir.display()));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn record(args: RunArgs, log_dir: &Path, options: FileStoreOptions) -> Result<u8, RunnerError> {
    let other = |doing| move |source: io::Error| RunnerError::Other { doing, source };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(other("setting up"))?;
    let store = open_folder(log_dir, options)?;
    let quiet = args.quiet;
    let job = job(args).map_err(other("setting up the copy of the output"))?;
    let attended = runtime.block_on(async {
        // Listening comes first: from here on a signal reaches the job instead of ending us.
        let mut signals = Signals::listen().map_err(other("listening for signals"))?;
        survive_file_size_limit().map_err(other("listening for signals"))?;
        // The only task on this thread may block it.
        let mut running = SubProcessBackend::new(Arc::clone(&store)).start(job)?;
        if !quiet && io::stderr().is_terminal() {
            note(format_args!("databuild: run {}", running.job_run_id()));
        }
        Ok::<_, RunnerError>(attend(&mut running, &mut signals).await)
    })?;
    let closed = store.close();
    // Who reads our output may be stuck, and what is said waits for it too.
    if !attended.abandoned {
        say(&attended, closed.as_ref());
    }
    Ok(exit_code(&attended.end))
}

/// Says what else there is to say of a run.
fn say(attended: &Attended, closed: Result<&(), &LogError>) {
    for (name, reason) in &attended.malformed {
        note(format_args!("databuild: a line DATABUILD_{name}_JSON can't be used: {reason}"));
    }
    if attended.more_malformed > 0 {
        note(format_args!("databuild: nor can {} other lines of that kind", attended.more_malformed));
    }
    for (stream, why) in &attended.copy_failures {
        let name = if *stream == Stream::Stdout { "output" } else { "error" };
        note(format_args!(
            "databuild: the copy to standard {name} is not whole: {why}; `databuild logs` has the rest"
        ));
    }
    let metadata = attended.end.metadata.as_ref();
    if let Err(error) = metadata.and(closed) {
        note(format_args!("databuild: the run's end is not recorded: {error}"));
    }
    if let Ok(Completion { dropped_bytes: lost @ 1.., .. }) = metadata.map(JobMetadata::completion) {
        note(format_args!("databuild: {lost} bytes of the output could not be kept"));
    }
}

fn job(args: RunArgs) -> io::Result<JobCommand> {
    let mut spec = RunSpec::new(args.id.unwrap_or_else(JobRunId::generate));
    spec.building_partitions = args.partition;
    spec.labels = args.label.into_iter().collect();
    let mut job = JobCommand::new(spec, args.command);
    job.cwd = args.cwd;
    job.env = args.env;
    job.input = if io::stdin().is_terminal() { JobInput::Empty } else { JobInput::Inherit };
    job.tee = if args.quiet { None } else { Some(Tee::to_own_output()?) };
    Ok(job)
}

/// How many directives that can't be used are named.
const MOST_MALFORMED: usize = 8;

/// What came of a job.
struct Attended {
    end: Arc<JobEnd>,
    /// Directives that can't be used: their names, and why.
    malformed: Vec<(String, String)>,
    more_malformed: u64,
    /// Our output was not read to its end.
    abandoned: bool,
    /// Why our output is not whole.
    copy_failures: Vec<(Stream, Arc<str>)>,
}

/// Passes signals on until the job has ended, and waits then until its output is copied; a signal ends that.
async fn attend(running: &mut SubProcessRunning, signals: &mut Signals) -> Attended {
    let (mut malformed, mut more_malformed, mut abandoned) = (Vec::new(), 0, false);
    let end = loop {
        tokio::select! {
            event = running.next_event() => match event {
                Some(JobEvent::Malformed { name, reason }) if malformed.len() < MOST_MALFORMED => {
                    malformed.push((name, reason));
                }
                Some(JobEvent::Malformed { .. }) => more_malformed += 1,
                Some(JobEvent::Ended(end)) => break end,
                Some(_) => {}
                None => break running.wait().await,
            },
            // Once there is no job any more, a signal is for us.
            signal = signals.next() => abandoned |= !running.forward(signal),
        }
    };
    if !abandoned {
        abandoned = tokio::select! {
            () = running.copied() => false,
            _ = signals.next() => true,
        };
    }
    let failure = |stream| running.copy_failure(stream).map(|why| (stream, why));
    let copy_failures = Stream::BOTH.into_iter().filter_map(failure).collect();
    Attended { end, malformed, more_malformed, abandoned, copy_failures }
}

fn exit_code(end: &JobEnd) -> u8 {
    end.exit().map_or(OWN_FAILURE, |exit| u8::try_from(exit.shell_code()).unwrap_or(OWN_FAILURE))
}

/// The signals that are passed on. Those that we were started to ignore (`nohup`, a shell's background job) stay
/// ignored, for us and for the command.
struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
    quit: Option<Signal>,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let ignored = ignored_signals();
        let listen = |kind: SignalKind| {
            let is_ignored = ignored >> (kind.as_raw_value() - 1) & 1 == 1;
            (!is_ignored).then(|| signal(kind)).transpose()
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            quit: listen(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> JobSignal {
        tokio::select! {
            () = received(&mut self.interrupt) => JobSignal::Interrupt,
            () = received(&mut self.terminate) => JobSignal::Terminate,
            () = received(&mut self.hangup) => JobSignal::Hangup,
            () = received(&mut self.quit) => JobSignal::Quit,
        }
    }
}

async fn received(signal: &mut Option<Signal>) {
    let received = match signal {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if received.is_none() {
        std::future::pending().await
    }
}

/// The signals that this process ignores, one bit each, signal 1 lowest; none where the system does not say.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn new_id(text: &str) -> Result<JobRunId, String> {
    match text {
        "latest" => Err("that is how the run that started last is called; choose another".to_owned()),
        _ => text.parse().map_err(|invalid: InvalidId| invalid.to_string()),
    }
}

fn pair(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE"),
    }
}

fn os_pair(text: OsString) -> Result<(OsString, OsString), &'static str> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = text.as_bytes();
    match bytes.iter().position(|&b| b == b'=') {
        Some(at @ 1..) => {
            let part = |bytes| OsStr::from_bytes(bytes).to_owned();
            Ok((part(&bytes[..at]), part(&bytes[at + 1..])))
        }
        _ => Err("expected NAME=VALUE"),
    }
}
