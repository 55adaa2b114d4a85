//! A log from which somebody takes something while its run goes on: cut shorter, emptied, deleted, once and again. What
//! is missing is a hole, and no line has the number or the time of another.

use databuild_logs::{ByteOffset, CheckOptions, GapReason, check_index};

use super::*;

/// Prints lines that say their numbers, each an append of its own and late enough to be looked at before.
fn print(writer: &mut dyn databuild_logs::RunWriter, lines: std::ops::RangeInclusive<u64>) {
    for number in lines {
        std::thread::sleep(Duration::from_millis(2));
        writer.append(Stream::Stdout, format!("line {number}\n").as_bytes()).unwrap();
        writer.append(Stream::Stderr, format!("line {number}\n").as_bytes()).unwrap();
    }
}

/// What is seen of standard output: the number of each line that is there, and that its text says so.
fn numbers(seen: &[Seen]) -> Vec<u64> {
    let of_stdout = seen.iter().filter(|seen| seen.stream == Stream::Stdout);
    let there = of_stdout.filter_map(|seen| seen.text.as_ref().map(|text| (seen.number, text)));
    there
        .map(|(number, text)| {
            assert_eq!(*text, format!("line {number}"));
            number
        })
        .collect()
}

/// Lets this happen to the log after five lines of ten, and gives the numbers of the lines of standard output that are
/// there in the end, however they are read.
async fn lines_left(what: &str, happens: impl Fn(&Path)) -> Vec<u64> {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    let (store, other) = (service(folder.path()), other_process(folder.path()));
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let follow =
        |store: &FileLogStore| tokio::spawn(drain(store.read(&id("r"), followed(View::STDOUT)).unwrap()));
    let followers = [follow(&store), follow(&other)];
    print(&mut *writer, 1..=5);
    writer.flush().unwrap();
    happens(&log);
    print(&mut *writer, 6..=10);
    let run = writer.finish(success()).unwrap();
    for follower in followers {
        let (seen, _) = in_time(follower).await.unwrap().unwrap();
        let numbers = numbers(&seen);
        assert!(numbers.ends_with(&[6, 7, 8, 9, 10]), "{what}: a follower was given {numbers:?}");
    }
    let mut left = None;
    for store in [&store, &other, &other_process(folder.path())] {
        for (view, times) in
            [(View::STDOUT, false), (View::STDOUT, true), (View::All, false), (View::All, true)]
        {
            let (seen, _) = read(store, "r", ReadOptions { times, ..ReadOptions::new(view) }).await;
            let numbers = numbers(&seen);
            assert_eq!(
                left.get_or_insert_with(|| numbers.clone()),
                &numbers,
                "{what}: {view:?}, times {times}"
            );
            let errors = seen.iter().filter(|seen| seen.stream == Stream::Stderr && seen.text.is_some());
            assert_eq!(errors.count(), if view == View::All { 10 } else { 0 }, "{what}");
        }
        let mut events = store.read(&id("r"), ReadOptions::new(View::STDOUT)).unwrap();
        while let Some(event) = events.next().await {
            if let ReadEvent::Gap { gap, .. } = event.unwrap() {
                assert_eq!((gap.reason, gap.lines), (GapReason::Corrupt, run.stdout.dropped_lines), "{what}");
            }
        }
    }
    let left = left.unwrap();
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (10, 10 - left.len() as u64), "{what}");
    let (mut raw, mut at) = (Vec::new(), ByteOffset(0));
    loop {
        let (from, bytes) = store.read_kept_bytes(&id("r"), Stream::Stdout, at, 1000).unwrap();
        if bytes.is_empty() {
            break;
        }
        raw.extend_from_slice(&bytes);
        at = ByteOffset(from.0 + bytes.len() as u64);
    }
    let expected: String = left.iter().map(|number| format!("line {number}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&raw), expected, "{what}");
    store.close().unwrap();
    drop((store, other));
    let report = check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(report.findings, [], "{what}");
    left
}

fn cut(log: &Path, length: u64) {
    fs::File::options().write(true).open(log).unwrap().set_len(length).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_made_shorter_while_its_run_goes_on_has_a_hole_and_no_line_another_number() {
    assert_eq!(lines_left("nothing", |_| ()).await, (1..=10).collect::<Vec<_>>());
    assert_eq!(lines_left("emptied", |log| cut(log, 0)).await, [6, 7, 8, 9, 10]);
    assert_eq!(lines_left("cut behind a line", |log| cut(log, 14)).await, [1, 2, 6, 7, 8, 9, 10]);
    assert_eq!(lines_left("cut within a line", |log| cut(log, 17)).await, [1, 2, 6, 7, 8, 9, 10]);
    assert_eq!(lines_left("deleted", |log| fs::remove_file(log).unwrap()).await, [6, 7, 8, 9, 10]);
}

#[tokio::test]
async fn what_is_taken_again_and_of_an_unfinished_line_and_at_the_end_is_counted_once() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    let store = service(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let pause = || std::thread::sleep(Duration::from_millis(2));
    print(&mut *writer, 1..=3);
    writer.append(Stream::Stdout, b"an unfinished ").unwrap();
    cut(&log, 7);
    pause();
    // The rest of that line is lost with its beginning.
    writer.append(Stream::Stdout, b"line\nline 5\n").unwrap();
    cut(&log, 3);
    pause();
    writer.append(Stream::Stdout, b"line 6\n").unwrap();
    cut(&log, 0);
    let run = writer.finish(success()).unwrap();
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines, run.stdout.dropped_bytes), (6, 6, 54));
    for view in [View::STDOUT, View::All] {
        let (seen, _) = read(&store, "r", ReadOptions::new(view)).await;
        assert_eq!(numbers(&seen), [0; 0]);
        assert_eq!(
            seen.iter().filter(|seen| seen.stream == Stream::Stdout).map(|seen| seen.number).max(),
            Some(6)
        );
    }
    store.close().unwrap();
    drop(store);
    let report = check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
    assert_eq!(report.findings, []);
}

#[tokio::test]
async fn what_is_taken_before_what_was_taken_is_told_of_too() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    let store = service(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    print(&mut *writer, 1..=3);
    for length in [14, 7] {
        cut(&log, length);
        std::thread::sleep(Duration::from_millis(2));
        // Of a line that has no end yet, nothing stands behind what was taken.
        writer.append(Stream::Stdout, b"li").unwrap();
    }
    writer.append(Stream::Stdout, b"ne 4\nline 5\n").unwrap();
    let run = writer.finish(success()).unwrap();
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (5, 3));
    for view in [View::STDOUT, View::All] {
        let (seen, _) = read(&store, "r", ReadOptions::new(view)).await;
        assert_eq!(numbers(&seen), [1, 5]);
    }
}
