//! A job that runs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::line::Stream;
use crate::run::JobRunId;
use crate::runner::control::Control;
use crate::runner::events::{Events, Next};
use crate::runner::tee::Copied;
use crate::runner::{JobEnd, JobEvent, JobSignal};

/// A job that runs, or ran. It holds no output: that is in the log store.
///
/// Dropping it detaches from the job, which goes on and is recorded to its end.
#[derive(Debug)]
pub struct SubProcessRunning {
    pub(super) id: JobRunId,
    pub(super) control: Arc<Control>,
    pub(super) events: Arc<Events>,
    pub(super) kill_grace: Duration,
    /// Of a job whose output is copied.
    pub(super) copied: Option<watch::Receiver<Option<Copied>>>,
}

impl SubProcessRunning {
    /// The run that the job is recorded as.
    #[must_use]
    pub const fn job_run_id(&self) -> &JobRunId {
        &self.id
    }

    /// The number of the command's process, which is also that of its group. It stays taken until the job has
    /// ended.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.control.pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// The events that came since the last call; none when there are none. Never blocks.
    ///
    /// The last event is a [`JobEvent::Ended`]; after it there are no more.
    pub fn poll(&mut self) -> Vec<JobEvent> {
        let mut events = Vec::new();
        while let Next::Event(event) = self.events.next() {
            events.push(event);
        }
        events
    }

    /// Waits for the next event; `None` once [`JobEvent::Ended`] was given. Cancel safe.
    pub async fn next_event(&mut self) -> Option<JobEvent> {
        loop {
            match self.events.next() {
                Next::Event(event) => return Some(event),
                Next::Closed => return None,
                Next::Empty => self.events.arrived().await,
            }
        }
    }

    /// Waits until the job has ended and is recorded. The events stay where they are. Cancel safe.
    pub async fn wait(&self) -> Arc<JobEnd> {
        self.events.wait().await
    }

    /// Waits until the job's [`Tee`](crate::Tee), if it has one, has got everything or has gone. That can be long after
    /// the job's end, as long as somebody leaves it unread. Cancel safe.
    pub async fn copied(&self) {
        if let Some(copied) = &self.copied {
            // An error means that the thread is gone.
            let _ = copied.clone().wait_for(Option::is_some).await;
        }
    }

    /// Why a stream's copy by the job's [`Tee`](crate::Tee) is not whole: its destination could not be written to, for
    /// one that is full. `None` as long as the copying goes on, and when whoever read it went away.
    #[must_use]
    pub fn copy_failure(&self, stream: Stream) -> Option<Arc<str>> {
        self.copied.as_ref()?.borrow().as_ref()?[stream.index()].clone()
    }

    /// Whether the job has ended and is recorded. Never blocks.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.events.has_ended()
    }

    /// Asks the whole process group to end (TERM), and makes it end (KILL) when the grace period is over. Never
    /// blocks; calling it again does nothing.
    ///
    /// The run ends as cancelled, unless the command had ended before.
    pub fn cancel(&self) {
        self.control.cancel(self.kill_grace);
    }

    /// Passes a signal on to the whole process group, which does with it what it likes; false if the job has ended.
    /// Never blocks.
    ///
    /// The run ends as cancelled, unless the command had ended before.
    pub fn forward(&self, signal: JobSignal) -> bool {
        self.control.send(signal.into())
    }
}
