//! The stores against the conformance suite, and against a naive model of what a run holds.

use std::sync::Arc;

use databuild_logs::{
    BufferOptions, BufferedLogStore, ByteOffset, CompositeLogStore, CompositeOptions, Exit, FileLogStore,
    FileStoreOptions, LineNumber, LogStore, Member, MemoryLogStore, Outcome, ReadEvent, ReadOptions, RunEnd,
    RunSpec, Start, Stream, View, conformance,
};
use futures_util::StreamExt;
use proptest::prelude::*;

#[tokio::test]
async fn memory() {
    conformance::run_all(|| Arc::new(MemoryLogStore::new())).await;
}

/// Gives a new store in a folder of its own at every call; the folders go with the guard.
fn file_stores(
    open: fn(&std::path::Path) -> FileLogStore,
) -> (tempfile::TempDir, impl Fn() -> Arc<dyn LogStore>) {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().to_owned();
    let count = std::sync::atomic::AtomicUsize::new(0);
    let next = move || -> Arc<dyn LogStore> {
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Arc::new(open(&root.join(number.to_string())))
    };
    (parent, next)
}

fn indexed(folder: &std::path::Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions::default()).unwrap()
}

fn unindexed(folder: &std::path::Path) -> FileLogStore {
    FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap()
}

#[tokio::test]
async fn files_with_an_index() {
    let (_guard, stores) = file_stores(indexed);
    conformance::run_all(stores).await;
}

#[tokio::test]
async fn files_without_an_index() {
    let (_guard, stores) = file_stores(unindexed);
    conformance::run_all(stores).await;
}

#[tokio::test]
async fn buffered_files() {
    let (_guard, stores) = file_stores(indexed);
    conformance::run_all(|| buffered(stores())).await;
}

#[tokio::test]
async fn a_composite_of_files_and_memory() {
    let (_guard, stores) = file_stores(indexed);
    conformance::run_all(|| {
        let copy = Member::best_effort("copy", Arc::new(MemoryLogStore::new()));
        let members = [Member::required("files", stores()), copy];
        Arc::new(CompositeLogStore::new(members, CompositeOptions::default()).unwrap())
    })
    .await;
}

fn buffered(inner: Arc<dyn LogStore>) -> Arc<dyn LogStore> {
    Arc::new(BufferedLogStore::new(inner, BufferOptions::default()))
}

#[tokio::test]
async fn buffered_memory() {
    conformance::run_all(|| buffered(Arc::new(MemoryLogStore::new()))).await;
}

#[tokio::test]
async fn buffers_so_small_that_nothing_fits() {
    for (max_bytes, max_total_bytes) in [(3, 1 << 20), (1 << 16, 0), (1 << 16, 1500)] {
        let options = BufferOptions { max_bytes, max_total_bytes, ..BufferOptions::default() };
        conformance::run_all(|| Arc::new(BufferedLogStore::new(Arc::new(MemoryLogStore::new()), options)))
            .await;
    }
}

fn composite(members: Vec<Member>) -> Arc<dyn LogStore> {
    Arc::new(CompositeLogStore::new(members, CompositeOptions::default()).unwrap())
}

fn memory_store() -> Arc<dyn LogStore> {
    Arc::new(MemoryLogStore::new())
}

#[tokio::test]
async fn composite_of_one() {
    conformance::run_all(|| composite(vec![Member::required("only", memory_store())])).await;
}

#[tokio::test]
async fn composite_of_required_and_best_effort() {
    conformance::run_all(|| {
        composite(vec![
            Member::best_effort("listed first", memory_store()),
            Member::required("one", memory_store()),
            Member::required("two", memory_store()),
            Member::best_effort("last", memory_store()),
        ])
    })
    .await;
}

#[tokio::test]
async fn buffered_composite_of_buffered() {
    conformance::run_all(|| {
        buffered(composite(vec![
            Member::required("buffered", buffered(memory_store())),
            Member::required("bare", memory_store()),
            Member::best_effort("copy", buffered(memory_store())),
        ]))
    })
    .await;
}

#[tokio::test]
async fn composite_of_composites() {
    conformance::run_all(|| {
        let inner = |name| {
            composite(vec![Member::required(name, memory_store()), Member::best_effort(name, memory_store())])
        };
        composite(vec![
            Member::required("a", inner("in a")),
            Member::required("b", buffered(inner("in b"))),
            Member::best_effort("c", inner("in c")),
        ])
    })
    .await;
}

/// What a run holds, kept in the plainest way.
#[derive(Debug, Default)]
pub(crate) struct Model {
    bytes: [Vec<u8>; 2],
    /// The lines in the order of their ends.
    lines: Vec<(Stream, Vec<u8>)>,
    open: [Option<Vec<u8>>; 2],
}

