//! Finding a run, wherever it is, and beginning to read it.

use std::sync::Arc;

use futures_util::{FutureExt, StreamExt, stream};

use super::Shared;
use crate::error::LogError;
use crate::index::{Index, Known, RunNumber};
use crate::run::JobRunId;
use crate::store::file::adopt::ForeignRun;
use crate::store::file::identity::Holder;
use crate::store::file::live::LiveRun;
use crate::store::file::source::FileSource;
use crate::store::follow::drive;
use crate::store::{ReadEnd, ReadEvent, ReadOptions, ReadStream};

impl Shared {
    /// The run with this id, wherever it is.
    pub(crate) fn find(self: &Arc<Self>, id: &JobRunId) -> Result<Arc<LiveRun>, LogError> {
        if self.is_closed() {
            return Err(LogError::Closed);
        }
        self.check_home()?;
        if let Some(tracked) = self.tracked(id) {
            let run = tracked.run();
            if !run.is_over() || !matches!(run.folder.is_there(), Ok(false)) && !tracked.is_outlived() {
                return Ok(Arc::clone(run));
            }
            self.check_home()?;
            self.forget(run);
        }
        if let Some(tombstone) = self.evictions.going(id) {
            return Err(LogError::Evicted(Box::new(tombstone)));
        }
        if let Some(index) = &self.index {
            match index.find(id) {
                Ok(Some(Known::Run(number, record))) if record.run.state.is_over() => {
                    let folder = self.layout.run(id);
                    return match self.looks.holder(&folder, number, &record)? {
                        Holder::ItsRun => Ok(Arc::new(LiveRun::over(folder, Some(number), *record))),
                        Holder::AnotherRun => self.adopt(id, None),
                        Holder::Nobody => Err(self.gone(index, id, number)),
                    };
                }
                Ok(Some(Known::Run(number, _))) => return self.adopt(id, Some(number)),
                Ok(Some(Known::Evicted(tombstone))) => return Err(LogError::Evicted(Box::new(tombstone))),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, run = %id, "looking for the run without the index"),
            }
        }
        let is_missing = self.index.as_ref().is_some_and(|index| index.is_missing());
        if (is_missing || !self.discovery.is_done()) && self.layout.run(id).is_there()? {
            // Runs are numbered in the order of their age by whoever goes through the folders: a run that is over
            // does not get its number out of turn because somebody asks for it.
            let foreign = ForeignRun::open(&self.layout, id, None, None)?;
            if foreign.run.is_over() && !foreign.lacks_end() {
                return Ok(foreign.run);
            }
        }
        self.adopt(id, None)
    }

    /// Why a run of which the index knows has no folder. If nobody evicted it, the index lets go of it.
    fn gone(&self, index: &Index, id: &JobRunId, number: RunNumber) -> LogError {
        if let Err(error) = self.check_home() {
            return error;
        }
        // It may have been evicted since the index was asked.
        if let Some(tombstone) = self.evictions.going(id) {
            return LogError::Evicted(Box::new(tombstone));
        }
        match index.find(id) {
            Ok(Some(Known::Evicted(tombstone))) => return LogError::Evicted(Box::new(tombstone)),
            Ok(Some(Known::Run(known, _))) if known == number && !self.runs().forgotten.contains(&number) => {
                self.forget_rows(number);
            }
            _ => {}
        }
        LogError::NotFound { id: id.clone() }
    }

    pub(crate) fn open_read(
        self: &Arc<Self>,
        id: &JobRunId,
        options: &ReadOptions,
    ) -> Result<ReadStream, LogError> {
        let mut run = self.find(id)?;
        if self.index.is_some() {
            run = self.evictions.note_reader(run);
            // An eviction that did not see this reader is seen by it.
            if let Some(tombstone) = self.evictions.going(id) {
                return Err(LogError::Evicted(Box::new(tombstone)));
            }
        }
        let signal = run.subscribe();
        let source = FileSource::open(run, self.index.clone(), Arc::clone(&self.closed), options)?;
        Ok(drive(Box::new(source), signal))
    }

    /// A read that first waits for its run to appear.
    pub(crate) fn wait_and_read(
        self: &Arc<Self>,
        id: JobRunId,
        options: ReadOptions,
    ) -> Result<ReadStream, LogError> {
        self.watch()?.begin();
        let mut appeared = self.appeared.subscribe();
        let shared = Arc::clone(self);
        let waiting = async move {
            loop {
                appeared.borrow_and_update();
                let opened = {
                    let (shared, id, options) = (Arc::clone(&shared), id.clone(), options.clone());
                    tokio::task::spawn_blocking(move || shared.open_read(&id, &options)).await
                };
                match opened {
                    Ok(Ok(events)) => return events,
                    Ok(Err(LogError::NotFound { .. })) => {}
                    Ok(Err(LogError::Closed)) | Err(_) => {
                        return stream::iter([Ok(ReadEvent::End(ReadEnd::Shutdown))]).boxed();
                    }
                    Ok(Err(error)) => return stream::iter([Err(error)]).boxed(),
                }
                // Thousands may wait for runs of their own: nobody opens anything before there is a folder.
                loop {
                    if appeared.changed().await.is_err() {
                        return stream::iter([Err(LogError::Closed)]).boxed();
                    }
                    // If that can't be told, whoever opens it says so.
                    if shared.is_closed() || shared.layout.run(&id).is_there().unwrap_or(true) {
                        break;
                    }
                }
            }
        };
        Ok(waiting.flatten_stream().boxed())
    }
}
