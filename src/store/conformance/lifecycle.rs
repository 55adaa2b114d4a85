//! How runs begin and end, and what is known of them.

use std::sync::Arc;

use futures_util::StreamExt;

use super::{
    after, append, assert_finished, assert_not_found, finish, finished, read_from, show, start, success,
};
use crate::error::LogError;
use crate::line::{ByteOffset, Stream, UnixMicros, View};
use crate::run::{
    Exit, JobMetadata, JobRunId, MissingDeps, PartitionRef, RunSpec, RunState, StateKind, StreamTotals,
};
use crate::store::{LogStore, Outcome, ReadOptions, RunEnd, StreamOptions};

/// An id is taken for good, while the run goes on and after it.
pub async fn a_run_is_started_once(store: Arc<dyn LogStore>) {
    let (id, writer) = start(&*store);
    let refused = |when| match store.start(RunSpec::new(id.clone())) {
        Err(LogError::AlreadyExists { id: taken }) => assert_eq!(taken, id),
        Err(error) => panic!("a second start {when} gave {error:?}"),
        Ok(_) => panic!("a run was started twice {when}"),
    };
    refused("while it goes on");
    finish(writer);
    refused("after its end");
    let appended = JobRunId::generate();
    store.append(&appended, Stream::Stdout, b"x\n").expect("an append starts a run");
    let again = store.start(RunSpec::new(appended)).map(|writer| writer.id().clone());
    assert!(
        matches!(again, Err(LogError::AlreadyExists { .. })),
        "start of a run begun by append: {again:?}"
    );
}

/// An append to a run that was never started starts it.
pub async fn an_append_starts_a_run(store: Arc<dyn LogStore>) {
    let id = JobRunId::generate();
    let before = UnixMicros::now();
    store.append(&id, Stream::Stderr, b"first\n").expect("an append starts a run");
    let run = store.run(&id).expect("the run is known");
    assert_eq!((run.id(), run.state), (&id, RunState::Running));
    assert!(run.started_at.0 + 1_000 >= before.0, "started at {}, before {before}", run.started_at);
    assert_eq!(run.stderr, StreamTotals { bytes: 6, lines: 1, ..StreamTotals::default() });
    store.append_stderr(id.as_str(), "second").expect("a line can be appended");
    store.append_stdout(id.as_str(), "").expect("an empty line can be appended");
    let run = store.finish(&id, success()).expect("a live run can be finished");
    assert_eq!((run.stdout.lines, run.stderr.lines), (1, 2));
    let got = read_from(&*store, &id, View::All, after(0)).await;
    assert_eq!(show(&got.texts()), ["first", "second", ""]);
}

/// After the end a run takes neither bytes nor another end, and is as it was.
pub async fn nothing_is_added_after_the_end(store: Arc<dyn LogStore>) {
    let id = finished(&*store, b"all\n");
    let run = store.run(&id).expect("the run is known");
    assert_finished(store.append(&id, Stream::Stdout, b"more\n"), "an append");
    assert_finished(store.append_stderr(id.as_str(), "more"), "append_stderr");
    assert_finished(store.finish(&id, RunEnd::now(Outcome::Lost)), "a second end");
    assert_finished(store.write_metadata(id.as_str(), run.clone()), "write_metadata");
    assert_eq!(store.run(&id).expect("the run is known"), run);
    let got = read_from(&*store, &id, View::All, after(0)).await;
    assert_eq!(show(&got.texts()), ["all"]);
}

/// What is not known is not found, and asking does not make it known.
pub async fn unknown_runs_are_not_found(store: Arc<dyn LogStore>) {
    let id = JobRunId::generate();
    for _ in 0..2 {
        assert_not_found(store.finish(&id, success()), "finish");
        assert_not_found(store.run(&id), "run");
        assert_not_found(store.read(&id, ReadOptions::new(View::All)).map(|_| ()), "read");
        assert_not_found(store.byte_offset(&id, Stream::Stdout, after(0)), "byte_offset");
        assert_not_found(store.read_bytes(&id, Stream::Stdout, ByteOffset(0), 1), "read_bytes");
        let mut lines = store.stream_stderr(id.as_str(), StreamOptions::default());
        let first = lines.next().await.expect("a stream of an unknown run says so");
        assert_not_found(first, "stream_stderr");
        assert!(lines.next().await.is_none(), "an item came after the error");
    }
    start(&*store).1.finish(success()).expect("another run is not affected");
}

