//! Runs of other processes: taking them up, catching up with them, and seeing their end.

use std::sync::{Arc, PoisonError};

use super::{Shared, Tracked};
use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::progress::Resume;
use crate::index::{Known, RunNumber, Urgency};
use crate::layout::{RunFolder, is_news};
use crate::line::UnixMicros;
use crate::run::{JobRunId, Tombstone};
use crate::store::file::adopt::ForeignRun;
use crate::store::file::identity::is_of;
use crate::store::file::live::LiveRun;
use crate::store::file::tracker::ends_a_record;

impl Shared {
    /// Takes up a run that another process writes or wrote, and gives it. It gets this number, or a new one, unless the
    /// index has the run already; rows of another run with its id are let go of.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        id: &JobRunId,
        number: Option<RunNumber>,
    ) -> Result<Arc<LiveRun>, LogError> {
        if let Some(tracked) = self.tracked(id) {
            return Ok(Arc::clone(tracked.run()));
        }
        self.check_home()?;
        let folder = self.layout.run(id);
        if !folder.is_there()? || self.runs().starting.contains(id) {
            return Err(LogError::NotFound { id: id.clone() });
        }
        let adopting = Adopting::begin(self, id);
        // It may have been started by this process just before that look, or taken up by another thread.
        if let Some(tracked) = self.tracked(id) {
            return Ok(Arc::clone(tracked.run()));
        }
        let number = match self.known(id, &folder) {
            // Somebody else took it up, and it is over and written since.
            Some((number, record)) if record.run.state.is_over() => {
                return Ok(Arc::new(LiveRun::over(folder, Some(number), *record)));
            }
            Some((number, _)) => Some(number),
            None => number,
        };
        // Watched first, so that nothing written in between is missed.
        let watch = self.watch()?;
        watch.add(&folder);
        // Rows that are about to be forgotten are not added to.
        let number = number.filter(|number| !self.runs().forgotten.contains(number));
        let resume = number.and_then(|number| self.resume(number));
        let number = number.or_else(|| self.next_number());
        let mut foreign = ForeignRun::open(&self.layout, id, number, resume)?;
        if self.index.is_some() && foreign.begin_journal_anew()? {
            foreign = ForeignRun::open(&self.layout, id, number, None)?;
        }
        let foreign = Arc::new(foreign);
        if let Err(error) = self.end_if_gone(&foreign) {
            tracing::warn!(%error, run = %id, "whether its writer lives is asked again in a moment");
        }
        let run = {
            let mut runs = self.runs();
            if let Some(other) = runs.by_id.get(id) {
                return Ok(Arc::clone(other.run()));
            }
            if self.index.is_some() || !foreign.run.is_over() {
                runs.by_id.insert(id.clone(), Tracked::Foreign(Arc::clone(&foreign)));
            }
            Arc::clone(&foreign.run)
        };
        // From here on whoever waits for it can have it, also while its `metadata.json` is synced.
        drop(adopting);
        if run.is_over() {
            self.unwatch(&folder);
            if let Err(error) = self.complete_end(&foreign) {
                tracing::warn!(%error, run = %id, "its end is tried again in a moment");
            }
        } else {
            // What was written before it was known here woke nobody.
            self.catch_up(&foreign);
        }
        self.announce();
        self.nudge(if run.is_over() { Urgency::Now } else { Urgency::Soon });
        Ok(run)
    }

    /// What the index has of the run in a folder. Rows of another run, which had the id before, are let go of.
    fn known(&self, id: &JobRunId, folder: &RunFolder) -> Option<(RunNumber, Box<RunRecord>)> {
        let (number, record) = match self.index.as_ref()?.find(id) {
            Ok(Some(Known::Run(number, record))) => (number, record),
            Ok(_) => return None,
            Err(error) => {
                tracing::warn!(%error, run = %id, "taking up the run without the index");
                return None;
            }
        };
        if self.runs().forgotten.contains(&number) {
            return None;
        }
        if is_of(folder, &record) {
            return Some((number, record));
        }
        tracing::info!(run = %id, "the id was used again after its folder was removed: the earlier run is let go of");
        self.forget_rows(number);
        None
    }

    /// Takes what the index knows of runs that were live behind the places from which they are followed on.
    pub(crate) fn forget_places_behind_resumes(
        &self,
        live: &[(RunNumber, RunRecord)],
    ) -> Result<(), LogError> {
        let Some(index) = self.index.as_ref().filter(|_| !live.is_empty()) else { return Ok(()) };
        let places = live.iter().map(|(number, record)| {
            let resume = self.resume(*number);
            let place = resume.map(|resume| resume.progress);
            let id = record.run.id();
            let is_there = place.is_some_and(|at| ends_a_record(&self.layout.run(id), at.journal));
            (*number, place.filter(|_| is_there))
        });
        index.forget_places_behind(&places.collect::<Vec<_>>())
    }

    /// From where a run that the index knows is followed on. Without such a place its journal is read from the
    /// beginning.
    fn resume(&self, number: RunNumber) -> Option<Resume> {
        let found = self.index.as_ref()?.resume(number);
        found.unwrap_or_else(|error| {
            tracing::warn!(%error, number, "a run is taken up from its beginning");
            None
        })
    }

    /// Ends a run whose writer is gone for its readers.
    pub(crate) fn end_if_gone(&self, foreign: &ForeignRun) -> Result<(), LogError> {
        if !foreign.run.is_over() && foreign.writer_is_gone()? {
            if self.index.is_some() && !foreign.is_compressed() && !foreign.has_written_end()? {
                foreign.recover(&self.options)?;
            } else {
                foreign.report_end()?;
            }
        }
        Ok(())
    }

    /// Writes what is missing of the end of a run that is over.
    pub(crate) fn complete_end(&self, foreign: &ForeignRun) -> Result<(), LogError> {
        if self.index.is_some() { foreign.complete_end(&self.options) } else { Ok(()) }
    }

    /// Called when a run of another process may have come further. Gives false if it was let go of, to be taken up
    /// anew.
    pub(crate) fn catch_up(&self, foreign: &ForeignRun) -> bool {
        if self.index.is_some() && foreign.has_got_journal() {
            self.take_up_anew(foreign);
            return false;
        }
        let before = foreign.run.state().progress;
        let caught_up = foreign.catch_up();
        foreign.count(&before);
        match caught_up {
            Ok(true) => self.retire(foreign),
            Ok(false) => {
                if self.index.is_some() && foreign.run.state().waiting.dirty {
                    self.nudge(Urgency::Soon);
                }
            }
            Err(error) => {
                if is_news(foreign.run.folder.path(), &error.to_string()) {
                    tracing::warn!(%error, run = %foreign.run.id, "a run of another process can't be followed");
                }
            }
        }
        true
    }

    /// Lets go of a run whose lines were counted until its journal came, and of what the index has of it. It is taken
    /// up again by the journal; its readers are told to come again.
    fn take_up_anew(&self, foreign: &ForeignRun) {
        {
            let mut runs = self.runs();
            runs.remove(&foreign.run);
            runs.forgotten.extend(foreign.run.number);
        }
        foreign.run.change(|state| state.is_replaced = true);
        if let Some(watch) = self.watch.get() {
            watch.take_up(&foreign.run.id);
        }
        self.nudge(Urgency::Now);
    }

    /// Stops watching the folder of a run that is over. Another run may be in it by now: if that is watched, or is just
    /// being taken up, it stays so.
    pub(crate) fn unwatch(&self, folder: &RunFolder) {
        let Some(id) = self.layout.run_of(folder.path()) else { return };
        let adopting = self.adopting.lock().unwrap_or_else(PoisonError::into_inner);
        if !adopting.contains(&id)
            && self.tracked(&id).is_none_or(|tracked| tracked.run().is_over())
            && let Some(watch) = self.watching()
        {
            watch.remove(folder);
        }
    }

    /// Lets go of a run of another process that is over, once the index has it.
    pub(crate) fn retire(&self, foreign: &ForeignRun) {
        if let Some(watch) = self.watch.get() {
            watch.remove_later(&foreign.run.folder);
        }
        if self.index.is_none() {
            self.runs().remove(&foreign.run);
        }
        self.nudge(Urgency::Now);
    }

    /// Lets go of a run whose folder is gone, and tells its readers.
    pub(crate) fn forget(&self, run: &Arc<LiveRun>) {
        tracing::warn!(run = %run.id, "the folder of a run was removed");
        run.change(|state| {
            let why = "its folder was removed".to_owned();
            state.evicted = Some(Box::new(Tombstone::of(&state.metadata(), UnixMicros::now(), why)));
        });
        {
            let mut runs = self.runs();
            runs.remove(run);
            runs.forgotten.extend(run.number);
        }
        if let Some(watch) = self.watch.get() {
            watch.remove_later(&run.folder);
        }
        self.nudge(Urgency::Now);
    }
}

/// While it lives, no other thread takes up the same run: both would end it if its writer is gone.
struct Adopting<'a> {
    shared: &'a Shared,
    id: &'a JobRunId,
}

impl<'a> Adopting<'a> {
    fn begin(shared: &'a Shared, id: &'a JobRunId) -> Self {
        let mut adopting = shared.adopting.lock().unwrap_or_else(PoisonError::into_inner);
        while !adopting.insert(id.clone()) {
            adopting = shared.adopted.wait(adopting).unwrap_or_else(PoisonError::into_inner);
        }
        Self { shared, id }
    }
}

impl Drop for Adopting<'_> {
    fn drop(&mut self) {
        self.shared.adopting.lock().unwrap_or_else(PoisonError::into_inner).remove(self.id);
        self.shared.adopted.notify_all();
    }
}
