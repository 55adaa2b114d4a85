//! The file store on a disk: what it leaves there, what it finds there, and what it does beside other processes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use databuild_logs::{
    ByteOffset, Exit, FileLogStore, FileStoreOptions, JobMetadata, JobRunId, LineNumber, LogError, LogStore,
    Outcome, ReadEnd, ReadEvent, ReadOptions, ReadStream, RunEnd, RunQuery, RunSpec, RunState, Start,
    StateKind, Stream, View,
};
use futures_util::StreamExt;

fn open(folder: &Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions::default()).unwrap()
}

/// A store without the index, as another process has it.
fn other_process(folder: &Path) -> FileLogStore {
    FileLogStore::open_folder(folder, FileStoreOptions::default()).unwrap()
}

fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

/// All lines of a read, and its end.
async fn read(store: &dyn LogStore, run: &JobRunId, options: ReadOptions) -> (Vec<(u64, String)>, ReadEnd) {
    rest(store.read(run, options).unwrap()).await
}

async fn rest(mut events: ReadStream) -> (Vec<(u64, String)>, ReadEnd) {
    let mut lines = Vec::new();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => lines.extend(
                batch.lines().map(|line| (line.number.0, String::from_utf8_lossy(line.text).into_owned())),
            ),
            ReadEvent::Gap { gap, .. } => lines.push((gap.after.0, format!("gap of {}", gap.lines))),
            ReadEvent::End(end) => return (lines, end),
        }
    }
    panic!("the stream ended without an end");
}

async fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[test]
fn a_run_leaves_the_files_that_were_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut run = store.start(RunSpec::new(id("r1")).command(["make"])).unwrap();
    run.append(Stream::Stdout, b"hello\n").unwrap();
    run.append(Stream::Stderr, b"oops\xff").unwrap();
    let of_run = folder.path().join("job_runs/r1");
    assert_eq!(fs::read(of_run.join("stdout.log")).unwrap(), b"hello\n", "written as it is produced");
    assert!(!of_run.join("metadata.json").exists());
    run.finish(success()).unwrap();
    assert_eq!(fs::read(of_run.join("stderr.log")).unwrap(), b"oops\xff");
    let metadata: JobMetadata =
        serde_json::from_slice(&fs::read(of_run.join("metadata.json")).unwrap()).unwrap();
    assert_eq!(metadata.spec.command, ["make"]);
    assert_eq!((metadata.stdout.lines, metadata.stderr.lines, metadata.stderr.bytes), (1, 1, 5));
    let mut names: Vec<_> = fs::read_dir(&of_run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["journal", "metadata.json", "stderr.log", "stdout.log"]);
}

#[tokio::test]
async fn runs_and_their_places_outlive_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let run = id("big");
    {
        let store = open(folder.path());
        let mut writer = store.start(RunSpec::new(run.clone())).unwrap();
        let text: String = (1..=50_000).map(|n| format!("line number {n}\n")).collect();
        for piece in text.as_bytes().chunks(10_000) {
            writer.append(Stream::Stdout, piece).unwrap();
        }
        writer.finish(success()).unwrap();
        store.close().unwrap();
    }
    let store = open(folder.path());
    assert_eq!(store.run(&run).unwrap().stdout.lines, 50_000);
    for line in [0, 1, 4_999, 25_000, 49_999, 50_000, 60_000] {
        let options = ReadOptions {
            start: Start::After(LineNumber(line)),
            limit: Some(2),
            ..ReadOptions::new(View::STDOUT)
        };
        let (lines, end) = read(&store, &run, options).await;
        let expected: Vec<_> =
            (line + 1..=(line + 2).min(50_000)).map(|n| (n, format!("line number {n}"))).collect();
        assert_eq!(lines, expected);
        assert!(matches!(end, ReadEnd::Complete(_)));
    }
    let offset = store.byte_offset(&run, Stream::Stdout, Start::After(LineNumber(49_999))).unwrap();
    assert_eq!(store.read_bytes(&run, Stream::Stdout, offset, 1000).unwrap(), "line number 50000\n");
    let end = store.byte_offset(&run, Stream::Stdout, Start::After(LineNumber(50_000))).unwrap();
    assert_eq!(end, ByteOffset(store.run(&run).unwrap().stdout.bytes));
}

