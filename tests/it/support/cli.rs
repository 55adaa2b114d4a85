//! The executable as a child process, and services that answer as they are told to.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tempfile::TempDir;

/// Far longer than anything here takes: who waits so long has a child that hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// An address at which nothing answers.
pub(crate) const NOBODY: &str = "http://127.0.0.1:1";

/// How the executable is called: which service it asks, in which home it lives.
pub(crate) struct Databuild {
    pub(crate) home: TempDir,
    server: Option<String>,
    variables: Vec<(&'static str, String)>,
}

impl Databuild {
    /// With no service chosen and an empty log folder.
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("logs")).unwrap();
        Self { home, server: None, variables: Vec::new() }
    }

    pub(crate) fn asking(server: impl Into<String>) -> Self {
        Self { server: Some(server.into()), ..Self::new() }
    }

    pub(crate) fn with(mut self, variable: &'static str, value: impl Into<String>) -> Self {
        self.variables.push((variable, value.into()));
        self
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_databuild"));
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("DATABUILD_") || name == "NO_COLOR") {
                command.env_remove(name);
            }
        }
        // `cargo test` has it name folders of the build: the loader would look into each of them first.
        command.env_remove("LD_LIBRARY_PATH");
        command.env("HOME", self.home.path()).env("DATABUILD_LOG_DIR", self.home.path().join("logs"));
        command.envs(self.server.iter().map(|server| ("DATABUILD_LOG_SERVER", server)));
        command.envs(self.variables.iter().map(|(name, value)| (*name, value)));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs to the end.
    pub(crate) fn run(&self, args: &[&str]) -> Done {
        self.start(args).done()
    }

    /// Runs to the end while nobody reads its standard output.
    pub(crate) fn run_unread(&self, args: &[&str]) -> Done {
        let (_, unread) = std::io::pipe().unwrap();
        Running::new(self.command(args).stdout(unread).spawn().unwrap()).done()
    }

    pub(crate) fn start(&self, args: &[&str]) -> Running {
        Running::new(self.command(args).spawn().unwrap())
    }

    /// The same with an input, which ends when it is dropped: a job that reads it (`cat`) ends with the test, whatever
    /// becomes of who started it.
    pub(crate) fn start_with_input(&self, args: &[&str]) -> (Running, ChildStdin) {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        (Running::new(child), input)
    }

    /// A service on a free port, and where it is.
    pub(crate) fn serve(&self) -> (Running, String) {
        let service = self.start(&["serve", "--listen", "127.0.0.1:0"]);
        let url = service.address().unwrap();
        (service, url)
    }

    /// Starts it under `strace`, which writes what it sees to `trace`. `options` say which system calls that is, and
    /// what becomes of them.
    pub(crate) fn start_traced(&self, trace: &Path, options: &[&str], args: &[&str]) -> Running {
        let mut all = vec!["-f", "-qq", "-o", trace.to_str().unwrap()];
        all.extend(options);
        self.start_by("strace", &all, args)
    }

    /// Runs to the end while something happens to a call to the system (`write:error=EIO:when=3`) whenever a thread makes
    /// it for the third time, or to several calls, with spaces between; only calls that are about one of these files
    /// count, if any are named. Tells too whether it came to that, with the last of the calls.
    pub(crate) fn run_injected(&self, inject: &str, files: &[PathBuf], args: &[&str]) -> (Done, bool) {
        let trace = self.home.path().join("trace");
        let calls: Vec<_> = inject.split(' ').map(|inject| inject.split(':').next().unwrap()).collect();
        let traced = format!("trace={}", calls.join(","));
        let injections: Vec<_> = inject.split(' ').map(|inject| format!("inject={inject}")).collect();
        let mut options = vec!["--seccomp-bpf", "-e", &traced];
        injections.iter().for_each(|inject| options.extend(["-e", inject]));
        for file in files {
            options.extend(["-P", file.to_str().unwrap()]);
        }
        let done = self.start_traced(&trace, &options, args).done();
        let is_injected = |line: &str| line.contains("(INJECTED)") && line.contains(calls[calls.len() - 1]);
        (done, std::fs::read_to_string(trace).unwrap().lines().any(is_injected))
    }

    /// Runs until a thread makes this call for the third time (`write:when=3`), and is killed then; children are not.
    pub(crate) fn run_killed_at(&self, point: &str, files: &[PathBuf], args: &[&str]) -> Done {
        self.start_killed_at(&["-b", "execve"], point, files, args).done()
    }

    /// Starts what is killed there, under a tracer with these options too.
    pub(crate) fn start_killed_at(
        &self,
        options: &[&str],
        point: &str,
        files: &[PathBuf],
        args: &[&str],
    ) -> Running {
        let (call, when) = point.split_once(':').unwrap();
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=KILL:{when}"));
        let mut options = [options, &["-e", &trace, "-e", &inject]].concat();
        for file in files {
            options.extend(["-P", file.to_str().unwrap()]);
        }
        self.start_traced(Path::new("/dev/null"), &options, args)
    }

    /// Has another program start it, which is given options and then the command line.
    pub(crate) fn start_by(&self, program: &str, options: &[&str], args: &[&str]) -> Running {
        let tool = self.command(args);
        let mut command = Command::new(program);
        command.args(options).arg(tool.get_program()).args(tool.get_args());
        for (name, value) in tool.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Running::new(child.unwrap_or_else(|error| panic!("{program}: {error}")))
    }
}

