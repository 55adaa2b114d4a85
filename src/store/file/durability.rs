//! When what was written is made to survive a power cut.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::store::file::handle::Lent;
use crate::store::file::shared::{Shared, Tracked};

/// What a power cut, or a system that stops dead, may take.
///
/// None of this matters when only a process dies, however suddenly: what was appended is with the system by then,
/// and nothing of it is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// A run that ended is there for good once [`finish`](crate::RunWriter::finish) has returned: log, journal and
    /// `metadata.json` are on the disk, in this order. Of a run that goes on, a power cut takes what the system has
    /// not written by itself, commonly the last 5 to 30 seconds; what is left of it is found as lost.
    #[default]
    OnFinish,
    /// As [`OnFinish`](Self::OnFinish), and of a run that goes on a power cut takes no more than this last time's
    /// output, as long as the disk keeps up. Costs a sync of every run that has printed something, each time.
    Periodic(Duration),
    /// Nothing is synced: a power cut may take any part of what the system has not written by itself, of runs that
    /// have ended too. For logs that are not worth waiting for.
    None,
}

impl Durability {
    /// Whether the end of a run waits for the disk.
    pub(crate) const fn syncs_ends(self) -> bool {
        !matches!(self, Self::None)
    }
}

/// The thread that syncs runs while they go on.
#[derive(Debug)]
pub(crate) struct Syncer {
    stop: Mutex<mpsc::Sender<()>>,
}

impl Syncer {
    /// Starts it. It ends with the store.
    pub(crate) fn start(store: Lent, every: Duration) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        thread::Builder::new().name("syncer".into()).spawn(move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                if store.with(|shared| sync_all(shared)).is_none() {
                    return;
                }
            }
        })?;
        Ok(Self { stop: Mutex::new(stop) })
    }

    /// Ends it before the store goes.
    pub(crate) fn stop(&self) {
        let _ = self.stop.lock().unwrap_or_else(PoisonError::into_inner).send(());
    }
}

fn sync_all(shared: &Shared) {
    for tracked in shared.all_tracked() {
        if let Tracked::Own(own) = tracked
            && let Err(error) = own.sync()
        {
            tracing::warn!(%error, run = %own.run.id, "what was written is not on the disk yet");
        }
    }
}