#[tokio::test]
async fn a_run_of_another_process_is_followed_live() {
    let folder = tempfile::tempdir().unwrap();
    let service = open(folder.path());
    let other = other_process(folder.path());
    let run = id("foreign");
    let followed = {
        let (service, run) = (service.clone(), run.clone());
        tokio::spawn(async move {
            read(&service, &run, ReadOptions { follow: true, ..ReadOptions::new(View::All) }).await
        })
    };
    let mut writer = other.start(RunSpec::new(run.clone())).unwrap();
    for n in 0..200 {
        let stream = if n % 3 == 0 { Stream::Stderr } else { Stream::Stdout };
        writer.append(stream, format!("{n}\n").as_bytes()).unwrap();
    }
    writer.flush().unwrap();
    eventually("the service sees the run go on", || {
        let run = service.run(&run).ok()?;
        (run.state == RunState::Running && run.stdout.lines + run.stderr.lines == 200).then_some(())
    })
    .await;
    writer.append(Stream::Stdout, b"last").unwrap();
    writer.finish(success()).unwrap();
    let (lines, end) = followed.await.unwrap();
    let texts: Vec<_> = lines.into_iter().map(|(_, text)| text).collect();
    let expected: Vec<_> = (0..200).map(|n| n.to_string()).chain(["last".into()]).collect();
    assert_eq!(texts, expected);
    let ReadEnd::Complete(metadata) = end else { panic!("{end:?}") };
    assert_eq!(metadata.state.exit(), Some(Exit::Code(0)));
    let listed =
        service.runs(&RunQuery { state: Some(StateKind::Succeeded), ..RunQuery::default() }).unwrap();
    assert_eq!(listed.runs[0].id(), &run);
}

/// A writer's last mark follows its bytes by a moment; what is in between is read, and counts as there.
#[tokio::test]
async fn the_last_lines_of_another_processs_run_are_those_that_are_written_marked_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let run = id("foreign");
    let writing = other_process(folder.path());
    let mut writer = writing.start(RunSpec::new(run.clone())).unwrap();
    writer.append(Stream::Stdout, b"1\n2\n3\n4\nha").unwrap();
    writer.append(Stream::Stderr, b"of another stream\n").unwrap();
    writer.flush().unwrap();
    // Nobody flushes these.
    writer.append(Stream::Stdout, b"lf\n6\n7\n8\nno end").unwrap();
    let (service, reader) = (open(folder.path()), other_process(folder.path()));
    let all: Vec<_> = ["1", "2", "3", "4", "half", "6", "7", "8"].map(str::to_owned).into();
    for store in [&service, &reader] {
        eventually("all is seen", || {
            let bytes = store.read_bytes(&run, Stream::Stdout, ByteOffset(0), 99).unwrap();
            bytes.ends_with(b"no end").then_some(())
        })
        .await;
        for count in 0..12 {
            let start = Start::LastLines { count, after: LineNumber(0) };
            let from = all.len().saturating_sub(count as usize);
            let (lines, end) =
                read(store, &run, ReadOptions { start, ..ReadOptions::new(View::STDOUT) }).await;
            let texts: Vec<_> = lines.into_iter().map(|(_, text)| text).collect();
            let expected: Vec<_> = (after + 1..=6000).take(3).map(line).collect();
            assert_eq!(texts, expected, "after {after}");
        }
    }
}

/// Wherever a line is between two places that the index keeps, and whatever lies there: blank lines, long ones, a hole.
#[tokio::test]
async fn a_read_begins_with_the_line_that_it_is_to_begin_with() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let line = |n: u64| match n % 17 {
        0 => String::new(),
        5 if n.is_multiple_of(340) => format!("{n} {}", "x".repeat(40_000)),
        _ => format!("{n} {}", "x".repeat((n * 7 % 180) as usize)),
    };
    for n in 1..=6000 {
        writer.append(Stream::Stdout, format!("{}\n", line(n)).as_bytes()).unwrap();
    }
    writer.finish(success()).unwrap();
    store.close().unwrap();
    let (indexed, plain) = (open(folder.path()), other_process(folder.path()));
    for after in (0..6000).step_by(23).chain(5990..6000) {
        for store in [&indexed, &plain] {
            let options = ReadOptions {
                start: Start::After(LineNumber(after)),
                limit: Some(3),
                ..ReadOptions::new(View::STDOUT)
            };
            let (lines, _) = read(store, &id("r"), options).await;
            let texts: Vec<_> = lines.into_iter().map(|(number, text)| (number, text)).collect();
            let expected: Vec<_> = (after + 1..=6000).take(3).map(|n| (LineNumber(n).0, line(n))).collect();
            assert_eq!(texts.len(), expected.len());
            for ((_, text), (_, wanted)) in texts.iter().zip(&expected) {
                assert_eq!(text, wanted, "after {after}");
            }
        }
    }
}
