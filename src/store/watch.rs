//! Seeing what other processes do in the log folder: at once through inotify, and by looking again now and then
//! in case an event was lost.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Instant;

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use crate::error::LogError;
use crate::layout::RunFolder;
use crate::run::JobRunId;
use crate::store::file::{Inner, Tracked};

/// Watches a log folder for a store.
///
/// An event of a run that is followed is dealt with on the thread that receives it, so that a line which another
/// process writes is on its way to the readers without a detour. All else is the work of a second thread.
#[derive(Debug)]
pub(crate) struct Watch {
    watcher: Mutex<Option<RecommendedWatcher>>,
    tasks: mpsc::Sender<Task>,
}

#[derive(Debug)]
enum Task {
    /// A folder may have appeared.
    Look(JobRunId),
    /// Look for every folder that is not known.
    LookAround,
    /// A run is over: its folder need not be watched any more.
    Unwatch(RunFolder),
    Stop,
}

impl Watch {
    /// Starts watching for a store.
    ///
    /// # Errors
    ///
    /// [`LogError::Io`] if the folder can't be watched.
    pub(crate) fn start(inner: &Arc<Inner>) -> Result<Self, LogError> {
        inner.layout.create()?;
        let folder = inner.layout.job_runs();
        let (tasks, inbox) = mpsc::channel();
        let of_events = (Arc::downgrade(inner), tasks.clone());
        let watcher = notify::recommended_watcher(move |event| on_event(&of_events.0, &of_events.1, event))
            .and_then(|mut watcher| {
                watcher.watch(folder, RecursiveMode::NonRecursive)?;
                Ok(watcher)
            })
            .map_err(|error| LogError::io("watching", folder)(std::io::Error::other(error)))?;
        let weak = Arc::downgrade(inner);
        thread::Builder::new()
            .name("adopter".into())
            .spawn(move || work(&weak, &inbox))
            .map_err(LogError::io("starting a thread for", folder))?;
        Ok(Self { watcher: Mutex::new(Some(watcher)), tasks })
    }

    /// Begins to watch a run's folder. Without an inotify watch (there is a limit on their number) the run is still
    /// looked at now and then.
    pub(crate) fn add(&self, folder: &RunFolder) {
        if let Some(watcher) = &mut *self.watcher.lock().unwrap_or_else(PoisonError::into_inner)
            && let Err(error) = watcher.watch(folder.path(), RecursiveMode::NonRecursive)
        {
            tracing::warn!(%error, path = %folder.path().display(), "a run is followed without inotify");
        }
    }

    /// Ends watching a run's folder.
    pub(crate) fn remove(&self, folder: &RunFolder) {
        if let Some(watcher) = &mut *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may be gone with its folder already.
            let _ = watcher.unwatch(folder.path());
        }
    }

    /// The same from a thread that must not wait for the watcher, such as the watcher's own.
    pub(crate) fn remove_later(&self, folder: &RunFolder) {
        let _ = self.tasks.send(Task::Unwatch(folder.clone()));
    }

    /// Takes up every run folder that is not known yet, in the background.
    pub(crate) fn discover_all(&self) {
        let _ = self.tasks.send(Task::LookAround);
    }

    /// Ends watching.
    pub(crate) fn stop(&self) {
        let _ = self.tasks.send(Task::Stop);
        drop(self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Deals with what inotify tells.
fn on_event(inner: &Weak<Inner>, tasks: &mpsc::Sender<Task>, event: notify::Result<Event>) {
    let event = match event {
        Ok(event) if event.need_rescan() => {
            let _ = tasks.send(Task::LookAround);
            return;
        }
        Ok(event) => event,
        Err(error) => {
            tracing::warn!(%error, "watching the log folder");
            return;
        }
    };
    if !matches!(event.kind, EventKind::Create(_) | EventKind::Modify(_)) {
        return;
    }
    let Some(inner) = inner.upgrade() else { return };
    for path in &event.paths {
        let Some(id) = inner.layout.run_of(path) else { continue };
        match inner.tracked(&id) {
            Some(Tracked::Foreign(foreign)) => inner.catch_up(&foreign),
            Some(Tracked::Own(_)) => {}
            None if path.parent() == Some(inner.layout.job_runs()) => {
                let _ = tasks.send(Task::Look(id));
            }
            None => {}
        }
    }
}

/// The second thread: takes up new runs, and asks of the others whether their writers live.
fn work(inner: &Weak<Inner>, inbox: &mpsc::Receiver<Task>) {
    let Some((liveness, rescan)) =
        inner.upgrade().map(|inner| (inner.options.liveness_interval, inner.options.rescan_interval))
    else {
        return;
    };
    let mut next_look = Instant::now() + liveness;
    let mut next_rescan = Instant::now() + rescan;
    loop {
        let task = inbox.recv_timeout(next_look.saturating_duration_since(Instant::now()));
        let Some(inner) = inner.upgrade() else { return };
        match task {
            Ok(Task::Look(id)) => look(&inner, &id),
            Ok(Task::LookAround) => look_around(&inner),
            Ok(Task::Unwatch(folder)) => {
                if let Some(watch) = inner.watching() {
                    watch.remove(&folder);
                }
            }
            Ok(Task::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() >= next_look {
            for tracked in inner.all_tracked() {
                if let Tracked::Foreign(foreign) = tracked
                    && !foreign.run.is_over()
                {
                    inner.catch_up(&foreign);
                    check_writer(&inner, &foreign);
                }
            }
            next_look = Instant::now() + liveness;
        }
        if Instant::now() >= next_rescan {
            look_around(&inner);
            next_rescan = Instant::now() + rescan;
        }
    }
}

fn check_writer(inner: &Inner, foreign: &crate::store::adopt::ForeignRun) {
    match inner.end_if_lost(foreign) {
        Ok(()) if foreign.run.is_over() => inner.retire(foreign),
        Ok(()) => {}
        Err(error) => tracing::warn!(%error, run = %foreign.run.id, "whether its writer lives can't be told"),
    }
}

/// Takes up a run that appeared; a store without an index leaves that to those who ask for the run.
fn look(inner: &Arc<Inner>, id: &JobRunId) {
    if inner.index.is_some() {
        match inner.adopt(id, None) {
            Ok(_) | Err(LogError::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, run = %id, "a run folder can't be taken up"),
        }
    }
    inner.announce();
}

/// Takes up every run folder that the index does not know, oldest first, so that their numbers rise with their age.
fn look_around(inner: &Arc<Inner>) {
    if let Some(index) = &inner.index {
        let unknown = inner.layout.list_runs().and_then(|ids| index.unknown(ids));
        match unknown {
            Ok(mut ids) => {
                ids.retain(|id| inner.tracked(id).is_none());
                ids.sort_by_cached_key(|id| super::list::created(inner, id));
                for id in &ids {
                    if inner.is_closed() {
                        break;
                    }
                    look(inner, id);
                }
            }
            Err(error) => tracing::warn!(%error, "looking for runs of other processes"),
        }
        inner.set_discovered();
    }
    inner.announce();
}
