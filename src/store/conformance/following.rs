//! Followers: what comes later, exactly once, and always an end.

use std::sync::Arc;
use std::thread;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;

use super::{
    Seen, Transcript, after, append, drain, finish, following, lines_of, next_lines, open, read, read_from,
    show, start, success,
};
use crate::line::{LineNumber, Stream, View};
use crate::run::{JobRunId, RunSpec, StateKind};
use crate::store::{LogStore, ReadEnd, ReadEvent, ReadOptions, RunWriter, Start, StreamOptions};

/// A line reaches a follower without a flush, while the run goes on; the end of the run ends the stream.
pub async fn a_follower_gets_what_comes_later(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, "before\n");
    let mut follower = open(&*store, &id, following(View::STDOUT));
    assert_eq!(next_lines(&mut follower, 1).await[0].text, b"before");
    for n in 2..=5 {
        append(&mut *writer, Stream::Stderr, "not asked for\n");
        append(&mut *writer, Stream::Stdout, format!("line {n}\n"));
        let line = next_lines(&mut follower, 1).await.remove(0);
        assert_eq!((line.number, line.text), (n, format!("line {n}").into_bytes()));
    }
    let end = finish(writer);
    let rest = drain(follower).await;
    assert!(rest.lines.is_empty(), "lines came twice: {:?}", rest.lines);
    assert_eq!(*rest.completed(), end, "a follower is told how the run ended");
}

/// With `follow`, a run that does not exist yet is waited for, and all of it is given.
pub async fn a_follower_waits_for_a_run_that_is_not_there(store: Arc<dyn LogStore>) {
    for by_start in [true, false] {
        let id = JobRunId::generate();
        let mut follower = open(&*store, &id, following(View::All));
        let early = follower.next().now_or_never();
        assert!(early.is_none(), "nothing can be known of a run that is not there, but {early:?} was given");
        let strings =
            store.stream_stdout(id.as_str(), StreamOptions { follow: true, ..StreamOptions::default() });
        if by_start {
            let mut writer =
                store.start(RunSpec::new(id.clone())).expect("a run with a new id can be started");
            append(&mut *writer, Stream::Stdout, "one\ntwo");
            finish(writer);
        } else {
            store.append(&id, Stream::Stdout, b"one\ntwo").expect("an append starts a run");
            store.finish(&id, success()).expect("a live run can be finished");
        }
        let got = drain(follower).await;
        assert_eq!(show(&got.texts()), ["one", "two"]);
        got.completed();
        let strings: Vec<_> = strings.map(|line| line.expect("a line of a whole run")).collect().await;
        assert_eq!(strings, ["one", "two"]);
    }
}

/// A follower that opened in the middle of a line gets the line once, when it is whole.
pub async fn a_follower_of_an_unfinished_line_gets_it_whole(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, "half");
    let mut follower = open(&*store, &id, following(View::STDOUT));
    let early = follower.next().now_or_never();
    assert!(early.is_none(), "a line without its end was given: {early:?}");
    append(&mut *writer, Stream::Stdout, " and half\n");
    assert_eq!(next_lines(&mut follower, 1).await[0].text, b"half and half");
    append(&mut *writer, Stream::Stdout, "no end");
    finish(writer);
    assert_eq!(show(&drain(follower).await.texts()), ["no end"]);
}

/// A limit ends a follower in the middle of a run, at once and with the place where to go on.
pub async fn a_follower_stops_at_its_limit(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, "1\n2\n");
    let follower = open(&*store, &id, ReadOptions { limit: Some(3), ..following(View::STDOUT) });
    append(&mut *writer, Stream::Stdout, "3\n4\n");
    let got = drain(follower).await;
    assert_eq!(show(&got.texts()), ["1", "2", "3"]);
    assert_eq!(got.running(), 3);
    finish(writer);
}

