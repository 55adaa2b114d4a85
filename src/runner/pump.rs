//! The thread that carries a job's output from its pipes into the log.

use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::error::LogError;
use crate::line::Stream;
use crate::run::MissingDeps;
use crate::runner::control::{Control, Exited};
use crate::runner::directive::Scanner;
use crate::runner::events::{Events, JobEnd, JobEvent};
use crate::runner::tee::Copying;
use crate::store::{Outcome, RunEnd, RunWriter};

/// The most that is read at once, in bytes.
const BUFFER_BYTES: usize = 256 * 1024;
/// What a pipe is grown to when a job fills it, in bytes. A user's pipes share a budget, so the many jobs that
/// print little keep what they were given.
const PIPE_BYTES: usize = 1024 * 1024;
/// A read of this many bytes shows that the job is about to wait for us.
const FULL_PIPE_BYTES: usize = 32 * 1024;
/// Without output for so long, what came is handed to readers in other processes.
const QUIET: Duration = Duration::from_millis(1);
/// How often to look whether the command has ended, on a system that can't tell.
const LOOK: Duration = Duration::from_millis(50);
/// The most text of missing-deps lines that a run's `metadata.json` holds, in bytes.
const MAX_DEPS_BYTES: usize = 1024 * 1024;

/// A job's process, before and while its output is pumped.
pub(super) struct Pump {
    child: Child,
    control: Arc<Control>,
    events: Arc<Events>,
    outlive_grace: Duration,
    outputs: [Option<Output>; 2],
    /// Readable when the command has ended; `None` once it has, or on a system without such descriptors.
    ended_fd: Option<OwnedFd>,
    exited: Exited,
    /// When to stop collecting the output of processes that outlived the command.
    cut_off_at: Option<Instant>,
}

/// One of the job's pipes, for as long as it is open.
struct Output {
    pipe: OwnedFd,
    scanner: Scanner,
    grown: bool,
}

/// What became ready.
struct Ready {
    outputs: [bool; 2],
    ended: bool,
    any: bool,
}

/// Where the output goes to.
struct Sink {
    writer: Box<dyn RunWriter>,
    tee: Option<Copying>,
    events: Arc<Events>,
    deps: Deps,
    /// Something was appended and not flushed.
    dirty: bool,
    complained: bool,
}

/// What the job said it lacks, up to [`MAX_DEPS_BYTES`].
#[derive(Default)]
struct Deps {
    kept: Vec<MissingDeps>,
    bytes: usize,
    left_out: u64,
}

impl Pump {
    pub(super) fn new(
        mut child: Child,
        control: Arc<Control>,
        events: Arc<Events>,
        outlive_grace: Duration,
    ) -> Self {
        let stdout = child.stdout.take().map(|pipe| Output::new(pipe.into()));
        let stderr = child.stderr.take().map(|pipe| Output::new(pipe.into()));
        let ended_fd = pidfd_open(control.pid(), PidfdFlags::empty()).ok();
        Self {
            child,
            control,
            events,
            outlive_grace,
            outputs: [stdout, stderr],
            ended_fd,
            exited: Exited::No,
            cut_off_at: None,
        }
    }

    /// Collects the output until the job is over, and records its end.
    pub(super) fn run(mut self, writer: Box<dyn RunWriter>, tee: Option<Copying>) {
        let _guard = EndGuard { control: Arc::clone(&self.control), events: Arc::clone(&self.events) };
        let events = Arc::clone(&self.events);
        let mut sink = Sink { writer, tee, events, deps: Deps::default(), dirty: false, complained: false };
        let mut buffer = vec![0; BUFFER_BYTES];
        let cut_off = loop {
            let ready = self.wait(sink.dirty.then_some(QUIET));
            if !ready.any {
                sink.flush();
            }
            for stream in Stream::BOTH {
                if ready.outputs[stream.index()] {
                    self.pump_once(stream, &mut buffer, &mut sink);
                }
            }
            if ready.ended {
                self.look_for_the_end();
            }
            if self.exited != Exited::No && self.outputs.iter().all(Option::is_none) {
                break false;
            }
            if self.cut_off_at.is_some_and(|at| at <= Instant::now()) {
                break true;
            }
        };
        let cut_off = cut_off && self.pump_what_is_left(&mut buffer, &mut sink);
        drop(buffer);
        self.end(sink, cut_off);
    }

    /// Waits for output, for the command's end, or for a deadline to pass.
    fn wait(&self, quiet: Option<Duration>) -> Ready {
        let timeout = self.timeout(quiet).map(timespec);
        let mut fds = Vec::with_capacity(3);
        let open = self.outputs.iter().flatten().map(|output| &output.pipe);
        fds.extend(open.chain(&self.ended_fd).map(|fd| PollFd::new(fd, PollFlags::IN)));
        let any = match poll(&mut fds, timeout.as_ref()) {
            Ok(count) => count > 0,
            Err(Errno::INTR) => true,
            Err(error) => {
                // Not known to happen. Looking at everything every now and then still does the work.
                tracing::warn!(%error, "waiting for output failed");
                std::thread::sleep(LOOK);
                return Ready { outputs: [true; 2], ended: true, any: true };
            }
        };
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let outputs = self.outputs.each_ref().map(|output| output.is_some() && ready.next().unwrap_or(false));
        Ready { outputs, ended: self.ended_fd.is_none() || ready.next().unwrap_or(false), any }
    }

    /// How long to wait at most; `None` for as long as it takes.
    fn timeout(&self, quiet: Option<Duration>) -> Option<Duration> {
        let deadline = self.cut_off_at.map(|at| at.saturating_duration_since(Instant::now()));
        let look = (self.ended_fd.is_none() && self.exited == Exited::No).then_some(LOOK);
        [deadline, look, quiet].into_iter().flatten().min()
    }

