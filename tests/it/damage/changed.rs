//! A log from which somebody takes something while its run goes on: cut shorter, emptied, deleted, replaced, once and
//! again. What is missing is a hole, and no line has the number or the time of another.

use databuild_logs::{ByteOffset, CheckOptions, GapReason, check_index};

use super::*;

/// Prints lines that say their numbers, each an append of its own that has a mark of its own after a pause.
fn print(writer: &mut dyn databuild_logs::RunWriter, pause: Duration, lines: std::ops::RangeInclusive<u64>) {
    for number in lines {
        std::thread::sleep(pause);
        writer.append(Stream::Stdout, format!("line {number}\n").as_bytes()).unwrap();
        writer.append(Stream::Stderr, format!("line {number}\n").as_bytes()).unwrap();
    }
}

/// Longer than marks are added to, and than a writer goes on without looking at its logs.
const PAUSE: Duration = Duration::from_millis(2);

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

fn follow(store: &FileLogStore) -> tokio::task::JoinHandle<Result<(Vec<Seen>, ReadEnd), LogError>> {
    tokio::spawn(drain(store.read(&id("r"), followed(View::STDOUT)).unwrap()))
}

/// Lets this happen to the log after five lines of ten, and gives the numbers of the lines of standard output that are
/// there in the end, however they are read.
async fn lines_left(what: &str, pause: Duration, happens: impl Fn(&Path)) -> Vec<u64> {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    let (store, other) = (service(folder.path()), other_process(folder.path()));
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let followers = [follow(&store), follow(&other)];
    print(&mut *writer, pause, 1..=5);
    writer.flush().unwrap();
    happens(&log);
    print(&mut *writer, pause, 6..=10);
    let run = writer.finish(success()).unwrap();
    let mut followed = Vec::new();
    for follower in followers {
        followed.push(in_time(follower).await.unwrap().unwrap().0);
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
    let after: Vec<u64> = left.iter().copied().filter(|number| *number > 5).collect();
    for seen in followed {
        let numbers = numbers(&seen);
        assert!(numbers.ends_with(&after), "{what}: a follower was given {numbers:?} of {left:?}");
    }
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

type Treatment = (&'static str, fn(&Path), &'static [u64]);

/// Each way in which somebody may treat a log, and what is left of its first five lines then.
const TREATMENTS: [Treatment; 10] = [
    ("nothing", |_| (), &[1, 2, 3, 4, 5]),
    ("emptied", |log| cut(log, 0), &[]),
    ("cut behind a line", |log| cut(log, 14), &[1, 2]),
    ("cut within a line", |log| cut(log, 17), &[1, 2]),
    ("deleted", |log| fs::remove_file(log).unwrap(), &[]),
    ("deleted and made anew", |log| fs::remove_file(log).and_then(|()| fs::write(log, "")).unwrap(), &[]),
    ("moved away", |log| fs::rename(log, log.with_extension("log.1")).unwrap(), &[]),
    ("moved away and made anew", |log| rotate(log, ""), &[]),
    ("replaced by a shorter one", |log| rotate(log, "line 1\nLINE 2\n"), &[]),
    ("replaced by a longer one", |log| rotate(log, &"line of others\n".repeat(100)), &[]),
];

fn rotate(log: &Path, by: &str) {
    fs::rename(log, log.with_extension("log.1")).unwrap();
    fs::write(log, by).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_others_change_while_its_run_goes_on_has_a_hole_and_no_line_another_number() {
    for (what, happens, left) in TREATMENTS {
        assert_eq!(lines_left(what, PAUSE, happens).await, [left, &[6, 7, 8, 9, 10]].concat(), "{what}");
    }
}

/// A writer looks at its logs once a millisecond; what it appends in between gets to no wrong place either.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_others_change_between_two_appends_has_a_hole_and_no_line_another_number() {
    for (what, happens, left) in TREATMENTS {
        let numbers = lines_left(what, Duration::ZERO, happens).await;
        let (before, after): (Vec<_>, Vec<_>) = numbers.iter().partition(|number| **number <= 5);
        // What shares a mark goes with it, and a file that is gone is missed a moment later.
        assert!(left.starts_with(&before), "{what}: {numbers:?}");
        let is_there = what.contains("cut") || ["nothing", "emptied"].contains(&what);
        assert!(after.len() == 5 || !is_there, "{what}: {numbers:?}");
    }
}

/// What somebody else appends to a log is as if the job had printed it: whoever was given it has the numbers of others.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_append_to_a_log_stays_and_everybody_numbers_it_alike() {
    for pause in [PAUSE, Duration::ZERO] {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("job_runs/r/stdout.log");
        let (store, other) = (service(folder.path()), other_process(folder.path()));
        let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
        let followers = [follow(&store), follow(&other)];
        let intrude = |text: &[u8]| {
            fs::File::options().append(true).open(&log).unwrap().write_all(text).unwrap();
        };
        print(&mut *writer, pause, 1..=5);
        intrude(b"intruder\n");
        print(&mut *writer, pause, 6..=9);
        intrude(b"another\n");
        let run = writer.finish(success()).unwrap();
        assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (11, 0));
        let expected = fs::read_to_string(&log).unwrap();
        assert_eq!(expected.lines().filter(|line| line.starts_with("line ")).count(), 9);
        let mut all = Vec::new();
        for follower in followers {
            all.push(in_time(follower).await.unwrap().unwrap().0);
        }
        for store in [&store, &other] {
            all.push(read(store, "r", ReadOptions::new(View::STDOUT)).await.0);
        }
        for seen in all {
            let texts: Vec<_> = seen.iter().map(|seen| seen.text.clone().unwrap()).collect();
            assert_eq!(texts, expected.lines().collect::<Vec<_>>());
            assert!(seen.iter().zip(1..).all(|(seen, number)| seen.number == number));
        }
        store.close().unwrap();
        drop((store, other));
        let report = check_index(folder.path(), CheckOptions { deep: true, repair: false }, |_| ()).unwrap();
        assert_eq!(report.findings, []);
    }
}

