//! Jobs that print at a steady pace. A bench starts its own executable as one.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use databuild_logs::{FileLogStore, FileStoreOptions, LogStore, RunSpec, Stream};

/// The length of a line with its `\n`.
pub(crate) const LINE_BYTES: usize = 100;

/// How long a dripping job waits from line to line. No multiple of anything else, so that nothing falls into step.
pub(crate) const PAUSE: Duration = Duration::from_micros(2_137);

/// Nanoseconds since 1970: the one clock that processes share.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default()
}

/// A line that begins with the time and its number.
pub(crate) fn timed_line(number: u64, out: &mut String) {
    let from = out.len();
    let _ = write!(out, "{} {number:08} ", now());
    while out.len() - from < LINE_BYTES - 1 {
        out.push('.');
    }
    out.push('\n');
}

/// Hands out a timed line after each pause, until that fails.
pub(crate) fn drip(mut take: impl FnMut(&str) -> bool) {
    let mut line = String::with_capacity(LINE_BYTES);
    for number in 1.. {
        thread::sleep(PAUSE);
        line.clear();
        timed_line(number, &mut line);
        if !take(&line) {
            return;
        }
    }
}

/// The command that prints timed lines until nobody reads them.
pub(crate) fn printing() -> [String; 2] {
    let own = std::env::current_exe().expect("a process has an executable");
    [own.to_string_lossy().into_owned(), "print-timed-lines".to_owned()]
}

/// Starts another process that logs timed lines through a store of its own.
pub(crate) fn start_logging(folder: &Path, id: &str) -> Killed {
    let own = std::env::current_exe().expect("a process has an executable");
    Killed::start(Command::new(own).arg("log-timed-lines").arg(folder).arg(id))
}

/// Does what the arguments ask for, if they ask for a job.
pub(crate) fn is_asked_for() -> bool {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["print-timed-lines"] => print_timed_lines(),
        ["log-timed-lines", folder, id] => log_timed_lines(Path::new(folder), id),
        _ => return false,
    }
    true
}

fn print_timed_lines() {
    let mut out = std::io::stdout();
    drip(|line| out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_ok());
}

fn log_timed_lines(folder: &Path, id: &str) {
    let store = FileLogStore::open_folder(folder, FileStoreOptions::default()).expect("a folder");
    let spec = RunSpec::new(id.parse().expect("a valid id"));
    let mut writer = store.start(spec).expect("a run can be started");
    drip(|line| writer.append(Stream::Stdout, line.as_bytes()).is_ok());
}

/// Prints `lines` numbered lines of 100 bytes, `rate` of them a second, `burst` of them a write.
pub(crate) fn print_paced(lines: u64, rate: f64, burst: u64) -> std::io::Result<()> {
    let (mut out, mut text) = (std::io::stdout(), String::new());
    let (begin, mut printed) = (Instant::now(), 0);
    while printed < lines {
        text.clear();
        let until = lines.min(printed + burst.max(1));
        while printed < until {
            printed += 1;
            timed_line(printed, &mut text);
        }
        let due = Duration::from_secs_f64(printed as f64 / rate);
        thread::sleep(due.saturating_sub(begin.elapsed()));
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

/// A process that ends with this.
pub(crate) struct Killed(Child);

impl Killed {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the process can be started"))
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
