//! Runs commands and records what they print.
//!
//! A job has one thread, the *pump*. It waits for both of the job's pipes at once, so what the log says about the
//! order of the two streams is the order in which the output came; it looks for directives, and it writes through
//! the run's [`RunWriter`](crate::RunWriter). It has one buffer, and wakes up for nothing but output, the command's
//! end and a deadline. The caller's side, [`SubProcessRunning`], touches neither pipes nor disk.

mod command;
mod control;
mod directive;
mod error;
mod events;
mod pump;
mod running;
mod tee;

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::Pid;

use crate::run::Exit;
use crate::store::{LogStore, Outcome, RunEnd, RunWriter};

pub use command::{JobCommand, JobInput};
pub use control::JobSignal;
pub use error::RunnerError;
pub use events::{JobEnd, JobEvent};
pub use running::SubProcessRunning;
pub use tee::Tee;

use control::Control;
use events::Events;
use pump::Pump;

/// How long a runner waits for jobs that do not end when they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerOptions {
    /// From [`cancel`](SubProcessRunning::cancel) to the KILL.
    pub kill_grace: Duration,
    /// How long output is collected of processes that outlive the command.
    pub outlive_grace: Duration,
}

impl Default for RunnerOptions {
    /// 10 s until the KILL, 2 s for processes that outlive the command.
    fn default() -> Self {
        Self { kill_grace: Duration::from_secs(10), outlive_grace: Duration::from_secs(2) }
    }
}

/// Runs jobs as processes of this machine and records them in a log store.
#[derive(Clone)]
pub struct SubProcessBackend {
    store: Arc<dyn LogStore>,
    options: RunnerOptions,
}

impl SubProcessBackend {
    /// Records in this store.
    #[must_use]
    pub fn new(store: Arc<dyn LogStore>) -> Self {
        Self::with_options(store, RunnerOptions::default())
    }

    /// Records in this store, with other waiting times.
    #[must_use]
    pub fn with_options(store: Arc<dyn LogStore>, options: RunnerOptions) -> Self {
        Self { store, options }
    }

    /// Starts a job: first its run, so that nothing is executed under an id that is taken, then its process.
    ///
    /// This may block for as long as the store takes to start a run: async code calls it through
    /// `spawn_blocking`. Nothing of what it returns blocks.
    ///
    /// # Errors
    ///
    /// [`RunnerError::Log`] if the run can't be started. When only the process can't, the run is recorded as
    /// failed, with the error's [exit code](RunnerError::exit_code) and the error as its note.
    pub fn start(&self, job: JobCommand) -> Result<SubProcessRunning, RunnerError> {
        launch(self.store.start(job.spec.clone())?, job, self.options)
    }
}

impl std::fmt::Debug for SubProcessBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SubProcessBackend").field("options", &self.options).finish_non_exhaustive()
    }
}

fn launch(
    writer: Box<dyn RunWriter>,
    job: JobCommand,
    options: RunnerOptions,
) -> Result<SubProcessRunning, RunnerError> {
    let id = writer.id().clone();
    let events = Arc::new(Events::new());
    match start_process(&job, &events, options) {
        Ok(started) => {
            let Started { control, pump, hand_over } = started;
            // The thread waits for exactly this, so it can't be gone.
            let _ = hand_over.send((pump, writer, job.tee));
            Ok(SubProcessRunning { id, control, events, kill_grace: options.kill_grace })
        }
        Err(error) => {
            let mut end = RunEnd::now(Outcome::Exited(Exit::Code(error.exit_code().into())));
            end.note = Some(error.to_string());
            if let Err(error) = writer.finish(end) {
                tracing::warn!(%id, %error, "that the command could not be started is not recorded");
            }
            Err(error)
        }
    }
}

/// What the pump's thread is waiting for.
type ForThread = (Pump, Box<dyn RunWriter>, Option<Tee>);

struct Started {
    control: Arc<Control>,
    pump: Pump,
    hand_over: mpsc::Sender<ForThread>,
}

/// Starts the process last: once it runs, nothing can fail that would leave it without its pump.
fn start_process(
    job: &JobCommand,
    events: &Arc<Events>,
    options: RunnerOptions,
) -> Result<Started, RunnerError> {
    let other = |doing| move |source: io::Error| RunnerError::Other { doing, source };
    let wake = Control::new_wake().map_err(other("creating an event descriptor"))?;
    let (hand_over, handed_over) = mpsc::channel::<ForThread>();
    thread::Builder::new()
        .name("log-pump".to_owned())
        .spawn(move || {
            if let Ok((pump, writer, tee)) = handed_over.recv() {
                pump.run(writer, tee);
            }
        })
        .map_err(other("starting a thread"))?;
    let child = job.spawn()?;
    let control = Arc::new(Control::new(Pid::from_child(&child), wake));
    let pump = Pump::new(child, Arc::clone(&control), Arc::clone(events), options.outlive_grace);
    Ok(Started { control, pump, hand_over })
}
