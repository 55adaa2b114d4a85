//! Seeing what other processes do in the log folder: at once through inotify, and by looking again now and then
//! in case an event was lost.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use crate::error::LogError;
use crate::layout::RunFolder;
use crate::run::JobRunId;
use crate::store::file::adopt::ForeignRun;
use crate::store::file::handle::Lent;
use crate::store::file::reconcile::{look, look_around, look_at_next_rows, take_up};
use crate::store::file::shared::{Shared, Tracked};

/// So many runs whose readers know that they are lost wait for the disk at a time: each has its files open.
const MOST_ENDING: usize = 128;

/// Watches a log folder for a store.
///
/// An event of a run that is followed is dealt with on the thread that receives it, so that a line which another
/// process writes is on its way to the readers without a detour. All else is the work of a second thread.
#[derive(Debug)]
pub(crate) struct Watch {
    watcher: Mutex<Option<RecommendedWatcher>>,
    /// Whether the folder of all runs is watched, or is going to be.
    begun: AtomicBool,
    tasks: mpsc::Sender<Task>,
}

#[derive(Debug)]
enum Task {
    /// Watch the folder of all runs, and then look who is there.
    Begin,
    /// A folder may have appeared.
    Look(JobRunId),
    /// Take up a run again that was let go of.
    TakeUp(JobRunId),
    /// Look for every folder that is not known.
    LookAround,
    /// A run is over: its folder need not be watched any more.
    Unwatch(RunFolder),
    Stop,
}

impl Watch {
    /// Makes ready to watch for a store: single runs from now on, and the folder of all once that is
    /// [begun](Self::begin). If the system has no inotify to give, nothing is watched, and all is seen by looking now and
    /// then.
    ///
    /// # Errors
    ///
    /// [`LogError::Io`] if the folder can't be made, or no thread can be started.
    pub(crate) fn start(shared: &Arc<Shared>) -> Result<Self, LogError> {
        shared.layout.create()?;
        let folder = shared.layout.job_runs();
        let (tasks, inbox) = mpsc::channel();
        let of_events = (Lent::new(shared), tasks.clone());
        let watcher = notify::recommended_watcher(move |event| on_event(&of_events.0, &of_events.1, event))
            .inspect_err(|error| {
                let options = &shared.options;
                let (lines, runs) = (options.liveness_interval, options.rescan_interval);
                tracing::warn!(%error, path = %folder.display(), ?lines, ?runs, "the log folder can't be watched; what others write is only seen by looking so often");
            })
            .ok();
        let store = Lent::new(shared);
        thread::Builder::new()
            .name("adopter".into())
            .spawn(move || work(&store, &inbox))
            .map_err(LogError::io("starting a thread for", folder))?;
        Ok(Self { watcher: Mutex::new(watcher), begun: AtomicBool::new(false), tasks })
    }

    /// Begins to watch the folder of all runs, in the background. Measured: the system looks at every run folder that
    /// it knows to do that, 17 ms for 100,000 of them.
    pub(crate) fn begin(&self) {
        if !self.begun.swap(true, Ordering::AcqRel) {
            let _ = self.tasks.send(Task::Begin);
        }
    }