/// Following with none of the last lines gives only what comes later; following from behind the last line waits
/// for the line with that number.
pub async fn only_new_lines_are_given_to_who_asks_for_none_of_the_old(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, "1\n2\n");
    let none = Start::LastLines { count: 0, after: LineNumber(0) };
    let mut new = open(&*store, &id, ReadOptions { start: none, ..following(View::STDOUT) });
    let early = new.next().now_or_never();
    assert!(early.is_none(), "an old line was given: {early:?}");
    let ahead = open(&*store, &id, ReadOptions { start: after(4), ..following(View::STDOUT) });
    append(&mut *writer, Stream::Stdout, "3\n4\n5\n");
    finish(writer);
    assert_eq!(show(&drain(new).await.texts()), ["3", "4", "5"]);
    assert_eq!(show(&drain(ahead).await.texts()), ["5"], "the lines up to the fourth were not asked for");
}

/// Writes both streams in odd pieces on a thread of its own, and reports now and then that it got further.
fn write_oddly(
    mut writer: Box<dyn RunWriter>,
    lines: usize,
) -> (thread::JoinHandle<()>, mpsc::UnboundedReceiver<()>) {
    let (progress, reports) = mpsc::unbounded_channel();
    let thread = thread::spawn(move || {
        for n in 0..lines {
            let stream = if n % 5 == 0 { Stream::Stderr } else { Stream::Stdout };
            let line = format!("line {n} {}\n", "z".repeat(n % 90));
            let (one, other) = line.split_at(n % line.len());
            append(&mut *writer, stream, one);
            append(&mut *writer, stream, other);
            if n % (lines / 24) == 0 {
                // Whether anybody still listens does not matter to the writer.
                progress.send(()).unwrap_or_default();
            }
        }
        finish(writer);
    });
    (thread, reports)
}

/// A follower that is opened at any moment of a run sees every line exactly once.
pub async fn law_3_exactly_once_per_reader(store: Arc<dyn LogStore>) {
    let (id, writer) = start(&*store);
    let (thread, mut reports) = write_oddly(writer, 1200);
    let mut followers = Vec::new();
    while reports.recv().await.is_some() {
        for view in [View::STDOUT, View::STDERR, View::All] {
            followers.push((view, tokio::spawn(drain(open(&*store, &id, following(view))))));
        }
    }
    thread.join().expect("the writer's thread");
    assert!(followers.len() >= 24, "too few followers to mean anything");
    for (view, follower) in followers {
        let expected = read_from(&*store, &id, view, after(0)).await;
        let got = follower.await.expect("a follower's task");
        assert_same(&got, &expected, view);
    }
}

fn assert_same(got: &Transcript, expected: &Transcript, view: View) {
    let plain = |line: &Seen| (line.position, line.number, line.stream, line.text.clone());
    let different = got.lines.iter().zip(&expected.lines).find(|(a, b)| plain(a) != plain(b));
    assert!(different.is_none(), "{view}: a follower and a later reader differ: {different:?}");
    assert_eq!(got.lines.len(), expected.lines.len(), "{view}: lines of a follower and of a later reader");
    assert_eq!(got.completed(), expected.completed(), "{view}");
}

/// A reader that is cut off after any event and resumes behind the last line it saw misses and repeats nothing.
pub async fn law_3_a_reader_that_reconnects_misses_and_repeats_nothing(store: Arc<dyn LogStore>) {
    let (id, writer) = start(&*store);
    let (thread, _reports) = write_oddly(writer, 600);
    let mut lines: Vec<Seen> = Vec::new();
    let mut connections = 0;
    'connected: loop {
        let seen = lines.last().map_or(0, |line| line.position);
        let options = ReadOptions { start: after(seen), batch_bytes: 256, ..following(View::All) };
        let mut events = open(&*store, &id, options);
        connections += 1;
        for _ in 0..connections % 4 {
            match events.next().await.expect("an end comes before the stream stops").expect("a whole run") {
                ReadEvent::Lines(batch) => lines.extend(lines_of(&batch)),
                ReadEvent::Gap { gap, .. } => panic!("nothing was dropped, but there is a hole: {gap:?}"),
                ReadEvent::End(end) => {
                    assert!(matches!(end, ReadEnd::Complete(_)), "{end:?}");
                    break 'connected;
                }
            }
        }
    }
    thread.join().expect("the writer's thread");
    assert!(connections > 20, "{connections} connections are too few to mean anything");
    assert_eq!(lines, read_from(&*store, &id, View::All, after(0)).await.lines);
}