/// A text that is no run id is refused by every method that takes one.
pub async fn ids_that_are_none_are_refused(store: Arc<dyn LogStore>) {
    let id = finished(&*store, b"x\n");
    let document = store.run(&id).expect("the run is known");
    for bad in ["", "..", "../escape", "a/b", "-rf", ".hidden", "a b", "a\0", "é", &"x".repeat(129)] {
        let refused = |result: Result<(), LogError>, what: &str| {
            assert!(matches!(result, Err(LogError::InvalidId(_))), "{what} of {bad:?} gave {result:?}");
        };
        refused(store.append_stdout(bad, "x"), "append_stdout");
        refused(store.append_stderr(bad, "x"), "append_stderr");
        refused(store.write_metadata(bad, document.clone()), "write_metadata");
        for follow in [false, true] {
            let options = StreamOptions { follow, ..StreamOptions::default() };
            for mut lines in [store.stream_stdout(bad, options.clone()), store.stream_stderr(bad, options)] {
                let first = lines.next().await.expect("a stream of no run says so");
                refused(first.map(drop), "a stream");
                assert!(lines.next().await.is_none(), "an item came after the error");
            }
        }
    }
}

/// Totals count bytes and lines of each stream, an unterminated last line too once the run is over.
pub async fn totals_count_bytes_and_lines(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    let totals = |bytes, lines| StreamTotals { bytes, lines, ..StreamTotals::default() };
    let known = store.run(&id).expect("the run is known");
    assert_eq!((known.stdout, known.stderr, known.state), (totals(0, 0), totals(0, 0), RunState::Running));
    append(&mut *writer, Stream::Stdout, "one\ntwo\n");
    append(&mut *writer, Stream::Stderr, "\n");
    let known = store.run(&id).expect("the run is known");
    assert_eq!((known.stdout, known.stderr), (totals(8, 2), totals(1, 1)), "while the run goes on");
    append(&mut *writer, Stream::Stdout, "three");
    let end = finish(writer);
    assert_eq!((end.stdout, end.stderr), (totals(13, 3), totals(1, 1)), "as finish tells");
    assert_eq!(store.run(&id).expect("the run is known"), end, "as the store tells later");
    assert_eq!(end.completion().lines, 4);
}

fn spec_with_everything() -> RunSpec {
    let mut spec = RunSpec::new(JobRunId::generate()).command(["make", "-j", "all things"]);
    spec.building_partitions = vec!["data/alpha".into(), "data/beta=2".into()];
    spec.labels.insert("team".into(), "ümlaut \"quoted\"".into());
    spec.labels.insert("empty".into(), String::new());
    spec.host = "builder-7".into();
    spec.created_at = UnixMicros(1_700_000_000_123_456);
    spec
}

fn end_with_everything() -> RunEnd {
    let mut end = RunEnd::now(Outcome::Exited(Exit::Code(3)));
    end.note = Some("out of memory, perhaps".into());
    let partition = |name: &str| PartitionRef { name: name.into() };
    end.missing_deps =
        vec![MissingDeps { impacted: vec![partition("a")], missing: vec![partition("b"), partition("c")] }];
    end.other.insert("cost".into(), serde_json::json!({ "cpu_s": 1.5, "hosts": ["a", null] }));
    end
}

/// Every field given at the start and at the end is there afterwards.
pub async fn what_is_known_of_a_run_is_kept(store: Arc<dyn LogStore>) {
    let (spec, mut end) = (spec_with_everything(), end_with_everything());
    let id = spec.id.clone();
    let writer = store.start(spec.clone()).expect("a run with a new id can be started");
    let live = store.run(&id).expect("a live run is known");
    assert_eq!((&live.spec, live.state), (&spec, RunState::Running));
    let mut later = RunSpec::new(id.clone());
    later.labels.insert("attempt".into(), "2".into());
    end.spec = Some(later);
    let told = writer.finish(end.clone()).expect("a live run can be finished");
    let known = store.run(&id).expect("a finished run is known");
    assert_eq!(told, known, "finish tells what is known afterwards");
    let mut labels = spec.labels.clone();
    labels.insert("attempt".into(), "2".into());
    assert_eq!(known.spec, RunSpec { labels, ..spec }, "the end adds to what the run was started with");
    assert_eq!(known.started_at, live.started_at);
    assert_eq!(known.state, RunState::Failed { ended: end.ended_at, exit: Exit::Code(3) });
    assert_eq!((known.note, known.missing_deps, known.other), (end.note, end.missing_deps, end.other));
}