/// The folder of a run is moved away, and a copy of it put in its place: that is another's, and is left as it is.
#[tokio::test]
async fn a_run_whose_folder_is_moved_away_goes_on_there() {
    let folder = tempfile::tempdir().unwrap();
    let (run, moved) = (folder.path().join("job_runs/r"), folder.path().join("moved"));
    let store = other_process(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    print(&mut *writer, PAUSE, 1..=3);
    fs::rename(&run, &moved).unwrap();
    copy_folder(&moved, &run);
    print(&mut *writer, PAUSE, 4..=6);
    let there = |folder: &Path| fs::read_to_string(folder.join("stdout.log")).unwrap();
    assert_eq!(there(&moved), (1..=6).map(|number| format!("line {number}\n")).collect::<String>());
    assert_eq!(there(&run), (1..=3).map(|number| format!("line {number}\n")).collect::<String>());
}

#[tokio::test]
async fn what_is_taken_again_and_of_an_unfinished_line_and_at_the_end_is_counted_once() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    let store = service(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let pause = || std::thread::sleep(PAUSE);
    print(&mut *writer, PAUSE, 1..=3);
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
    print(&mut *writer, PAUSE, 1..=3);
    for length in [14, 7] {
        cut(&log, length);
        std::thread::sleep(PAUSE);
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

/// With a cap a run keeps its first lines and its last ones. Who takes no more than the beginning of a line takes nothing
/// else from it.
#[tokio::test]
async fn of_a_run_with_a_cap_only_what_was_taken_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    let options = FileStoreOptions { max_run_bytes: 4096, ..FileStoreOptions::default() };
    let store = FileLogStore::open(folder.path(), options).unwrap();
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let lines: String = (1..=400).map(|number| format!("line {number}\n")).collect();
    writer.append(Stream::Stdout, lines.as_bytes()).unwrap();
    writer.append(Stream::Stdout, b"an unfinished ").unwrap();
    writer.flush().unwrap();
    cut(&log, lines.len() as u64 + 3);
    std::thread::sleep(PAUSE);
    writer.append(Stream::Stdout, b"line\nline 402\n").unwrap();
    let run = writer.finish(success()).unwrap();
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (402, 1));
    let (seen, _) = read(&store, "r", ReadOptions::new(View::STDOUT)).await;
    assert_eq!(numbers(&seen), (1..=400).chain([402]).collect::<Vec<_>>());
}

/// The folder of a run that goes on is removed, and its id used again.
#[tokio::test]
async fn the_end_of_a_run_is_not_written_into_the_folder_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("job_runs/r");
    let store = other_process(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    print(&mut *writer, PAUSE, 1..=3);
    fs::rename(&run, folder.path().join("removed")).unwrap();
    let others = other_process(folder.path());
    let mut another = others.start(RunSpec::new(id("r"))).unwrap();
    another.append(Stream::Stdout, b"another\n").unwrap();
    let error = writer.finish(success()).unwrap_err();
    assert!(error.to_string().contains("another run"), "{error}");
    assert!(!run.join("metadata.json").exists());
    let end = another.finish(success()).unwrap();
    assert_eq!(end.stdout.lines, 1);
    assert!(run.join("metadata.json").exists());
}