/// Sixty-four followers of a run all see the same.
pub async fn many_followers_see_the_same(store: Arc<dyn LogStore>) {
    let (id, writer) = start(&*store);
    let followers: Vec<_> =
        (0..64).map(|_| tokio::spawn(drain(open(&*store, &id, following(View::All))))).collect();
    let (thread, _reports) = write_oddly(writer, 300);
    let expected = read(&*store, &id, following(View::All)).await;
    thread.join().expect("the writer's thread");
    assert_eq!(expected.lines.len(), 300);
    for follower in followers {
        assert_same(&follower.await.expect("a follower's task"), &expected, View::All);
    }
}

/// A follower may be dropped at any moment; the writer and the others do not notice.
pub async fn dropped_followers_hurt_nobody(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    let stays = open(&*store, &id, following(View::STDOUT));
    for n in 0..30 {
        let mut goes = open(&*store, &id, following(View::STDOUT));
        append(&mut *writer, Stream::Stdout, format!("{n}\n"));
        if n % 3 == 0 {
            next_lines(&mut goes, n + 1).await;
        } else if n % 3 == 1 {
            // Polled once, so that whatever it waits on is left behind too.
            drop(goes.next().now_or_never());
        }
    }
    finish(writer);
    let expected: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    assert_eq!(show(&drain(stays).await.texts()), expected);
}

/// Whatever a follower asked for, the end of the run is an end for it: also where it gave no line, and where it
/// was opened only then.
pub async fn law_5_every_stream_ends(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    let starts = [after(0), after(1), after(99), Start::LastLines { count: 1, after: LineNumber(0) }];
    let views = [View::STDOUT, View::STDERR, View::All];
    let everything = || starts.iter().flat_map(|&start| views.map(|view| (start, view)));
    let open_all = || -> Vec<_> {
        everything()
            .map(|(start, view)| open(&*store, &id, ReadOptions { start, ..following(view) }))
            .collect()
    };
    let mut followers = open_all();
    append(&mut *writer, Stream::Stdout, "one\ntwo\nthree");
    followers.extend(open_all());
    let end = finish(writer);
    followers.extend(open_all());
    for follower in followers {
        assert_eq!(*drain(follower).await.completed(), end);
    }
}

/// A writer that is dropped before the end leaves a run that is lost, and a follower is told so.
pub async fn law_5_a_dropped_writer_leaves_a_lost_run(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    let follower = open(&*store, &id, following(View::STDOUT));
    append(&mut *writer, Stream::Stdout, "last words\nno end");
    drop(writer);
    let got = drain(follower).await;
    assert_eq!(show(&got.texts()), ["last words", "no end"]);
    assert_eq!(got.completed().state.kind(), StateKind::Lost);
    let known = store.run(&id).expect("a lost run is known");
    assert_eq!(known.state.kind(), StateKind::Lost);
    assert_eq!(known.stdout.lines, 2);
}

/// `close` ends every follower, of a live run and of one that is not there, and may be called again. A run that is
/// being written is written to its end.
pub async fn close_ends_followers_and_not_runs(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, "one\n");
    let mut live = open(&*store, &id, following(View::STDOUT));
    let absent = open(&*store, &JobRunId::generate(), following(View::All));
    next_lines(&mut live, 1).await;
    store.close().expect("a store can be closed");
    for (follower, of) in [(live, "of a live run"), (absent, "of a run that is not there")] {
        let got = drain(follower).await;
        assert!(got.lines.is_empty(), "{:?}", got.lines);
        assert_eq!(got.end, ReadEnd::Shutdown, "the end of a follower {of}");
    }
    store.close().expect("a store can be closed again");
    append(&mut *writer, Stream::Stdout, "two\n");
    let end = finish(writer);
    assert_eq!(
        (end.state.kind(), end.stdout.lines),
        (StateKind::Succeeded, 2),
        "a run outlives the reading side"
    );
}
