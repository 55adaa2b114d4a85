//! Signals to a job, and the moment when it has ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

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
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Set for good when the run is over.
    released: bool,
    /// A signal was sent while the command ran.
    signalled: bool,
    cancelled: bool,
}

impl Control {
    pub(super) fn new(pid: Pid) -> Self {
        Self { pid, state: Mutex::default(), over: Condvar::new() }
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal to the job's group; false if the run is over.
    pub(super) fn send(&self, signal: Signal) -> bool {
        self.send_locked(&mut self.lock(), signal)
    }

    /// Sends TERM now and KILL after `grace`.
    pub(super) fn cancel(self: &Arc<Self>, grace: Duration) {
        let mut state = self.lock();
        if state.cancelled || !self.send_locked(&mut state, Signal::TERM) {
            return;
        }
        state.cancelled = true;
        let Some(kill_at) = Instant::now().checked_add(grace) else { return };
        drop(state);
        // A thread of its own: a stalled disk may hold the pump, and the caller may have other things to do.
        let control = Arc::clone(self);
        let waiting =
            thread::Builder::new().name("log-kill".to_owned()).spawn(move || control.kill_at(kill_at));
        if let Err(error) = waiting {
            tracing::warn!(%error, "a job that is cancelled has no time to end by itself");
            self.kill_at(Instant::now());
        }
    }

    /// Sends KILL then, unless the run is over before.
    fn kill_at(&self, kill_at: Instant) {
        let mut state = self.lock();
        while !state.released {
            let left = kill_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.send_locked(&mut state, Signal::KILL);
                return;
            }
            state = self.over.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
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
        self.over.notify_all();
    }

    fn send_locked(&self, state: &mut State, signal: Signal) -> bool {
        if state.released {
            return false;
        }
        state.signalled |= matches!(self.exit(), Exited::No);
        let _ = kill_process_group(self.pid, signal);
        // A process that is stopped, as one that reads a terminal in the background is, would not notice before it is
        // continued.
        let _ = kill_process_group(self.pid, Signal::CONT);
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
