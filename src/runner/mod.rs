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
use tee::Copying;

/// How long a runner waits for jobs that do not end when they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerOptions {
    /// From [`cancel`](SubProcessRunning::cancel) to the KILL; 10 s.
    pub kill_grace: Duration,
    /// How long output is collected of processes that outlive the command; 2 s. What they print later is not read.
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
        launch(&self.store, self.store.start(job.spec.clone())?, job, self.options)
    }
}

impl std::fmt::Debug for SubProcessBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SubProcessBackend").field("options", &self.options).finish_non_exhaustive()
    }
}

fn launch(
    store: &Arc<dyn LogStore>,
    writer: Box<dyn RunWriter>,
    mut job: JobCommand,
    options: RunnerOptions,
) -> Result<SubProcessRunning, RunnerError> {
    let id = writer.id().clone();
    let events = Arc::new(Events::new());
    let tee = job.tee.take().map(|tee| tee.start(Arc::clone(store), id.clone())).transpose();
    let started = tee.map_err(other("starting a thread")).and_then(|tee| {
        let started = start_process(&job, &events, options)?;
        Ok((started, tee))
    });
    match started {
        Ok((Started { control, pump, hand_over }, tee)) => {
            let copied = tee.as_ref().map(Copying::is_done);
            // The thread waits for exactly this, so it can't be gone.
            let _ = hand_over.send((pump, writer, tee));
            Ok(SubProcessRunning { id, control, events, kill_grace: options.kill_grace, copied })
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
type ForThread = (Pump, Box<dyn RunWriter>, Option<Copying>);

struct Started {
    control: Arc<Control>,
    pump: Pump,
    hand_over: mpsc::Sender<ForThread>,
}

fn other(doing: &'static str) -> impl Fn(io::Error) -> RunnerError {
    move |source| RunnerError::Other { doing, source }
}

/// Starts the process last: once it runs, nothing can fail that would leave it without its pump.
fn start_process(
    job: &JobCommand,
    events: &Arc<Events>,
    options: RunnerOptions,
) -> Result<Started, RunnerError> {
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
    let control = Arc::new(Control::new(Pid::from_child(&child)));
    let pump = Pump::new(child, Arc::clone(&control), Arc::clone(events), options.outlive_grace);
    Ok(Started { control, pump, hand_over })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::LogError;
    use crate::line::{Stream, UnixMicros};
    use crate::run::{JobMetadata, JobRunId, RunSpec};
    use crate::store::MemoryLogStore;

    /// A disk of which the test decides what it does.
    struct Disk<A, F> {
        id: JobRunId,
        on_append: A,
        on_flush: F,
    }

    impl<A, F> RunWriter for Disk<A, F>
    where
        A: FnMut(&[u8]) -> Result<(), LogError> + Send,
        F: FnMut() + Send,
    {
        fn id(&self) -> &JobRunId {
            &self.id
        }

        fn append(&mut self, _: Stream, bytes: &[u8]) -> Result<(), LogError> {
            (self.on_append)(bytes)
        }

        fn flush(&mut self) -> Result<(), LogError> {
            (self.on_flush)();
            Ok(())
        }

        fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
            let mut run = JobMetadata::started(RunSpec::new(self.id), UnixMicros::now());
            end.apply_to(&mut run);
            Ok(run)
        }
    }

    fn start(
        script: &str,
        on_append: impl FnMut(&[u8]) -> Result<(), LogError> + Send + 'static,
        on_flush: impl FnMut() + Send + 'static,
    ) -> SubProcessRunning {
        let id = JobRunId::generate();
        let job = JobCommand::new(RunSpec::new(id.clone()), ["sh", "-c", script]);
        let store: Arc<dyn LogStore> = Arc::new(MemoryLogStore::new());
        launch(&store, Box::new(Disk { id, on_append, on_flush }), job, RunnerOptions::default()).unwrap()
    }

    fn end(running: &SubProcessRunning) -> Arc<JobEnd> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let wait = async { tokio::time::timeout(Duration::from_secs(120), running.wait()).await };
        runtime.block_on(wait).expect("no end in sight")
    }

    fn channel_writer<T: Send + 'static>(sender: &mpsc::Sender<T>) -> impl FnMut(T) + Send + use<T> {
        let sender = sender.clone();
        move |item| drop(sender.send(item))
    }

    #[test]
    fn a_full_disk_does_not_hurt_the_job() {
        let (sender, received) = mpsc::channel();
        let mut count = channel_writer(&sender);
        let refuse = move |bytes: &[u8]| {
            count(bytes.len());
            Err(LogError::Io {
                doing: "appending to",
                path: "disk".into(),
                source: io::ErrorKind::StorageFull.into(),
            })
        };
        drop(sender);
        let running = start("head -c 3000000 /dev/zero; exit 4", refuse, || {});
        assert_eq!(end(&running).outcome, Outcome::Exited(Exit::Code(4)));
        assert_eq!(received.iter().sum::<usize>(), 3_000_000, "every byte was offered");
    }

    #[test]
    fn a_line_of_100_mb_passes_through_one_buffer() {
        let (sender, received) = mpsc::channel();
        let mut count = channel_writer(&sender);
        let append = move |bytes: &[u8]| {
            count(bytes.len());
            Ok(())
        };
        drop(sender);
        let running = start("head -c 100000000 /dev/zero | tr '\\0' D", append, || {});
        assert_eq!(end(&running).exit(), Some(Exit::Code(0)));
        let batches: Vec<usize> = received.iter().collect();
        assert_eq!(batches.iter().sum::<usize>(), 100_000_000);
        assert!(batches.iter().all(|&length| length <= 256 * 1024), "{:?}", batches.iter().max());
    }

    #[test]
    fn a_stalled_disk_blocks_neither_the_caller_nor_a_cancel() {
        let (entered, is_in) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let mut entered = channel_writer(&entered);
        let stall = move |_: &[u8]| {
            entered(());
            let _ = released.recv();
            Ok(())
        };
        let mut running = start("trap '' TERM; echo x; exec sleep 1000", stall, || {});
        is_in.recv_timeout(Duration::from_secs(60)).unwrap();
        // The pump is in the disk's hands now, and stays there until `release`.
        assert!(running.poll().is_empty());
        assert!(!running.has_ended());
        running.kill_grace = Duration::from_millis(20);
        running.cancel();
        while running.control.exit() == control::Exited::No {
            thread::sleep(Duration::from_millis(1));
        }
        drop(release);
        assert_eq!(end(&running).outcome, Outcome::Cancelled(Exit::Signal(9)));
    }

    #[test]
    fn what_came_is_flushed_when_the_job_goes_quiet() {
        let (sender, received) = mpsc::channel();
        let (mut appended, mut flushed) = (channel_writer(&sender), channel_writer(&sender));
        let append = move |bytes: &[u8]| {
            appended(String::from_utf8_lossy(bytes).into_owned());
            Ok(())
        };
        let running = start("echo x; sleep 1000", append, move || flushed("flush".to_owned()));
        let next = || received.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!((next(), next()), ("x\n".to_owned(), "flush".to_owned()));
        running.cancel();
        end(&running);
        drop(sender);
        assert_eq!(received.iter().count(), 0, "one flush is enough");
    }

    #[test]
    fn whoever_waits_is_told_even_when_the_pump_breaks() {
        let running = start("echo x", |_| panic!("this panic is part of the test"), || {});
        let end = end(&running);
        assert_eq!(end.outcome, Outcome::Lost);
        assert!(end.metadata.is_err());
        assert!(!running.forward(JobSignal::Terminate));
    }
}