    /// Moves what one read gives; how much that was.
    fn pump_once(&mut self, stream: Stream, buffer: &mut [u8], sink: &mut Sink) -> usize {
        let slot = &mut self.outputs[stream.index()];
        let Some(output) = slot else { return 0 };
        match rustix::io::read(&output.pipe, &mut *buffer) {
            Ok(0) => {}
            Ok(length) => {
                output.grow_if_full(length);
                sink.take(stream, &buffer[..length], &mut output.scanner);
                return length;
            }
            Err(Errno::AGAIN | Errno::INTR) => return 0,
            Err(error) => tracing::warn!(%stream, %error, "a job's output can't be read any more"),
        }
        output.scanner.end(&mut |event, bytes| sink.deliver(event, bytes));
        *slot = None;
        0
    }

    /// Moves the last bytes that are in the pipes, but not those that a flood adds meanwhile; true if somebody
    /// still holds a pipe.
    fn pump_what_is_left(&mut self, buffer: &mut [u8], sink: &mut Sink) -> bool {
        let mut held = false;
        for stream in Stream::BOTH {
            let mut left = PIPE_BYTES + 1;
            while left > 0 {
                match self.pump_once(stream, buffer, sink) {
                    0 => break,
                    length => left = left.saturating_sub(length),
                }
            }
            if let Some(mut output) = self.outputs[stream.index()].take() {
                output.scanner.end(&mut |event, bytes| sink.deliver(event, bytes));
                held = true;
            }
        }
        held
    }

    fn look_for_the_end(&mut self) {
        if self.exited != Exited::No {
            return;
        }
        self.exited = self.control.exit();
        if self.exited != Exited::No {
            self.ended_fd = None;
            self.cut_off_at = Instant::now().checked_add(self.outlive_grace);
        }
    }

    fn end(mut self, sink: Sink, cut_off: bool) {
        self.control.release();
        let outcome = self.control.outcome(self.exited);
        // The end was seen, so this only takes the process off the system's list.
        let _ = self.child.wait();
        let cut = cut_off.then(|| {
            format!(
                "output of processes that outlived the command was cut off after {:?}",
                self.outlive_grace
            )
        });
        let Sink { writer, tee, deps, .. } = sink;
        let notes: Vec<String> = cut.into_iter().chain(deps.note()).collect();
        let note = (!notes.is_empty()).then(|| notes.join("; "));
        let id = writer.id().clone();
        let end = RunEnd { missing_deps: deps.kept, note: note.clone(), ..RunEnd::now(outcome) };
        let metadata = writer.finish(end);
        if let Err(error) = &metadata {
            tracing::warn!(%id, %error, "the end of a run could not be recorded");
        }
        // All that is not copied yet can be read now.
        drop(tee);
        self.events.end(JobEnd { outcome, note, metadata });
    }
}

impl Output {
    fn new(pipe: OwnedFd) -> Self {
        if let Err(error) = rustix::io::ioctl_fionbio(&pipe, true) {
            // Reads follow a poll that says they will not block; this is the second line of defence.
            tracing::warn!(%error, "a job's pipe stays blocking");
        }
        Self { pipe, scanner: Scanner::default(), grown: false }
    }

    fn grow_if_full(&mut self, length: usize) {
        if !self.grown && length >= FULL_PIPE_BYTES {
            self.grown = true;
            // The user's budget for pipes may be used up; then it stays as it is.
            let _ = rustix::pipe::fcntl_setpipe_size(&self.pipe, PIPE_BYTES);
        }
    }
}

impl Sink {
    fn take(&mut self, stream: Stream, bytes: &[u8], scanner: &mut Scanner) {
        if let Err(error) = self.writer.append(stream, bytes) {
            self.complain(&error);
        }
        self.dirty = true;
        if let Some(tee) = &self.tee {
            tee.write(stream, bytes);
        }
        scanner.scan(bytes, &mut |event, bytes| self.deliver(event, bytes));
    }

    fn deliver(&mut self, event: JobEvent, bytes: usize) {
        if let JobEvent::MissingDeps(deps) = &event {
            self.deps.add(deps, bytes);
        }
        self.events.push(event, bytes);
    }

    fn flush(&mut self) {
        if std::mem::take(&mut self.dirty)
            && let Err(error) = self.writer.flush()
        {
            self.complain(&error);
        }
    }

    /// The job goes on whatever happens to its log. What is lost, the store counts.
    fn complain(&mut self, error: &LogError) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(id = %self.writer.id(), %error, "output can't be kept; the job goes on");
        }
    }
}

impl Deps {
    fn add(&mut self, deps: &[MissingDeps], bytes: usize) {
        if self.bytes + bytes > MAX_DEPS_BYTES {
            self.left_out += 1;
        } else {
            self.bytes += bytes;
            self.kept.extend_from_slice(deps);
        }
    }

    fn note(&self) -> Option<String> {
        (self.left_out > 0).then(|| format!("{} lines of missing deps are only in the log", self.left_out))
    }
}

/// Tells the caller that the job is over, whatever happens to the pump.
struct EndGuard {
    control: Arc<Control>,
    events: Arc<Events>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if !self.events.has_ended() {
            self.control.release();
            let note = Some("the runner failed; how the command ends is not known".to_owned());
            self.events.end(JobEnd { outcome: Outcome::Lost, note, metadata: Err(LogError::Closed) });
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    // A time too long to be said is as good as the longest.
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}
