//! Several stores behind one: who gets what, who answers, and who is in nobody's way.

use std::time::Duration;

use databuild_logs::{
    CompositeLogStore, CompositeOptions, Exit, JobRunId, LogError, LogStore, Member, MemberHealth, Outcome,
    ReadEnd, ReadEvent, ReadOptions, RunEnd, RunQuery, RunSpec, RunWriter, StateKind, Stream, View,
};
use futures_util::StreamExt;

use crate::support::faulty::FaultyStore;
use crate::support::wait_until;

/// Waits as long as it takes, so that what arrives does not depend on the machine.
const OPTIONS: CompositeOptions =
    CompositeOptions { queue_bytes: 1 << 20, drain_wait: Duration::from_secs(60) };

/// Waits for nobody.
const IMPATIENT: CompositeOptions =
    CompositeOptions { queue_bytes: 32 * 1024, drain_wait: Duration::from_millis(1) };

fn two_required() -> (FaultyStore, FaultyStore, CompositeLogStore) {
    let (one, two) = (FaultyStore::default(), FaultyStore::default());
    let members = [Member::required("one", one.arc()), Member::required("two", two.arc())];
    let store = CompositeLogStore::new(members, OPTIONS).unwrap();
    (one, two, store)
}

fn with_copy(options: CompositeOptions) -> (FaultyStore, FaultyStore, CompositeLogStore) {
    let (main, copy) = (FaultyStore::default(), FaultyStore::default());
    let members = [Member::required("main", main.arc()), Member::best_effort("copy", copy.arc())];
    let store = CompositeLogStore::new(members, options).unwrap();
    (main, copy, store)
}

