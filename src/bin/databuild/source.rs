//! One view of runs and logs, whether a service gives them or the folder itself.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use databuild_logs::{
    ByteOffset, Client, ClientEnd, ClientError, ClientEvent, JobMetadata, JobRunId, LineNumber, LogError,
    LogQuery, LogStore, ReadEnd, ReadEvent, RunCursor, RunList, RunQuery, Start, Stream, View,
};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};

use crate::failure::Failure;
use crate::store::blocking;

/// How much of a log is read at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// Where runs are looked up.
#[derive(Clone)]
pub(crate) enum Source {
    /// A service.
    Service(Client),
    /// The folder itself, without the index.
    Folder { store: Arc<dyn LogStore>, dir: PathBuf },
}

/// What went wrong, on either way.
#[derive(Debug)]
pub(crate) enum SourceError {
    Service(ClientError),
    Folder(LogError),
}

impl SourceError {
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Service(ClientError::NotFound { .. }) | Self::Folder(LogError::NotFound { .. }))
    }

    /// Whether no log service answers there: nothing does, it can't, or something else does.
    pub(crate) fn none_answers(&self) -> bool {
        matches!(self, Self::Service(error) if error.is_transient() || matches!(error, ClientError::NotOurs { .. }))
    }
}

impl From<ClientError> for SourceError {
    fn from(error: ClientError) -> Self {
        Self::Service(error)
    }
}

impl From<LogError> for SourceError {
    fn from(error: LogError) -> Self {
        Self::Folder(error)
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Service(error) => error.into(),
            SourceError::Folder(error) => error.into(),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(client) => write!(f, "the service at {}", client.base_url()),
            Self::Folder { dir, .. } => write!(f, "the folder {}", dir.display()),
        }
    }
}

impl Source {
    /// What is known of a run.
    pub(crate) async fn run(&self, id: &JobRunId) -> Result<JobMetadata, SourceError> {
        match self {
            Self::Service(client) => Ok(client.run(id).await?),
            Self::Folder { store, .. } => {
                let (store, id) = (Arc::clone(store), id.clone());
                Ok(blocking(move || store.run(&id)).await?)
            }
        }
    }

    /// A page of runs, newest first; `cursor` is [`RunList::next`] of the page before.
    pub(crate) async fn runs(&self, query: &RunQuery, cursor: Option<&str>) -> Result<RunList, SourceError> {
        match self {
            Self::Service(client) => Ok(client.runs(query, cursor).await?),
            Self::Folder { store, .. } => {
                let cursor = cursor.and_then(|number| number.parse().ok()).map(RunCursor);
                let (store, query) = (Arc::clone(store), RunQuery { cursor, ..query.clone() });
                let page = blocking(move || store.runs(&query)).await?;
                let next = page.next.map(|cursor| cursor.0.to_string());
                Ok(RunList { runs: page.runs, next, pinned: page.pinned })
            }
        }
    }

    /// Pins a run, or takes the pin away.
    pub(crate) async fn set_pinned(&self, id: &JobRunId, pinned: bool) -> Result<(), SourceError> {
        match self {
            Self::Service(client) => Ok(client.set_pinned(id, pinned).await?),
            Self::Folder { store, .. } => {
                let (store, id) = (Arc::clone(store), id.clone());
                Ok(blocking(move || store.set_pinned(&id, pinned)).await?)
            }
        }
    }

    /// The events of a log.
    pub(crate) async fn read(
        &self,
        id: &JobRunId,
        query: LogQuery,
    ) -> Result<BoxStream<'static, Result<ClientEvent, SourceError>>, SourceError> {
        match self {
            Self::Service(client) => Ok(client.read(id, query).err_into().boxed()),
            Self::Folder { store, .. } => {
                let (store, id) = (Arc::clone(store), id.clone());
                let events = blocking(move || store.read(&id, query.read_options())).await?;
                Ok(events.map(|event| folder_event(event?)).boxed())
            }
        }
    }

    /// The bytes of a stream, from behind line `since`, or the last `lines` lines, or both.
    pub(crate) async fn raw(
        &self,
        id: &JobRunId,
        stream: Stream,
        since: Option<LineNumber>,
        lines: Option<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        match self {
            Self::Service(client) => Ok(client.raw(id, stream, since, lines).await?.err_into().boxed()),
            Self::Folder { store, .. } => {
                let query = LogQuery { since, lines, ..LogQuery::new(View::One(stream)) };
                folder_bytes(Arc::clone(store), id.clone(), stream, query).await
            }
        }
    }
}

fn folder_event(event: ReadEvent) -> Result<ClientEvent, SourceError> {
    Ok(match event {
        ReadEvent::Lines(batch) => ClientEvent::Lines(batch),
        ReadEvent::Gap { gap, .. } => ClientEvent::Gap(gap.into()),
        ReadEvent::End(ReadEnd::Complete(run)) => ClientEvent::End(ClientEnd::Complete(run.completion())),
        ReadEvent::End(ReadEnd::Running { next }) => ClientEvent::End(ClientEnd::Running { next }),
        ReadEvent::End(ReadEnd::Evicted(tombstone)) => ClientEvent::End(ClientEnd::Evicted(tombstone)),
        ReadEvent::End(ReadEnd::Shutdown) => return Err(LogError::Closed.into()),
    })
}

/// The window ends where it ends now: a run that goes on does not make it longer while it is read.
async fn folder_bytes(
    store: Arc<dyn LogStore>,
    id: JobRunId,
    stream: Stream,
    query: LogQuery,
) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
    let lookup = (Arc::clone(&store), id.clone());
    let (from, to) = blocking(move || {
        let (store, id) = lookup;
        let from = store.byte_offset(&id, stream, query.read_options().start)?;
        let to = match (query.since, query.lines) {
            (Some(since), Some(lines)) => {
                match store.byte_offset(&id, stream, Start::After(since.plus(lines))) {
                    // The bytes up to the hole are given, and what is missing is said where they end.
                    Err(LogError::Corrupt { .. }) => None,
                    to => Some(to?),
                }
            }
            _ => None,
        };
        Ok((from, to))
    })
    .await?;
    let chunks = stream::try_unfold(from, move |offset: ByteOffset| {
        let (store, id) = (Arc::clone(&store), id.clone());
        async move {
            let (offset, bytes) = blocking(move || next_bytes(&*store, &id, stream, offset, to)).await?;
            let next = offset.plus(bytes.len() as u64);
            Ok((!bytes.is_empty()).then_some((bytes, next)))
        }
    });
    Ok(chunks.boxed())
}

/// The bytes that come next, and where they are: what is given up of a log is passed over.
fn next_bytes(
    store: &dyn LogStore,
    id: &JobRunId,
    stream: Stream,
    offset: ByteOffset,
    to: Option<ByteOffset>,
) -> Result<(ByteOffset, Bytes), LogError> {
    let left = |from: ByteOffset| {
        let left = to.map_or(u64::MAX, |to| to.0.saturating_sub(from.0));
        usize::try_from(left).unwrap_or(usize::MAX)
    };
    if left(offset) == 0 {
        return Ok((offset, Bytes::new()));
    }
    let (at, mut bytes) = store.read_kept_bytes(id, stream, offset, left(offset).min(CHUNK_BYTES))?;
    bytes.truncate(left(at));
    Ok((at, bytes))
}
