//! The file store against a plain model, whatever happens to the processes and the index in between.

use std::fs;
use std::path::Path;
use std::time::Duration;

use databuild_logs::{
    Exit, FileLogStore, FileStoreOptions, JobRunId, LineNumber, LogStore, Outcome, ReadEnd, ReadEvent,
    ReadOptions, RunEnd, RunQuery, RunSpec, RunWriter, Start, StateKind, Stream, View,
};
use futures_util::StreamExt;
use proptest::prelude::*;

use crate::conformance::{Model, some_bytes};
use crate::support::copy_folder;

const VIEWS: [View; 3] = [View::STDOUT, View::STDERR, View::All];

#[derive(Clone, Debug)]
enum Step {
    Append {
        stderr: bool,
        bytes: Vec<u8>,
    },
    /// Enough for a few checkpoints.
    AppendMuch {
        stderr: bool,
        lines: usize,
    },
    Flush,
    /// Ends the run; the next one is written by this process or by another.
    Finish {
        next_by_other: bool,
    },
    /// Closes the store and opens it again; the writer goes on, as one of another process now.
    Reopen {
        delete_index: bool,
    },
    /// Looks at the folder as a crash of everything would leave it.
    Crash {
        with_index: bool,
    },
    Read(Read),
}

#[derive(Clone, Copy, Debug)]
struct Read {
    view: View,
    /// Where in the view to begin, in thousandths of it.
    from: usize,
    batch_bytes: usize,
    times: bool,
}

fn read() -> impl Strategy<Value = Read> {
    let view = prop::sample::select(VIEWS.to_vec());
    (view, 0..=1_000_usize, 1..100_000_usize, any::<bool>())
        .prop_map(|(view, from, batch_bytes, times)| Read { view, from, batch_bytes, times })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any::<bool>(), some_bytes()).prop_map(|(stderr, bytes)| Step::Append { stderr, bytes }),
        3 => (any::<bool>(), 1..5_000_usize).prop_map(|(stderr, lines)| Step::AppendMuch { stderr, lines }),
        3 => Just(Step::Flush),
        1 => any::<bool>().prop_map(|next_by_other| Step::Finish { next_by_other }),
        2 => any::<bool>().prop_map(|delete_index| Step::Reopen { delete_index }),
        1 => any::<bool>().prop_map(|with_index| Step::Crash { with_index }),
        6 => read().prop_map(Step::Read),
    ]
}

fn service(folder: &Path) -> FileLogStore {
    let liveness_interval = Duration::from_millis(5);
    FileLogStore::open(folder, FileStoreOptions { liveness_interval, ..FileStoreOptions::default() }).unwrap()
}

/// A run, and what it should hold.
struct Run {
    id: JobRunId,
    writer: Option<Box<dyn RunWriter>>,
    model: Model,
    /// Whether the journal has all of it.
    flushed: bool,
}

impl Run {
    fn start(store: &dyn LogStore) -> Self {
        let id = JobRunId::generate();
        let writer = Some(store.start(RunSpec::new(id.clone())).unwrap());
        Self { id, writer, model: Model::default(), flushed: true }
    }

    fn append(&mut self, stderr: bool, bytes: &[u8]) {
        let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
        self.writer.as_mut().unwrap().append(stream, bytes).unwrap();
        self.model.append(stream, bytes);
        self.flushed = false;
    }

    fn flush(&mut self) {
        self.writer.as_mut().unwrap().flush().unwrap();
        self.flushed = true;
    }

    fn finish(&mut self) {
        self.writer.take().unwrap().finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
        self.flushed = true;
    }

    fn is_over(&self) -> bool {
        self.writer.is_none()
    }
}

/// What is read from somewhere in a run: the lines, with their numbers checked, and the end.
async fn lines(
    store: &dyn LogStore,
    id: &JobRunId,
    options: ReadOptions,
) -> (Vec<(Stream, Vec<u8>)>, ReadEnd) {
    let Start::After(LineNumber(mut position)) = options.start else { unreachable!() };
    let mut numbers: [Option<u64>; 2] = [None; 2];
    let mut lines = Vec::new();
    let mut events = store.read(id, options).unwrap();
    loop {
        let event = tokio::time::timeout(Duration::from_secs(60), events.next());
        match event.await.expect("a stream that never ends").unwrap().unwrap() {
            ReadEvent::Lines(batch) => {
                for line in batch.lines() {
                    position += 1;
                    assert_eq!(line.position.0, position);
                    let number = &mut numbers[batch.stream.index()];
                    assert!(number.is_none_or(|before| line.number.0 == before + 1), "{number:?} {line:?}");
                    *number = Some(line.number.0);
                    lines.push((batch.stream, line.text.to_vec()));
                }
            }
            ReadEvent::Gap { gap, .. } => panic!("nothing was dropped: {gap:?}"),
            ReadEvent::End(end) => return (lines, end),
        }
    }
}

