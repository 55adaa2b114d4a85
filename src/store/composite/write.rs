//! The writing side: every member gets the same appends of a run in the same order.

use std::sync::{Arc, Mutex};

use super::best_effort::Command;
use super::{Shared, lock};
use crate::error::LogError;
use crate::line::Stream;
use crate::run::{JobMetadata, JobRunId, RunSpec};
use crate::store::{Outcome, RunEnd, RunWriter};

/// A run that is being written. The lock is held for a whole append, so that all members see the same order.
pub(super) struct Run {
    id: JobRunId,
    writing: Mutex<Writing>,
}

/// The writers of a run: one for each required member, or none if it is written by its id alone.
#[derive(Default)]
pub(super) struct Writing {
    writers: Vec<Option<Box<dyn RunWriter>>>,
    over: bool,
}

impl Shared {
    pub(super) fn run(&self, id: &JobRunId) -> Arc<Run> {
        let run = || Arc::new(Run { id: id.clone(), writing: Mutex::default() });
        Arc::clone(lock(&self.runs).entry(id.clone()).or_insert_with(run))
    }

    /// Writes a run, in turn with whoever else does.
    pub(super) fn writing<T>(&self, id: &JobRunId, write: impl FnOnce(&mut Writing) -> T) -> T {
        let run = self.run(id);
        let result = write(&mut lock(&run.writing));
        self.forget(run);
        result
    }

    /// Lets go of a run, which is forgotten if nobody else holds it.
    pub(super) fn forget(&self, run: Arc<Run>) {
        let id = run.id.clone();
        let mut runs = lock(&self.runs);
        // Under the lock of the map, so that the last of several who let go at once finds itself the last.
        drop(run);
        if runs.get(&id).is_some_and(|run| Arc::strong_count(run) == 1) {
            runs.remove(&id);
        }
    }

    pub(super) fn start(&self, spec: RunSpec) -> Result<Arc<Run>, LogError> {
        let id = spec.id.clone();
        let run = self.run(&id);
        let mut writing = lock(&run.writing);
        let mut writers = Vec::new();
        for (index, member) in self.required.iter().enumerate() {
            match member.store.start(spec.clone()) {
                Ok(writer) => writers.push(Some(writer)),
                Err(error) => {
                    let error = member.failed(index, "starting a run", error);
                    for writer in writers.into_iter().flatten() {
                        let note = Some(format!("the run was not started: {error}"));
                        let end = RunEnd { note, ..RunEnd::now(Outcome::Lost) };
                        if let Err(error) = writer.finish(end) {
                            tracing::warn!(run = %id, %error, "a run that was not started could not be ended");
                        }
                    }
                    drop(writing);
                    self.forget(run);
                    return Err(error);
                }
            }
        }
        writing.writers = writers;
        for member in &self.best_effort {
            member.send(&id, Command::Start(Box::new(spec.clone())));
        }
        drop(writing);
        Ok(run)
    }

    pub(super) fn append(
        &self,
        writing: &mut Writing,
        id: &JobRunId,
        stream: Stream,
        bytes: &[u8],
    ) -> Result<(), LogError> {
        if writing.over {
            return Err(LogError::Finished { id: id.clone() });
        }
        let mut failure = None;
        for (index, member) in self.required.iter().enumerate() {
            let appended = match writing.writers.get_mut(index).and_then(Option::as_mut) {
                Some(writer) => writer.append(stream, bytes),
                None => member.store.append(id, stream, bytes),
            };
            match appended {
                Ok(()) => {}
                Err(error @ (LogError::Finished { .. } | LogError::Evicted(_))) if index == 0 => {
                    return Err(error);
                }
                Err(error) => {
                    failure = LogError::both(failure, Some(member.failed(index, "appending", error)))
                }
            }
        }
        for member in &self.best_effort {
            member.append(id, stream, bytes);
        }
        failure.map_or(Ok(()), Err)
    }

    pub(super) fn flush(&self, writing: &mut Writing, id: &JobRunId) -> Result<(), LogError> {
        if writing.over {
            return Err(LogError::Finished { id: id.clone() });
        }
        let mut failure = None;
        for ((index, member), writer) in self.required.iter().enumerate().zip(&mut writing.writers) {
            if let Some(Err(error)) = writer.as_mut().map(|writer| writer.flush()) {
                failure = LogError::both(failure, Some(member.failed(index, "flushing", error)));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    pub(super) fn finish(
        &self,
        writing: &mut Writing,
        id: &JobRunId,
        end: RunEnd,
    ) -> Result<JobMetadata, LogError> {
        if writing.over {
            return Err(LogError::Finished { id: id.clone() });
        }
        let mut first = None;
        let mut failure = None;
        for (index, member) in self.required.iter().enumerate() {
            let ended = match writing.writers.get_mut(index).and_then(Option::take) {
                Some(writer) => writer.finish(end.clone()),
                None => member.store.finish(id, end.clone()),
            };
            match ended {
                Ok(run) => first = first.or(Some(run)),
                // An end that reached only some members may be given again.
                Err(LogError::Finished { .. }) if first.is_some() => {}
                Err(error) => {
                    let error = member.failed(index, "ending a run", error);
                    // Of a run that is not known or over, the others say the same.
                    if !failure.as_ref().is_some_and(LogError::is_about_the_run) {
                        failure = LogError::both(failure, Some(error));
                    }
                }
            }
        }
        if first.is_some() {
            writing.over = true;
            for member in &self.best_effort {
                member.send(id, Command::Finish(Box::new(end.clone())));
            }
        }
        match (failure, first) {
            (None, Some(run)) => Ok(run),
            (Some(error), _) => Err(error),
            (None, None) => Err(LogError::NotFound { id: id.clone() }),
        }
    }

    /// The writer is gone: in every member, the run is lost unless it is over.
    pub(super) fn abandon(&self, writing: &mut Writing, id: &JobRunId) {
        if !writing.over {
            writing.over = true;
            writing.writers.clear();
            for member in &self.best_effort {
                member.send(id, Command::Abandon);
            }
        }
    }
}

pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) run: Arc<Run>,
}

impl RunWriter for Writer {
    fn id(&self) -> &JobRunId {
        &self.run.id
    }

    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.shared.append(&mut lock(&self.run.writing), &self.run.id, stream, bytes)
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.shared.flush(&mut lock(&self.run.writing), &self.run.id)
    }

    fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.shared.finish(&mut lock(&self.run.writing), &self.run.id, end)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.abandon(&mut lock(&self.run.writing), &self.run.id);
        let nothing = Arc::new(Run { id: self.run.id.clone(), writing: Mutex::default() });
        self.shared.forget(std::mem::replace(&mut self.run, nothing));
    }
}
