//! Stores for tests of what stands before a store.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use databuild_logs::{
    Batch, ByteOffset, JobMetadata, JobRunId, LineNumber, LogError, LogStore, MemoryLogStore, ReadEnd,
    ReadEvent, ReadOptions, ReadStream, RunEnd, RunPage, RunQuery, RunSpec, RunWriter, Start, Stream, View,
};
use futures_util::{StreamExt, stream};
use tokio::sync::watch;

/// Forwards the methods of a store that stay as they are to a field.
macro_rules! forward {
    ($field:ident) => {
        fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
            self.$field.start(spec)
        }
        fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
            self.$field.append(id, stream, bytes)
        }
        fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
            self.$field.finish(id, end)
        }
        fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
            self.$field.position(id, view, start)
        }
        fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
            self.$field.byte_offset(id, stream, start)
        }
        fn read_bytes(
            &self,
            id: &JobRunId,
            stream: Stream,
            offset: ByteOffset,
            length: usize,
        ) -> Result<Bytes, LogError> {
            self.$field.read_bytes(id, stream, offset, length)
        }
        fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
            self.$field.run(id)
        }
    };
}

/// A store that outlives its servers, as a folder does: closing it ends the reads that are open, and new ones find
/// everything again.
#[derive(Clone)]
pub(crate) struct Reopened {
    inner: MemoryLogStore,
    closed: watch::Sender<usize>,
}

impl Reopened {
    pub(crate) fn new() -> Self {
        Self { inner: MemoryLogStore::new(), closed: watch::Sender::new(0) }
    }
}

impl LogStore for Reopened {
    forward!(inner);

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        let mut closed = self.closed.subscribe();
        let events = self.inner.read(id, options)?;
        Ok(stream::unfold(Some((events, closed.clone())), move |state| {
            closed.mark_unchanged();
            async {
                let (mut events, mut closed) = state?;
                tokio::select! {
                    _ = closed.changed() => Some((Ok(ReadEvent::End(ReadEnd::Shutdown)), None)),
                    event = events.next() => Some((event?, Some((events, closed)))),
                }
            }
        })
        .boxed())
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        self.inner.runs(query)
    }

    fn close(&self) -> Result<(), LogError> {
        self.closed.send_modify(|count| *count += 1);
        Ok(())
    }
}

/// A store whose reads give prepared events, and count how many were pulled.
#[derive(Clone)]
pub(crate) struct Scripted {
    inner: MemoryLogStore,
    events: Arc<dyn Fn(usize) -> Option<Result<ReadEvent, LogError>> + Send + Sync>,
    pub(crate) pulled: Arc<AtomicUsize>,
    /// What opening a read, listing runs and closing answer, if not what they should.
    pub(crate) refuses: Option<fn() -> LogError>,
}

impl Scripted {
    pub(crate) fn new(
        events: impl Fn(usize) -> Option<Result<ReadEvent, LogError>> + Send + Sync + 'static,
    ) -> Self {
        let (inner, pulled) = (MemoryLogStore::new(), Arc::default());
        Self { inner, events: Arc::new(events), pulled, refuses: None }
    }

    pub(crate) fn refusing(refuses: fn() -> LogError) -> Self {
        Self { refuses: Some(refuses), ..Self::new(|_| None) }
    }

    fn answer(&self) -> Result<(), LogError> {
        self.refuses.map_or(Ok(()), |error| Err(error()))
    }
}

impl LogStore for Scripted {
    forward!(inner);

    fn read(&self, _: &JobRunId, _: ReadOptions) -> Result<ReadStream, LogError> {
        self.answer()?;
        let this = self.clone();
        let events = (0..).map_while(move |index| {
            this.pulled.fetch_add(1, Ordering::SeqCst);
            (this.events)(index)
        });
        Ok(stream::iter(events).boxed())
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        self.answer()?;
        self.inner.runs(query)
    }

    fn close(&self) -> Result<(), LogError> {
        self.inner.close()
    }
}

/// Lines of standard output from line `first` on, each given with its `\n`.
pub(crate) fn batch(first: u64, text: impl Into<Bytes>) -> Batch {
    let bytes = text.into();
    Batch {
        stream: Stream::Stdout,
        first_line: LineNumber(first),
        first_position: LineNumber(first),
        lines: bytes.split_inclusive(|&b| b == b'\n').count() as u64,
        bytes,
        times: Vec::new(),
        cut: None,
    }
}