fn start(store: &dyn LogStore) -> (JobRunId, Box<dyn RunWriter>) {
    let id = JobRunId::generate();
    let writer = store.start(RunSpec::new(id.clone())).unwrap();
    (id, writer)
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

fn health(store: &CompositeLogStore, name: &str) -> MemberHealth {
    store.members().into_iter().find(|member| member.name == name).unwrap()
}

async fn lines(store: &dyn LogStore, id: &JobRunId, view: View) -> Vec<(Stream, Vec<u8>)> {
    let mut events = store.read(id, ReadOptions { follow: true, ..ReadOptions::new(view) }).unwrap();
    let mut lines = Vec::new();
    loop {
        match events.next().await.unwrap().unwrap() {
            ReadEvent::Lines(batch) => {
                lines.extend(batch.lines().map(|line| (batch.stream, line.text.to_vec())));
            }
            ReadEvent::End(ReadEnd::Complete(_)) => return lines,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn every_member_has_the_same_lines_in_the_same_order() {
    let (one, two, copy) = (FaultyStore::default(), FaultyStore::default(), FaultyStore::default());
    let members = [
        Member::required("one", one.arc()),
        Member::best_effort("copy", copy.arc()),
        Member::required("two", two.arc()),
    ];
    let store = CompositeLogStore::new(members, OPTIONS).unwrap();
    let (id, writer) = start(&store);
    // Several at once, through the store: no order is given, but it must be the same for all.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, id) = (&store, &id);
            scope.spawn(move || {
                for n in 0..200 {
                    let stream = if n % 3 == 0 { Stream::Stderr } else { Stream::Stdout };
                    store.append(id, stream, format!("{thread} {n}\n").as_bytes()).unwrap();
                }
            });
        }
    });
    let end = writer.finish(success()).unwrap();
    assert_eq!(end.stdout.lines + end.stderr.lines, 800);
    store.close().unwrap();
    let expected = lines(&*one.inner.0, &id, View::All).await;
    assert_eq!(expected.len(), 800);
    assert!(lines(&*two.inner.0, &id, View::All).await == expected, "another order in a required member");
    assert!(lines(&*copy.inner.0, &id, View::All).await == expected, "another order in the copy");
    assert!(copy.appends().len() < 800, "small appends to a copy are gathered");
    assert_eq!([one.closed(), two.closed(), copy.closed()], [1, 1, 1]);
    let names: Vec<String> = store.members().into_iter().map(|member| member.name).collect();
    assert_eq!(names, ["one", "copy", "two"]);
    assert!(store.members().iter().all(|member| (member.failures, member.dropped_bytes) == (0, 0)));
}

#[test]
fn at_least_one_member_is_required() {
    for members in [vec![], vec![Member::best_effort("copy", FaultyStore::default().arc())]] {
        let refused = CompositeLogStore::new(members, OPTIONS);
        assert!(matches!(refused, Err(LogError::InvalidParameter { name: "members", .. })), "{refused:?}");
    }
}

#[test]
fn a_required_member_that_fails_is_named_and_the_others_get_the_bytes() {
    let (one, two, store) = two_required();
    let (id, mut writer) = start(&store);
    one.fail("append", 1);
    let error = writer.append(Stream::Stdout, b"lost in one\n").unwrap_err();
    assert!(error.is_disk_full() && error.to_string().contains("\"one\""), "{error}");
    assert_eq!(two.bytes(&id, Stream::Stdout), "lost in one\n");
    two.fail("append", 1);
    let error = store.append(&id, Stream::Stdout, b"lost in two\n").unwrap_err();
    assert!(error.to_string().contains("\"two\""), "{error}");
    assert_eq!(one.bytes(&id, Stream::Stdout), "lost in two\n");
    one.fail("append", 1);
    two.fail("append", 1);
    let text = writer.append(Stream::Stdout, b"lost\n").unwrap_err().to_string();
    assert!(text.contains("\"one\"") && text.contains("\"two\""), "{text}");
    two.fail("flush", 1);
    assert!(writer.flush().unwrap_err().to_string().contains("\"two\""));
    writer.append(Stream::Stdout, b"kept\n").unwrap();
    writer.finish(success()).unwrap();
    assert_eq!(two.bytes(&id, Stream::Stdout), "lost in one\nkept\n");
    assert_eq!((health(&store, "one").failures, health(&store, "two").failures), (2, 3));
    assert!(health(&store, "two").last_error.unwrap().contains("flush"));
}

#[test]
fn a_start_that_one_member_refuses_is_undone_in_the_others() {
    let (one, two, store) = two_required();
    two.fail("start", 1);
    let spec = RunSpec::new(JobRunId::generate());
    let error = store.start(spec.clone()).map(|writer| writer.id().clone()).unwrap_err();
    assert!(error.is_disk_full() && error.to_string().contains("\"two\""), "{error}");
    let left = one.inner.0.run(&spec.id).unwrap();
    assert_eq!(left.state.kind(), StateKind::Lost);
    assert!(left.note.unwrap().contains("was not started"));
}

#[test]
fn an_end_that_reached_only_some_members_may_be_given_again() {
    let (one, two, store) = two_required();
    let id = JobRunId::generate();
    store.append(&id, Stream::Stdout, b"one\n").unwrap();
    two.fail("finish", 1);
    let error = store.finish(&id, success()).unwrap_err();
    assert!(error.to_string().contains("\"two\""), "{error}");
    assert!(matches!(store.append(&id, Stream::Stdout, b"late\n"), Err(LogError::Finished { .. })));
    assert!(matches!(store.finish(&id, success()), Err(LogError::Finished { .. })));
    for member in [one, two] {
        assert_eq!(member.inner.0.run(&id).unwrap().state.kind(), StateKind::Succeeded);
    }
}

#[test]
fn a_stuck_copy_slows_nobody_and_does_not_pretend_to_be_whole() {
    let (main, copy, store) = with_copy(CompositeOptions { drain_wait: OPTIONS.drain_wait, ..IMPATIENT });
    copy.block(true);
    let (id, mut writer) = start(&store);
    let all: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
    for line in all.split_inclusive('\n') {
        writer.append(Stream::Stdout, line.as_bytes()).unwrap();
    }
    let stuck = health(&store, "copy");
    assert!(stuck.dropped_bytes > 0 && stuck.dropped_appends > 0, "{stuck:?}");
    assert!(stuck.queued_bytes <= IMPATIENT.queue_bytes + 1024, "{stuck:?}");
    assert_eq!(main.bytes(&id, Stream::Stdout), all);
    // There is room again, but what comes now would have the wrong numbers.
    copy.block(false);
    wait_until("the copy caught up", || health(&store, "copy").queued_bytes == 0);
    writer.append(Stream::Stdout, b"one more\n").unwrap();
    let end = writer.finish(RunEnd { note: Some("a note".into()), ..success() }).unwrap();
    assert_eq!(end.note.as_deref(), Some("a note"), "the whole log is whole");
    store.close().unwrap();
    let kept = copy.bytes(&id, Stream::Stdout);
    assert!(!kept.is_empty() && all.as_bytes().starts_with(&kept), "a copy must be the beginning of the log");
    let dropped = health(&store, "copy").dropped_bytes;
    assert_eq!(kept.len() as u64 + dropped, end.stdout.bytes, "what is not there was counted");
    let told = copy.inner.0.run(&id).unwrap();
    let note = format!("a note; incomplete copy: {dropped} bytes were dropped");
    assert_eq!((told.note, told.state.kind()), (Some(note), StateKind::Succeeded));
    // The next run has a whole copy again.
    let (next, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"whole\n").unwrap();
    writer.finish(success()).unwrap();
    store.close().unwrap();
    assert_eq!(copy.bytes(&next, Stream::Stdout), "whole\n");
    assert_eq!(copy.inner.0.run(&next).unwrap().note, None);
}

#[test]
fn a_broken_copy_of_a_lost_run_says_both() {
    let (_, copy, store) = with_copy(CompositeOptions { drain_wait: OPTIONS.drain_wait, ..IMPATIENT });
    copy.block(true);
    let (id, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"kept\n").unwrap();
    writer.append(Stream::Stdout, &vec![b'x'; IMPATIENT.queue_bytes]).unwrap();
    drop(writer);
    copy.block(false);
    store.close().unwrap();
    let told = copy.inner.0.run(&id).unwrap();
    let note = format!("incomplete copy: {} bytes were dropped", IMPATIENT.queue_bytes);
    assert_eq!((told.note, told.state.kind()), (Some(note), StateKind::Lost));
    assert_eq!(copy.bytes(&id, Stream::Stdout), "kept\n");
}

#[test]
fn closing_and_dropping_wait_for_a_stuck_copy_only_so_long() {
    let (main, copy, store) = with_copy(IMPATIENT);
    let (id, mut writer) = start(&store);
    copy.block(true);
    writer.append(Stream::Stdout, b"a line\n").unwrap();
    writer.finish(success()).unwrap();
    store.close().unwrap();
    assert_eq!(main.closed(), 1, "the required members are closed");
    drop(store);
    assert_eq!(main.bytes(&id, Stream::Stdout), "a line\n");
    assert!(copy.stuck() <= 1);
    copy.block(false);
}

#[test]
fn dropping_gives_the_copies_what_is_waiting() {
    let (_, copy, store) = with_copy(OPTIONS);
    copy.block(true);
    let (id, mut writer) = start(&store);
    let by_id = JobRunId::generate();
    for n in 0..100 {
        writer.append(Stream::Stdout, format!("{n}\n").as_bytes()).unwrap();
        store.append(&by_id, Stream::Stderr, b"by id\n").unwrap();
    }
    writer.finish(success()).unwrap();
    store.finish(&by_id, success()).unwrap();
    copy.block(false);
    drop(store);
    assert_eq!(copy.inner.0.run(&id).unwrap().stdout.lines, 100);
    let told = copy.inner.0.run(&by_id).unwrap();
    assert_eq!((told.stderr.lines, told.state.kind()), (100, StateKind::Succeeded));
}

#[test]
fn a_failing_copy_is_counted_and_nobody_hears_of_it() {
    let (main, copy, store) = with_copy(OPTIONS);
    // A start that failed: what came later must not look like the whole run.
    copy.fail("start", 1);
    let (refused, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"12345\n").unwrap();
    writer.finish(success()).unwrap();
    // The first append of a run by its id failed: likewise.
    let by_id = JobRunId::generate();
    wait_until("the copy was tried", || copy.failed() == 1 && health(&store, "copy").queued_bytes == 0);
    copy.fail("append", 1);
    store.append(&by_id, Stream::Stdout, b"first\n").unwrap();
    wait_until("the copy was tried", || copy.failed() == 2);
    store.append(&by_id, Stream::Stdout, b"second\n").unwrap();
    store.finish(&by_id, success()).unwrap();
    // A run that the member has: it counts its holes itself, and goes on.
    let (known, mut writer) = start(&store);
    copy.fail("append", 1);
    writer.append(Stream::Stdout, b"lost\n").unwrap();
    wait_until("the copy was tried", || copy.failed() == 3);
    writer.append(Stream::Stdout, b"kept\n").unwrap();
    writer.finish(success()).unwrap();
    store.close().unwrap();
    for absent in [&refused, &by_id] {
        assert!(matches!(copy.inner.0.run(absent), Err(LogError::NotFound { .. })), "half a copy was begun");
    }
    assert_eq!(copy.bytes(&known, Stream::Stdout), "kept\n");
    let told = health(&store, "copy");
    assert_eq!((told.failures, told.dropped_bytes), (3, 6 + 6 + 7), "{told:?}");
    assert!(told.last_error.unwrap().contains("append"));
    assert_eq!(health(&store, "main").failures, 0);
    assert_eq!(main.bytes(&by_id, Stream::Stdout), "first\nsecond\n");
}

#[test]
fn another_run_with_the_same_id_in_a_copy_is_left_alone() {
    let (_, copy, store) = with_copy(OPTIONS);
    let id = JobRunId::generate();
    copy.inner.0.append(&id, Stream::Stdout, b"of another\n").unwrap();
    let mut writer = store.start(RunSpec::new(id.clone())).unwrap();
    writer.append(Stream::Stdout, b"of this\n").unwrap();
    writer.finish(success()).unwrap();
    store.close().unwrap();
    let other = copy.inner.0.run(&id).unwrap();
    assert_eq!((other.state.kind(), other.stdout.bytes), (StateKind::Running, 11));
    assert_eq!((health(&store, "copy").failures, health(&store, "copy").dropped_bytes), (1, 8));
}

#[tokio::test]
async fn reads_go_to_the_first_member_that_has_the_run_and_works() {
    let (one, two, store) = two_required();
    let only_two = JobRunId::generate();
    two.inner.0.append(&only_two, Stream::Stdout, b"in two\n").unwrap();
    two.inner.0.finish(&only_two, success()).unwrap();
    assert_eq!(store.run(&only_two).unwrap().stdout.lines, 1);
    assert_eq!(lines(&store, &only_two, View::STDOUT).await, [(Stream::Stdout, b"in two".to_vec())]);
    assert_eq!(health(&store, "one").failures, 0, "not to have a run is no failure");
    let (both, mut writer) = start(&store);
    writer.append(Stream::Stdout, b"in both\n").unwrap();
    one.fail("read", 1);
    assert_eq!(store.run(&both).unwrap().stdout.lines, 1);
    one.fail("read", 1);
    drop(store.read(&both, ReadOptions::new(View::All)).unwrap());
    assert_eq!(health(&store, "one").failures, 2);
    one.fail("read", 1);
    two.fail("read", 1);
    let error = store.run(&both).unwrap_err();
    assert!(error.is_disk_full() && error.to_string().contains("\"one\""), "{error}");
    one.fail("read", 1);
    let unknown = store.run(&JobRunId::generate()).unwrap_err();
    assert!(
        unknown.is_disk_full(),
        "that no working member has it does not prove that nobody has it: {unknown}"
    );
}

#[tokio::test]
async fn a_copy_answers_for_what_the_required_stores_do_not_have_unless_it_is_stuck() {
    let (main, copy, store) = with_copy(IMPATIENT);
    let old = JobRunId::generate();
    copy.inner.0.append(&old, Stream::Stdout, b"kept elsewhere\n").unwrap();
    copy.inner.0.finish(&old, success()).unwrap();
    assert_eq!(lines(&store, &old, View::STDOUT).await.len(), 1);
    copy.block(true);
    let (live, mut writer) = start(&store);
    wait_until("the copy is stuck", || copy.stuck() == 1);
    store.close().unwrap();
    assert!(matches!(store.run(&old), Err(LogError::NotFound { .. })), "a stuck store was asked");
    writer.append(Stream::Stdout, b"live\n").unwrap();
    assert_eq!(store.run(&live).unwrap().stdout.lines, 1);
    copy.block(false);
    drop(main);
}

#[test]
fn pages_stay_with_the_member_that_gave_the_first() {
    let (one, two, store) = two_required();
    let mut expected = Vec::new();
    for n in 0..7 {
        let (id, writer) = start(&store);
        writer.finish(success()).unwrap();
        expected.insert(0, id);
        if n % 2 == 0 {
            // So that a cursor means something else in each.
            drop(start(&*one.inner.0).1);
        }
    }
    one.fail("runs", 1);
    let mut query = RunQuery { limit: Some(2), ..RunQuery::default() };
    let mut ids = Vec::new();
    loop {
        let page = store.runs(&query).unwrap();
        ids.extend(page.runs.iter().map(|run| run.id().clone()));
        query.cursor = page.next;
        if page.next.is_none() {
            break;
        }
    }
    assert_eq!(ids, expected);
    query.cursor = None;
    one.fail("runs", 1);
    two.fail("runs", 1);
    assert!(store.runs(&query).unwrap_err().is_disk_full());
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), 11, "the first answers when it can");
}