    fn watch_all(&self, job_runs: &Path) {
        if let Some(watcher) = &mut *self.watcher.lock().unwrap_or_else(PoisonError::into_inner)
            && let Err(error) = watcher.watch(job_runs, RecursiveMode::NonRecursive)
        {
            tracing::error!(%error, path = %job_runs.display(), "new runs are only seen by looking for them now and then");
        }
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

    /// Takes up a run that was let go of, in the background.
    pub(crate) fn take_up(&self, id: &JobRunId) {
        let _ = self.tasks.send(Task::TakeUp(id.clone()));
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
fn on_event(store: &Lent, tasks: &mpsc::Sender<Task>, event: notify::Result<Event>) {
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
    store.with(|shared| {
        for path in &event.paths {
            let Some(id) = shared.layout.run_of(path) else { continue };
            let is_folder = path.parent() == Some(shared.layout.job_runs());
            match shared.tracked(&id) {
                Some(tracked) if is_folder && tracked.is_outlived() => {
                    let _ = tasks.send(Task::Look(id));
                }
                Some(Tracked::Foreign(foreign)) => {
                    shared.catch_up(&foreign);
                }
                Some(Tracked::Own(_)) => {}
                None if is_folder => {
                    let _ = tasks.send(Task::Look(id));
                }
                None => {}
            }
        }
    });
}

/// The second thread: takes up new runs, and asks of the others whether their writers live.
fn work(store: &Lent, inbox: &mpsc::Receiver<Task>) {
    let intervals = store.with(|shared| (shared.options.liveness_interval, shared.options.rescan_interval));
    let Some((liveness, rescan)) = intervals else { return };
    let mut next_look = Instant::now() + liveness;
    let mut next_rescan = Instant::now() + rescan;
    loop {
        let task = match inbox.recv_timeout(next_look.saturating_duration_since(Instant::now())) {
            Ok(Task::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(task) => Some(task),
            Err(RecvTimeoutError::Timeout) => None,
        };
        let worked = store.with(|shared| {
            if let Some(task) = task {
                carry_out(shared, task);
            }
            if Instant::now() >= next_look {
                next_look = look_after_all(shared, liveness);
            }
            if Instant::now() >= next_rescan {
                look_around(shared);
                look_at_next_rows(shared);
                next_rescan = Instant::now() + rescan;
            }
        });
        if worked.is_none() {
            return;
        }
    }
}

fn carry_out(shared: &Arc<Shared>, task: Task) {
    match task {
        Task::Begin => {
            if let Some(watch) = shared.watching() {
                watch.watch_all(shared.layout.job_runs());
            }
            look_around(shared);
        }
        Task::Look(id) => look(shared, &id, None),
        Task::TakeUp(id) => take_up(shared, &id, None),
        Task::LookAround => look_around(shared),
        Task::Unwatch(folder) => shared.unwatch(&folder),
        Task::Stop => {}
    }
}

/// Asks of all runs of other processes whether their writers live, and ends those of which they do not. Gives when to
/// do so again.
///
/// Of all that are lost the readers are told before the disk is waited for: many writers can die at once.
fn look_after_all(shared: &Arc<Shared>, liveness: Duration) -> Instant {
    let mut ended = VecDeque::new();
    for tracked in shared.all_tracked() {
        let Tracked::Foreign(foreign) = tracked else { continue };
        if !shared.catch_up(&foreign) {
            continue;
        }
        match look_after(shared, &foreign) {
            Ok(true) if foreign.run.is_over() => ended.push_back(foreign),
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, run = %foreign.run.id, "whether its writer lives can't be told")
            }
        }
        if ended.len() > MOST_ENDING
            && let Some(first) = ended.pop_front()
        {
            complete(shared, &first);
        }
    }
    let next_look = Instant::now() + liveness;
    for foreign in ended {
        complete(shared, &foreign);
        if Instant::now() >= next_look {
            // The others are not forgotten: they are looked after again.
            break;
        }
    }
    next_look
}

/// Gives whether the run's folder is there.
fn look_after(shared: &Arc<Shared>, foreign: &ForeignRun) -> Result<bool, LogError> {
    if foreign.is_outlived() {
        look(shared, &foreign.run.id, None);
        return Ok(false);
    }
    let is_there = || foreign.run.folder.is_there();
    if is_there()? {
        return shared.end_if_gone(foreign).map(|()| true);
    }
    // It may have gone with the whole log folder, or just come back with it.
    if shared.check_home().is_ok() && !is_there()? {
        shared.forget(&foreign.run);
    }
    Ok(false)
}

/// Writes the end of a run that is over, and lets go of it.
fn complete(shared: &Shared, foreign: &ForeignRun) {
    match shared.complete_end(foreign) {
        Ok(()) => shared.retire(foreign),
        Err(error) => {
            tracing::warn!(%error, run = %foreign.run.id, "its end can't be written, and is tried again in a moment");
        }
    }
}