/// What an execution left behind.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Done {
    /// Checks the exit code.
    pub(crate) fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, Some(expected), "{self:?}");
        self
    }

    /// Checks that stderr has this in it.
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no {text:?} in {}", self.stderr);
        self
    }

    /// Standard output as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// A child that still runs; killed when it is dropped, with the children it has itself.
pub(crate) struct Running {
    child: Child,
    out: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    err: Arc<Mutex<String>>,
    err_reader: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn new(mut child: Child) -> Self {
        let (sender, out) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stdout);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                    if sender.send(std::mem::take(&mut line)).is_err() {
                        return;
                    }
                }
            });
        }
        let err = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&err);
        let stderr = child.stderr.take().unwrap();
        let err_reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                *collected.lock().unwrap() += &(line + "\n");
            }
        });
        Self { child, out, seen: Vec::new(), err, err_reader: Some(err_reader) }
    }

    /// The next line of standard output, without its end.
    pub(crate) fn line(&mut self) -> String {
        let line =
            self.out.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line; stderr: {}", self.stderr()));
        self.seen.extend_from_slice(&line);
        String::from_utf8(line).unwrap().trim_end_matches('\n').to_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        self.err.lock().unwrap().clone()
    }

    /// Waits until stderr has this in it.
    pub(crate) fn wait_for(&self, text: &str) {
        until(|| self.stderr().contains(text), || format!("no {text:?} in {}", self.stderr()));
    }

    /// Where a service listens, once it says so; `None` if it ends before.
    pub(crate) fn address(&self) -> Option<String> {
        let said = || Some(self.stderr().split_once("listening on ")?.1.split_once(',')?.0.to_owned());
        let mut address = None;
        until(
            || {
                address = said();
                address.is_some() || self.is_over()
            },
            || format!("it neither listens nor ends: {}", self.stderr()),
        );
        address.or_else(said)
    }

    /// The id of the process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.err_reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end.
    pub(crate) fn done(mut self) -> Done {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.out.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.extend_from_slice(&line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; stderr: {}", self.stderr()),
            }
        }
        let status = self.wait();
        self.err_reader.take().unwrap().join().unwrap();
        Done { code: status.code(), stdout: std::mem::take(&mut self.seen), stderr: self.stderr() }
    }

    fn wait(&mut self) -> ExitStatus {
        let mut ended = None;
        until(
            || {
                ended = self.child.try_wait().unwrap();
                ended.is_some()
            },
            || "it does not end".to_owned(),
        );
        ended.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Whoever traces a service leaves it behind when it is killed itself.
            let id = self.child.id();
            let children =
                std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
            for child in children.split_whitespace().filter_map(|id| Pid::from_raw(id.parse().ok()?)) {
                let _ = kill_process(child, Signal::KILL);
            }
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Takes the first line of a child's output and closes it, as `head -1` does.
pub(crate) fn head(stdout: ChildStdout) -> String {
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    line
}

/// Runs a command with a terminal as its standard output, this many columns wide, and tells what that shows.
pub(crate) fn on_terminal(mut command: Command, columns: u16) -> String {
    let (terminal, end) = terminal(columns);
    shown_on(terminal, command.env("TERM", "xterm").stdout(end).spawn().unwrap(), command)
}

/// The same with a terminal as its standard error.
pub(crate) fn errors_on_terminal(mut command: Command, columns: u16) -> String {
    let (terminal, end) = terminal(columns);
    shown_on(terminal, command.env("TERM", "xterm").stderr(end).spawn().unwrap(), command)
}

/// A terminal, and the end of it that programs have.
fn terminal(columns: u16) -> (File, File) {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
    let end = File::options().read(true).write(true).open(name).unwrap();
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&end, size).unwrap();
    (terminal.into(), end)
}

fn shown_on(mut terminal: File, mut child: Child, command: Command) -> String {
    // The command holds the only other end left: what it still holds is closed with its configuration.
    drop(command);
    let mut shown = Vec::new();
    // A terminal whose other end is gone gives an error.
    drop(terminal.read_to_end(&mut shown));
    assert!(child.wait().unwrap().success());
    String::from_utf8(shown).unwrap().replace("\r\n", "\n")
}

/// Waits until this holds.
pub(crate) fn until(mut holds: impl FnMut() -> bool, otherwise: impl FnOnce() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{}", otherwise());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Something that listens and answers each connection as a script says, then hangs up.
pub(crate) struct Scripted {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    /// `answer` gets the head of each request and how many with this path came before it.
    pub(crate) fn new(answer: impl Fn(&str, usize) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::<String>::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let Some(head) = head_of(&connection) else { continue };
                let before = {
                    let mut log = log.lock().unwrap();
                    let before = log.iter().filter(|earlier| path(earlier) == path(&head)).count();
                    log.push(head.clone());
                    before
                };
                drop((&connection).write_all(&answer(&head, before)));
            }
        });
        Self { url, requests }
    }

    /// The heads of the requests for paths that end so.
    pub(crate) fn requests(&self, end: &str) -> Vec<String> {
        self.requests.lock().unwrap().iter().filter(|head| path(head).ends_with(end)).cloned().collect()
    }
}

/// The path of a request, without its query.
pub(crate) fn path(head: &str) -> &str {
    head.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default()
}

fn head_of(mut connection: &TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if connection.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// An answer with a body of this type.
pub(crate) fn answer(status: &str, content_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// The beginning of an event stream, which ends when the connection does.
pub(crate) fn events(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n", body.len())
        .into_bytes()
}