/// Reads as a follower that stops behind what has to be there.
async fn check(store: &dyn LogStore, run: &Run, read: Read, over: bool, what: &str) {
    let all = run.model.lines(read.view, over);
    let from = all.len() * read.from / 1_000;
    let options = ReadOptions {
        start: Start::After(LineNumber(from as u64)),
        follow: true,
        limit: (!over).then_some((all.len() - from) as u64),
        times: read.times,
        batch_bytes: read.batch_bytes,
        ..ReadOptions::new(read.view)
    };
    let (got, end) = lines(store, &run.id, options).await;
    assert!(got == all[from..], "{what}: {read:?} of {} lines gave {} wrong ones", all.len(), got.len());
    match end {
        ReadEnd::Complete(metadata) if over => {
            for stream in Stream::BOTH {
                let expected = run.model.lines(View::One(stream), true).len() as u64;
                assert_eq!(metadata.totals(stream).lines, expected, "{what}");
            }
        }
        ReadEnd::Running { next } if !over => assert_eq!(next.0, all.len() as u64, "{what}"),
        end => panic!("{what}: {end:?}"),
    }
}

/// A crash leaves every byte; the order of both streams is known as far as the journal had come.
async fn check_crashed(folder: &Path, runs: &[Run], with_index: bool) {
    let crashed = tempfile::tempdir().unwrap();
    copy_folder(&folder.join("job_runs"), &crashed.path().join("job_runs"));
    if with_index {
        fs::copy(folder.join("index.redb"), crashed.path().join("index.redb")).unwrap();
    }
    let store = service(crashed.path());
    for run in runs {
        for view in VIEWS {
            if view == View::All && !run.flushed {
                continue;
            }
            for times in [false, true] {
                let read = Read { view, from: 0, batch_bytes: 4096, times };
                check(&store, run, read, true, "after a crash").await;
            }
        }
        let kind = store.run(&run.id).unwrap().state.kind();
        assert_eq!(kind, if run.is_over() { StateKind::Succeeded } else { StateKind::Lost });
    }
    let listed = store.runs(&RunQuery::default()).unwrap().runs;
    assert_eq!(listed.len(), runs.len());
    store.close().unwrap();
}

async fn agrees(steps: Vec<Step>) {
    let folder = tempfile::tempdir().unwrap();
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    let mut store = service(folder.path());
    let mut runs = vec![Run::start(&store)];
    for step in steps {
        let current = runs.last_mut().unwrap();
        match step {
            Step::Append { stderr, bytes } => current.append(stderr, &bytes),
            Step::AppendMuch { stderr, lines } => {
                let text: String = (0..lines).map(|n| format!("line {n} {}\n", "x".repeat(n % 90))).collect();
                current.append(stderr, text.as_bytes());
            }
            Step::Flush => current.flush(),
            Step::Finish { next_by_other } => {
                current.finish();
                runs.push(if next_by_other { Run::start(&other) } else { Run::start(&store) });
            }
            Step::Reopen { delete_index } => {
                store.close().unwrap();
                drop(store);
                if delete_index {
                    fs::remove_file(folder.path().join("index.redb")).unwrap();
                }
                store = service(folder.path());
            }
            Step::Crash { with_index } => check_crashed(folder.path(), &runs, with_index).await,
            Step::Read(read) => {
                // What another process wrote has to be handed over before it can be waited for.
                current.flush();
                for run in &runs {
                    check(&store, run, read, run.is_over(), "by the service").await;
                    check(&other, run, read, run.is_over(), "by another process").await;
                }
            }
        }
    }
    runs.last_mut().unwrap().finish();
    for run in &runs {
        for view in VIEWS {
            for times in [false, true] {
                let read = Read { view, from: 0, batch_bytes: 4096, times };
                check(&store, run, read, true, "at the end").await;
            }
        }
    }
    store.close().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_file_store_agrees_with_a_model(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(agrees(steps));
    }
}