/// The state follows from the outcome.
pub async fn an_end_says_how_a_run_ended(store: Arc<dyn LogStore>) {
    for outcome in [
        Outcome::Exited(Exit::Code(0)),
        Outcome::Exited(Exit::Code(255)),
        Outcome::Exited(Exit::Signal(9)),
        Outcome::Cancelled(Exit::Signal(15)),
        Outcome::Cancelled(Exit::Code(0)),
        Outcome::Lost,
    ] {
        let (id, writer) = start(&*store);
        let end = RunEnd::now(outcome);
        let told = writer.finish(end.clone()).expect("a live run can be finished");
        assert_eq!(told.state, end.state());
        assert_eq!(store.run(&id).expect("the run is known").state, end.state());
    }
}

/// `write_metadata` ends a run with a document: it fills in what the run was not started with, starts a run that
/// never was, and refuses a document about another run or about one that goes on.
pub async fn write_metadata_ends_a_run(store: Arc<dyn LogStore>) {
    let document = |id: &JobRunId, state| {
        let spec = RunSpec { id: id.clone(), ..spec_with_everything() };
        let end = end_with_everything();
        JobMetadata {
            state,
            note: end.note,
            missing_deps: end.missing_deps,
            other: end.other,
            stdout: StreamTotals { bytes: 999, lines: 999, ..StreamTotals::default() },
            ..JobMetadata::started(spec, UnixMicros(1))
        }
    };
    let ended = RunState::Failed { ended: UnixMicros::now(), exit: Exit::Code(3) };
    let (appended, never) = (JobRunId::generate(), JobRunId::generate());
    store.append_stdout(appended.as_str(), "a line").expect("an append starts a run");
    let started_at = store.run(&appended).expect("the run is known").started_at;
    for id in [&appended, &never] {
        let running = store.write_metadata(id.as_str(), document(id, RunState::Running));
        let other = store.write_metadata(id.as_str(), document(&JobRunId::generate(), ended));
        for refused in [running, other] {
            assert!(matches!(refused, Err(LogError::InvalidParameter { .. })), "{refused:?}");
        }
        store.write_metadata(id.as_str(), document(id, ended)).expect("a document about how it ended");
        let known = store.run(id).expect("the run is known");
        let given = document(id, ended);
        assert_eq!(known.state, ended);
        assert_eq!(known.spec.command, given.spec.command);
        assert_eq!(known.spec.building_partitions, given.spec.building_partitions);
        assert_eq!(known.spec.labels, given.spec.labels);
        assert_eq!(
            (known.note, known.missing_deps, known.other),
            (given.note, given.missing_deps, given.other)
        );
    }
    let known = store.run(&appended).expect("the run is known");
    assert_eq!((known.stdout.lines, known.stdout.bytes), (1, 7), "the store counts for itself");
    assert_eq!(known.started_at, started_at, "the store knows when the run started");
    assert_eq!(store.run(&never).expect("the run is known").stdout, StreamTotals::default());
}

/// The writer of a run and the store's own `append` and `finish` write the same run, in the order of the calls.
pub async fn a_run_may_be_written_through_the_store_and_its_writer(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    for n in 0..10 {
        append(&mut *writer, Stream::Stdout, format!("writer {n}, "));
        store.append(&id, Stream::Stdout, format!("store {n}\n").as_bytes()).expect("the run goes on");
    }
    store.finish(&id, success()).expect("a live run can be finished");
    let got = read_from(&*store, &id, View::STDOUT, after(0)).await;
    let expected: Vec<String> = (0..10).map(|n| format!("writer {n}, store {n}")).collect();
    assert_eq!(show(&got.texts()), expected);
    let late = writer.append(Stream::Stdout, b"late\n").and_then(|()| writer.flush());
    assert_finished(late, "an append through the writer");
    drop(writer);
    let known = store.run(&id).expect("the run is known");
    assert_eq!(known.state.kind(), StateKind::Succeeded, "dropping a writer does not undo the end");
}
