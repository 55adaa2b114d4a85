//! A copy of a job's output, for somebody who watches.
//!
//! The copy has a thread of its own: whoever reads it may be slow, or stuck, and the job must not notice. What came
//! just now waits in memory, in the order in which it came. When that gets too much, the thread goes on from the log,
//! which has it all, until it has caught up.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::watch;

use crate::line::{ByteOffset, Stream};
use crate::run::JobRunId;
use crate::store::LogStore;

/// The most output that waits in memory, in bytes.
const MAX_WAITING_BYTES: usize = 512 * 1024;
/// How much of the log is copied at a time, in bytes.
const LOG_BYTES: usize = 256 * 1024;
/// How soon to look again for output that the store has and does not show yet.
const LOOK: Duration = Duration::from_millis(20);

/// Where a job's output is copied to while it is recorded.
///
/// The copy is best effort, and neither the job nor its record ever waits for it. A destination that is gone
/// (`… | head`) is given up. One that is slow gets the rest of the output from the log; the order between the two
/// streams is then not kept, and what the log could not keep or gave up is missing.
#[derive(Debug)]
pub struct Tee {
    outputs: [OwnedFd; 2],
}

impl Tee {
    /// Copies each stream to one of these.
    #[must_use]
    pub const fn new(stdout: OwnedFd, stderr: OwnedFd) -> Self {
        Self { outputs: [stdout, stderr] }
    }

    /// Copies to this process's own standard output and error.
    ///
    /// # Errors
    ///
    /// When no more files can be opened.
    pub fn to_own_output() -> io::Result<Self> {
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Self::new(stdout, io::stderr().as_fd().try_clone_to_owned()?))
    }

    /// Starts the thread that copies a run of this store.
    pub(super) fn start(self, store: Arc<dyn LogStore>, run: JobRunId) -> io::Result<Copying> {
        let copy = Arc::new(Copy { state: Mutex::default(), changed: Condvar::new() });
        let (done, is_done) = watch::channel(None);
        let outputs = self.outputs.map(Some);
        let copier = Copier {
            copy: Arc::clone(&copy),
            outputs,
            store,
            run,
            within_line: [false; 2],
            failed: Copied::default(),
        };
        thread::Builder::new().name("log-tee".to_owned()).spawn(move || {
            done.send_replace(Some(copier.run()));
        })?;
        Ok(Copying { copy, is_done })
    }
}

/// What came of a copy: of a stream whose destination could not be written to, why, as [`io::Error`] says it. A
/// destination that nobody reads any more is none of these.
pub(super) type Copied = [Option<Arc<str>>; 2];

/// A copy that is being made, as the pump sees it. It ends when this is dropped and everything is copied.
#[derive(Debug)]
pub(super) struct Copying {
    copy: Arc<Copy>,
    is_done: watch::Receiver<Option<Copied>>,
}

impl Copying {
    /// Tells what came of the copy when everything that will be copied is.
    pub(super) fn is_done(&self) -> watch::Receiver<Option<Copied>> {
        self.is_done.clone()
    }

    /// Copies output that was given to the log. Never blocks.
    pub(super) fn write(&self, stream: Stream, bytes: &[u8]) {
        let mut state = self.copy.lock();
        let at = stream.index();
        let from = state.logged[at];
        state.logged[at] += bytes.len() as u64;
        if state.gone[at] {
            return;
        }
        if state.behind[at].is_none() {
            if state.bytes + bytes.len() <= MAX_WAITING_BYTES {
                state.bytes += bytes.len();
                state.waiting.push_back((stream, bytes.to_vec()));
            } else {
                state.behind[at] = Some(from);
            }
        }
        drop(state);
        self.copy.changed.notify_one();
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.copy.lock().ended = true;
        self.copy.changed.notify_one();
    }
}

/// What the pump and the thread share.
#[derive(Debug)]
struct Copy {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(Stream, Vec<u8>)>,
    bytes: usize,
    /// From which byte of the log on a stream is copied whose reader is too slow for memory.
    behind: [Option<u64>; 2],
    /// How many bytes of each stream the log was given.
    logged: [u64; 2],
    /// Destinations that nobody reads any more.
    gone: [bool; 2],
    /// Nothing comes any more.
    ended: bool,
}

impl Copy {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread does next.
enum Task {
    Bytes(Stream, Vec<u8>),
    /// Bytes of the log: from where on, and how many there are.
    Log(Stream, u64, u64),
    Nothing,
}

struct Copier {
    copy: Arc<Copy>,
    outputs: [Option<OwnedFd>; 2],
    store: Arc<dyn LogStore>,
    run: JobRunId,
    /// Whether the last byte copied was within a line.
    within_line: [bool; 2],
    failed: Copied,
}

impl Copier {
    fn run(mut self) -> Copied {
        loop {
            match self.next() {
                Task::Bytes(stream, bytes) => self.put(stream, &bytes),
                Task::Log(stream, from, length) => self.copy_log(stream, from, length),
                Task::Nothing => return self.failed,
            }
        }
    }

    /// Waits for something to do.
    fn next(&self) -> Task {
        let mut state = self.copy.lock();
        loop {
            if let Some((stream, bytes)) = state.waiting.pop_front() {
                state.bytes -= bytes.len();
                return Task::Bytes(stream, bytes);
            }
            for stream in Stream::BOTH {
                if let Some(from) = state.behind[stream.index()] {
                    return Task::Log(stream, from, state.logged[stream.index()] - from);
                }
            }
            if state.ended {
                return Task::Nothing;
            }
            state = self.copy.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn copy_log(&mut self, stream: Stream, from: u64, length: u64) {
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(LOG_BYTES);
        let found = self.store.read_kept_bytes(&self.run, stream, ByteOffset(from), length);
        let copied = match found {
            Ok((at, bytes)) => {
                if at.0 > from && self.within_line[stream.index()] {
                    // The rest of that line was given up.
                    self.put(stream, b"\n");
                }
                self.put(stream, &bytes);
                at.0 - from + bytes.len() as u64
            }
            Err(error) => {
                tracing::warn!(run = %self.run, %stream, %error, "output can't be copied any more");
                self.failed[stream.index()] = Some(format!("reading it from the log: {error}").into());
                self.give_up(stream);
                return;
            }
        };
        let mut state = self.copy.lock();
        let at = stream.index();
        let caught_up = from + copied >= state.logged[at];
        // What is not there when everything is written was not kept.
        if caught_up || state.gone[at] || (copied == 0 && state.ended) {
            state.behind[at] = None;
        } else {
            state.behind[at] = Some(from + copied);
            if copied == 0 {
                drop(self.copy.changed.wait_timeout(state, LOOK));
            }
        }
    }

    /// Writes all of these bytes, or gives the destination up.
    fn put(&mut self, stream: Stream, bytes: &[u8]) {
        if let Some(&last) = bytes.last() {
            self.within_line[stream.index()] = last != b'\n';
        }
        if let Some(fd) = &self.outputs[stream.index()]
            && let Err(error) = write_all(fd, bytes)
        {
            tracing::debug!(%stream, %error, "output is no longer copied");
            if error != Errno::PIPE {
                self.failed[stream.index()] = Some(io::Error::from(error).to_string().into());
            }
            self.give_up(stream);
        }
    }

    fn give_up(&mut self, stream: Stream) {
        self.outputs[stream.index()] = None;
        let mut state = self.copy.lock();
        state.gone[stream.index()] = true;
        state.behind[stream.index()] = None;
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Somebody who shares the terminal or pipe with us made it non-blocking.
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(fd, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
