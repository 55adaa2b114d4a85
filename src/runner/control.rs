//! Signals to a job, and the moment when it has ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::run::Exit;
use crate::store::Outcome;

/// A signal that is passed on to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobSignal {
    /// `SIGINT`, as Ctrl-C.
    Interrupt,
    /// `SIGTERM`.
    Terminate,
    /// `SIGHUP`.
    Hangup,
    /// `SIGQUIT`, as Ctrl-\.
    Quit,
}

impl From<JobSignal> for Signal {
    fn from(signal: JobSignal) -> Self {
        match signal {
            JobSignal::Interrupt => Self::INT,
            JobSignal::Terminate => Self::TERM,
            JobSignal::Hangup => Self::HUP,
            JobSignal::Quit => Self::QUIT,
        }
    }
}

/// What the pump and the caller share of the process.
///
/// The command is not reaped before its run is over. So its number stays taken, and a signal to the group can
/// reach no stranger, even when the command itself has long ended and only its children go on.
#[derive(Debug)]
pub(super) struct Control {
    pid: Pid,
    /// Wakes the pump, for it to look at its deadlines again.
    wake: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Set for good when the run is over.
    released: bool,
    /// A signal was sent while the command ran.
    signalled: bool,
    cancelled: bool,
    /// When the whole group is killed.
    kill_at: Option<Instant>,
}

impl Control {
    pub(super) fn new(pid: Pid, wake: OwnedFd) -> Self {
        Self { pid, wake, state: Mutex::default() }
    }

    /// What a [`Control`] is woken by; made before the process, so that nothing can fail after it.
    pub(super) fn new_wake() -> io::Result<OwnedFd> {
        Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The pump has seen that it was woken.
    pub(super) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Sends a signal to the job's group; false if the run is over.
    pub(super) fn send(&self, signal: Signal) -> bool {
        self.send_locked(&mut self.lock(), signal)
    }

    /// Sends TERM now and KILL after `grace`.
    pub(super) fn cancel(&self, grace: Duration) {
        let mut state = self.lock();
        if state.cancelled || !self.send_locked(&mut state, Signal::TERM) {
            return;
        }
        // A stopped process would not notice before it is continued.
        let _ = kill_process_group(self.pid, Signal::CONT);
        state.cancelled = true;
        state.kill_at = Instant::now().checked_add(grace);
        drop(state);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Sends the KILL that is due. The caller's `poll` does this too, since a stalled disk may hold the pump.
    pub(super) fn kill_if_due(&self) {
        let mut state = self.lock();
        if state.kill_at.is_some_and(|at| at <= Instant::now()) {
            state.kill_at = None;
            self.send_locked(&mut state, Signal::KILL);
        }
    }

    pub(super) fn kill_at(&self) -> Option<Instant> {
        self.lock().kill_at
    }

    /// How the command ended, once it has.
    pub(super) fn exit(&self) -> Exited {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        match waitid(WaitId::Pid(self.pid), options) {
            Ok(None) | Err(rustix::io::Errno::INTR) => Exited::No,
            Ok(Some(status)) => {
                let code = status.exit_status().map(Exit::Code);
                let exit = code.or_else(|| status.terminating_signal().map(Exit::Signal));
                exit.map_or(Exited::Unknown, Exited::So)
            }
            Err(_) => Exited::Unknown,
        }
    }

    /// What the end of the command means, given the signals that were sent.
    pub(super) fn outcome(&self, exited: Exited) -> Outcome {
        match exited {
            Exited::So(exit) if self.lock().signalled => Outcome::Cancelled(exit),
            Exited::So(exit) => Outcome::Exited(exit),
            Exited::No | Exited::Unknown => Outcome::Lost,
        }
    }

    /// Ends the time in which signals can be sent; what is left of a cancelled job is killed.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        if state.cancelled {
            self.send_locked(&mut state, Signal::KILL);
        }
        state.released = true;
        state.kill_at = None;
    }

    fn send_locked(&self, state: &mut State, signal: Signal) -> bool {
        if state.released {
            return false;
        }
        state.signalled |= matches!(self.exit(), Exited::No);
        let _ = kill_process_group(self.pid, signal);
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the command has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exited {
    No,
    So(Exit),
    /// It has, but somebody else in this process took the answer.
    Unknown,
}