impl Model {
    pub(crate) fn append(&mut self, stream: Stream, bytes: &[u8]) {
        self.bytes[stream.index()].extend_from_slice(bytes);
        for &byte in bytes {
            let mut line = self.open[stream.index()].take().unwrap_or_default();
            if byte == b'\n' {
                self.lines.push((stream, line));
            } else {
                line.push(byte);
                self.open[stream.index()] = Some(line);
            }
        }
    }

    /// The lines of a view; those that only the end of the run ends come last and in no given order.
    pub(crate) fn lines(&self, view: View, over: bool) -> Vec<(Stream, Vec<u8>)> {
        let open = Stream::BOTH
            .into_iter()
            .filter(|_| over)
            .filter_map(|stream| self.open[stream.index()].clone().map(|line| (stream, line)));
        let shown = |(stream, _): &(Stream, Vec<u8>)| view == View::All || view == View::One(*stream);
        self.lines.iter().cloned().chain(open).filter(shown).collect()
    }
}

/// Bytes with many ends of lines among them.
pub(crate) fn some_bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => Just(b'\n'), 1 => Just(b'\r'), 6 => any::<u8>(), 6 => b'a'..=b'z'];
    proptest::collection::vec(byte, 0..40)
}

fn appends() -> impl Strategy<Value = Vec<(bool, Vec<u8>)>> {
    proptest::collection::vec((any::<bool>(), some_bytes()), 0..40)
}

async fn lines(
    store: &dyn LogStore,
    id: &databuild_logs::JobRunId,
    options: ReadOptions,
) -> Vec<(Stream, Vec<u8>)> {
    let mut events = store.read(id, options).unwrap();
    let mut lines = Vec::new();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => {
                lines.extend(batch.lines().map(|line| (batch.stream, line.text.to_vec())));
            }
            ReadEvent::Gap { gap, .. } => panic!("nothing was dropped, but there is a hole: {gap:?}"),
            ReadEvent::End(_) => {}
        }
    }
    lines
}

/// Both open lines end with the run; which of them comes first is nobody's promise.
fn with_last_two_sorted(mut lines: Vec<(Stream, Vec<u8>)>, open: usize) -> Vec<(Stream, Vec<u8>)> {
    let from = lines.len().saturating_sub(open);
    lines[from..].sort();
    lines
}

/// Writes the appends to a store and compares it with the model, in the middle of the run and at its end.
pub(crate) fn agrees_with_the_model(
    store: &dyn LogStore,
    appends: &[(bool, Vec<u8>)],
    start: u64,
    batch_bytes: usize,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut model = Model::default();
    let id = databuild_logs::JobRunId::generate();
    let mut writer = store.start(RunSpec::new(id.clone())).unwrap();
    let compare = |model: &Model, over: bool| {
        for view in [View::STDOUT, View::STDERR, View::All] {
            let options =
                ReadOptions { start: Start::After(LineNumber(start)), batch_bytes, ..ReadOptions::new(view) };
            let got = runtime.block_on(lines(store, &id, options));
            let open = model.open.iter().flatten().count();
            // A start between the two open lines would show one of them, and either would be right.
            let all = model.lines(view, over);
            if view == View::All && over && open == 2 && start as usize == all.len() - 1 {
                assert_eq!(got.len(), 1);
                continue;
            }
            let expected: Vec<_> = all.into_iter().skip(start as usize).collect();
            let open = if over { open } else { 0 };
            assert_eq!(with_last_two_sorted(got, open), with_last_two_sorted(expected, open), "{view}");
        }
        for stream in Stream::BOTH {
            let bytes = store.read_bytes(&id, stream, ByteOffset(0), usize::MAX >> 1).unwrap();
            assert_eq!(bytes, model.bytes[stream.index()], "bytes of {stream}");
        }
    };
    for (index, (err, bytes)) in appends.iter().enumerate() {
        let stream = if *err { Stream::Stderr } else { Stream::Stdout };
        writer.append(stream, bytes).unwrap();
        model.append(stream, bytes);
        if index == appends.len() / 2 {
            compare(&model, false);
        }
    }
    let end = writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    compare(&model, true);
    for stream in Stream::BOTH {
        let totals = end.totals(stream);
        assert_eq!(totals.bytes, model.bytes[stream.index()].len() as u64);
        assert_eq!(totals.lines, model.lines(View::One(stream), true).len() as u64);
    }
}

proptest! {
    #[test]
    fn memory_agrees_with_a_model(appends in appends(), start in 0..60_u64, batch_bytes in 1..400_usize) {
        agrees_with_the_model(&MemoryLogStore::new(), &appends, start, batch_bytes);
    }

    #[test]
    fn a_buffer_agrees_with_a_model(
        appends in appends(), start in 0..60_u64, batch_bytes in 1..400_usize, max_bytes in 1..200_usize,
    ) {
        let options = BufferOptions { max_bytes, ..BufferOptions::default() };
        let store = BufferedLogStore::new(Arc::new(MemoryLogStore::new()), options);
        agrees_with_the_model(&store, &appends, start, batch_bytes);
    }
}
