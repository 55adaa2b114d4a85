//! A store that fails, gets stuck and remembers its calls when a test wants it to.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;
use databuild_logs::{
    ByteOffset, JobMetadata, JobRunId, LineNumber, LogError, LogStore, MemoryLogStore, ReadOptions,
    ReadStream, RunEnd, RunPage, RunQuery, RunSpec, RunWriter, Start, Stream, View,
};

/// A memory store with faults.
#[derive(Clone, Default)]
pub(crate) struct FaultyStore {
    pub(crate) inner: MemoryStore,
    plan: Arc<Plan>,
}

/// `MemoryLogStore` behind an `Arc`, so that `Default` can be derived above.
#[derive(Clone)]
pub(crate) struct MemoryStore(pub(crate) Arc<dyn LogStore>);

impl Default for MemoryStore {
    fn default() -> Self {
        Self(Arc::new(MemoryLogStore::new()))
    }
}

#[derive(Default)]
struct Plan {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How many of the next calls of each kind fail.
    failing: HashMap<&'static str, usize>,
    failed: usize,
    blocked: bool,
    waiting: usize,
    appends: Vec<(Stream, Vec<u8>)>,
    closed: usize,
}

impl FaultyStore {
    pub(crate) fn arc(&self) -> Arc<dyn LogStore> {
        Arc::new(self.clone())
    }

    /// The next `count` calls of this kind fail with a full disk: "start", "append", "flush", "finish", "read",
    /// "runs" or "close".
    pub(crate) fn fail(&self, call: &'static str, count: usize) {
        self.plan.state.lock().unwrap().failing.insert(call, count);
    }

    /// Calls that failed so far.
    pub(crate) fn failed(&self) -> usize {
        self.plan.state.lock().unwrap().failed
    }

    /// Whether calls are stuck from now on.
    pub(crate) fn block(&self, blocked: bool) {
        self.plan.state.lock().unwrap().blocked = blocked;
        self.plan.changed.notify_all();
    }

    /// Calls that are stuck at this moment.
    pub(crate) fn stuck(&self) -> usize {
        self.plan.state.lock().unwrap().waiting
    }

    /// The appends that succeeded, in order.
    pub(crate) fn appends(&self) -> Vec<(Stream, Vec<u8>)> {
        self.plan.state.lock().unwrap().appends.clone()
    }

    /// How often it was closed.
    pub(crate) fn closed(&self) -> usize {
        self.plan.state.lock().unwrap().closed
    }

    /// All bytes of a log, by the store behind.
    pub(crate) fn bytes(&self, id: &JobRunId, stream: Stream) -> Bytes {
        self.inner.0.read_bytes(id, stream, ByteOffset(0), usize::MAX >> 1).unwrap()
    }

    fn enter(&self, call: &'static str) -> Result<(), LogError> {
        let mut state = self.plan.state.lock().unwrap();
        state.waiting += 1;
        while state.blocked {
            state = self.plan.changed.wait(state).unwrap();
        }
        state.waiting -= 1;
        match state.failing.get_mut(call) {
            Some(left) if *left > 0 => {
                *left -= 1;
                state.failed += 1;
                let source = io::Error::from(io::ErrorKind::StorageFull);
                Err(LogError::Io { doing: call, path: "faulty".into(), source })
            }
            _ => Ok(()),
        }
    }

    fn appended(&self, stream: Stream, bytes: &[u8]) {
        self.plan.state.lock().unwrap().appends.push((stream, bytes.to_vec()));
    }
}

impl LogStore for FaultyStore {
    fn start(&self, spec: RunSpec) -> Result<Box<dyn RunWriter>, LogError> {
        self.enter("start")?;
        Ok(Box::new(FaultyWriter { writer: self.inner.0.start(spec)?, store: self.clone() }))
    }

    fn append(&self, id: &JobRunId, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.enter("append")?;
        self.inner.0.append(id, stream, bytes)?;
        self.appended(stream, bytes);
        Ok(())
    }

    fn finish(&self, id: &JobRunId, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.enter("finish")?;
        self.inner.0.finish(id, end)
    }

    fn read(&self, id: &JobRunId, options: ReadOptions) -> Result<ReadStream, LogError> {
        self.enter("read")?;
        self.inner.0.read(id, options)
    }

    fn position(&self, id: &JobRunId, view: View, start: Start) -> Result<LineNumber, LogError> {
        self.enter("read")?;
        self.inner.0.position(id, view, start)
    }

    fn byte_offset(&self, id: &JobRunId, stream: Stream, start: Start) -> Result<ByteOffset, LogError> {
        self.enter("read")?;
        self.inner.0.byte_offset(id, stream, start)
    }

    fn read_bytes(
        &self,
        id: &JobRunId,
        stream: Stream,
        offset: ByteOffset,
        length: usize,
    ) -> Result<Bytes, LogError> {
        self.enter("read")?;
        self.inner.0.read_bytes(id, stream, offset, length)
    }

    fn run(&self, id: &JobRunId) -> Result<JobMetadata, LogError> {
        self.enter("read")?;
        self.inner.0.run(id)
    }

    fn runs(&self, query: &RunQuery) -> Result<RunPage, LogError> {
        self.enter("runs")?;
        self.inner.0.runs(query)
    }

    fn close(&self) -> Result<(), LogError> {
        self.enter("close")?;
        self.plan.state.lock().unwrap().closed += 1;
        self.inner.0.close()
    }
}

struct FaultyWriter {
    writer: Box<dyn RunWriter>,
    store: FaultyStore,
}

impl RunWriter for FaultyWriter {
    fn id(&self) -> &JobRunId {
        self.writer.id()
    }

    fn append(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), LogError> {
        self.store.enter("append")?;
        self.writer.append(stream, bytes)?;
        self.store.appended(stream, bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.store.enter("flush")?;
        self.writer.flush()
    }

    fn finish(self: Box<Self>, end: RunEnd) -> Result<JobMetadata, LogError> {
        self.store.enter("finish")?;
        self.writer.finish(end)
    }
}
