//! The file store on a disk: what it leaves there, what it finds there, and what it does beside other processes.

mod seek;

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
            assert_eq!(texts, all[from..], "the last {count}");
            assert_eq!(end, ReadEnd::Running { next: LineNumber(8) });
            assert_eq!(store.position(&run, View::STDOUT, start).unwrap(), LineNumber(from as u64));
            let offset = store.byte_offset(&run, Stream::Stdout, start).unwrap().0;
            assert_eq!(offset, all[..from].iter().map(|line| line.len() as u64 + 1).sum::<u64>());
            // Where their time is told, or their place among those of the other stream, they are not there yet.
            for (view, marked) in [(View::STDOUT, 4), (View::All, 5)] {
                let timed = ReadOptions { start, times: true, ..ReadOptions::new(view) };
                let (lines, end) = read(store, &run, timed).await;
                assert_eq!(lines.len(), marked.min(count as usize), "the last {count} of {view}");
                assert_eq!(end, ReadEnd::Running { next: LineNumber(marked as u64) });
            }
        }
    }
    writer.finish(success()).unwrap();
}

#[tokio::test]
async fn a_folder_by_another_tool_is_a_run_and_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let service = open(folder.path());
    let run = id("by-hand");
    let followed = {
        let (service, run) = (service.clone(), run.clone());
        tokio::spawn(async move {
            read(&service, &run, ReadOptions { follow: true, ..ReadOptions::new(View::STDOUT) }).await
        })
    };
    let of_run = folder.path().join("job_runs/by-hand");
    fs::create_dir_all(&of_run).unwrap();
    fs::write(of_run.join("stdout.log"), "one\ntwo\n").unwrap();
    eventually("its lines are counted", || (service.run(&run).ok()?.stdout.lines == 2).then_some(())).await;
    let mut log = fs::OpenOptions::new().append(true).open(of_run.join("stdout.log")).unwrap();
    std::io::Write::write_all(&mut log, b"three\n").unwrap();
    eventually("more lines are counted", || (service.run(&run).ok()?.stdout.lines == 3).then_some(())).await;
    fs::write(of_run.join("metadata.json"), r#"{"job_run_id":"by-hand","exit_code":3,"tool":"theirs"}"#)
        .unwrap();
    let (lines, end) = followed.await.unwrap();
    assert_eq!(lines, [(1, "one".into()), (2, "two".into()), (3, "three".into())]);
    let ReadEnd::Complete(metadata) = end else { panic!("{end:?}") };
    assert_eq!(metadata.state.exit(), Some(Exit::Code(3)));
    assert_eq!(metadata.other["tool"], "theirs");
    assert!(!of_run.join("journal").exists(), "nothing is written into a folder by another tool");
}

#[tokio::test]
async fn both_streams_of_a_run_without_a_journal_are_followed_standard_output_first() {
    let folder = tempfile::tempdir().unwrap();
    let service = open(folder.path());
    let run = id("by-hand");
    let of_run = folder.path().join("job_runs/by-hand");
    fs::create_dir_all(&of_run).unwrap();
    fs::write(of_run.join("stderr.log"), "warning\n").unwrap();
    fs::write(of_run.join("stdout.log"), "one\ntwo\n").unwrap();
    eventually("its lines are counted", || (service.run(&run).ok()?.stdout.lines == 2).then_some(())).await;
    let follow = ReadOptions { follow: true, ..ReadOptions::new(View::All) };
    let from = |since| ReadOptions { start: Start::After(LineNumber(since)), ..follow.clone() };
    let mut events = service.read(&run, follow.clone()).unwrap();
    let later: Vec<_> = [1, 3, 4].map(|since| service.read(&run, from(since)).unwrap()).into();
    let Some(Ok(ReadEvent::Lines(first))) = events.next().await else {
        panic!("nothing comes while it goes on")
    };
    assert_eq!((&first.bytes[..], first.first_position), (&b"one\ntwo\n"[..], LineNumber(1)));
    let mut log = fs::OpenOptions::new().append(true).open(of_run.join("stdout.log")).unwrap();
    std::io::Write::write_all(&mut log, b"three\nlast").unwrap();
    let Some(Ok(ReadEvent::Lines(next))) = events.next().await else { panic!("it is not followed") };
    assert_eq!((&next.bytes[..], next.first_position), (&b"three\n"[..], LineNumber(3)));
    fs::write(of_run.join("metadata.json"), r#"{"job_run_id":"by-hand","exit_code":0}"#).unwrap();

    let all = ["one", "two", "three", "last", "warning"];
    for (since, events) in [3, 1, 3, 4].into_iter().zip([events].into_iter().chain(later)) {
        let (lines, _) = rest(events).await;
        let texts: Vec<_> = lines.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, all[since..], "since {since}");
    }
    assert_eq!(read(&service, &run, ReadOptions::new(View::All)).await.0.len(), all.len());
}

#[tokio::test]
async fn folders_that_were_there_before_the_store_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    for n in 0..30 {
        let of_run = folder.path().join(format!("job_runs/old-{n:02}"));
        fs::create_dir_all(&of_run).unwrap();
        fs::write(of_run.join("stdout.log"), "x\n".repeat(n)).unwrap();
        let text =
            format!(r#"{{"job_run_id":"old-{n:02}","exit_code":0,"finished_at":"2026-01-01T00:00:00Z"}}"#);
        fs::write(of_run.join("metadata.json"), text).unwrap();
    }
    let store = open(folder.path());
    let runs = store.runs(&RunQuery::default()).unwrap().runs;
    assert_eq!(runs.len(), 30);
    assert!(
        runs.iter().all(|run| run.stdout.lines.to_string() == run.id().as_str()[4..].trim_start_matches('0')
            || run.stdout.lines == 0)
    );
}

#[test]
fn a_document_without_times_and_totals_gets_them_from_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let of_run = folder.path().join("job_runs/bare");
    fs::create_dir_all(&of_run).unwrap();
    fs::write(of_run.join("stdout.log"), "one\ntwo\n").unwrap();
    fs::write(of_run.join("metadata.json"), r#"{"job_run_id":"bare","exit_code":0}"#).unwrap();
    for store in [open(folder.path()), other_process(folder.path())] {
        let run = &store.runs(&RunQuery::default()).unwrap().runs[0];
        let Some(ended) = run.state.ended() else { panic!("{run:?}") };
        assert!(run.started_at.0 > 1_700_000_000_000_000 && ended >= run.started_at, "{run:?}");
        assert_eq!((run.stdout.bytes, run.stdout.lines), (8, 2));
    }
}

#[tokio::test]
async fn what_was_running_and_has_no_writer_is_lost_on_open() {
    let folder = tempfile::tempdir().unwrap();
    let run = id("orphan");
    {
        // A writer that is forgotten keeps nothing but its files, as after a crash.
        let other = other_process(folder.path());
        let mut writer = other.start(RunSpec::new(run.clone()).command(["sleep"])).unwrap();
        writer.append(Stream::Stdout, b"whole\n").unwrap();
        writer.flush().unwrap();
        writer.append(Stream::Stdout, b"behind the last mark\nunterm").unwrap();
        crash_copy(folder.path(), &run);
        writer.finish(success()).unwrap();
    }
    let crashed = folder.path().join("crashed");
    let store = open(&crashed);
    let (lines, end) = read(&store, &run, ReadOptions { follow: true, ..ReadOptions::new(View::All) }).await;
    let texts: Vec<_> = lines.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(texts, ["whole", "behind the last mark", "unterm"]);
    let ReadEnd::Complete(metadata) = end else { panic!("{end:?}") };
    assert!(matches!(metadata.state, RunState::Lost { .. }));
    assert_eq!(metadata.stdout.lines, 3);
    let of_run = crashed.join("job_runs/orphan/metadata.json");
    let written: JobMetadata = serde_json::from_slice(&fs::read(of_run).unwrap()).unwrap();
    assert_eq!(written, *metadata);
    assert_eq!(written.spec.command, ["sleep"]);
    store.close().unwrap();
    let again = open(&crashed);
    assert_eq!(again.run(&run).unwrap(), *metadata, "and stays so");
}

/// Copies a run's folder as it is now, without the lock that its writer has.
fn crash_copy(folder: &Path, run: &JobRunId) {
    let to = folder.join("crashed/job_runs").join(run.as_str());
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(folder.join("job_runs").join(run.as_str())).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test]
async fn a_store_without_an_index_reports_a_lost_run_and_leaves_its_folder_alone() {
    let folder = tempfile::tempdir().unwrap();
    let run = id("orphan");
    let other = other_process(folder.path());
    let mut writer = other.start(RunSpec::new(run.clone())).unwrap();
    writer.append(Stream::Stdout, b"a\nb").unwrap();
    crash_copy(folder.path(), &run);
    let reader = other_process(&folder.path().join("crashed"));
    let (lines, end) =
        read(&reader, &run, ReadOptions { follow: true, ..ReadOptions::new(View::STDOUT) }).await;
    assert_eq!(lines, [(1, "a".into()), (2, "b".into())]);
    let ReadEnd::Complete(metadata) = end else { panic!("{end:?}") };
    assert_eq!((metadata.state.kind(), metadata.stdout.lines), (StateKind::Lost, 2));
    assert!(!folder.path().join("crashed/job_runs/orphan/metadata.json").exists());
}

#[test]
fn a_second_service_on_the_same_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let error = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap_err();
    assert!(matches!(error, LogError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("index.redb"), "{error}");
    store.close().unwrap();
    drop(store);
    open(folder.path());
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = FileLogStore::open(file.join("logs"), FileStoreOptions::default()).unwrap_err();
    assert!(error.to_string().contains("file/logs/job_runs"), "{error}");
    let unindexed = FileLogStore::open_folder(file.join("logs"), FileStoreOptions::default()).unwrap();
    let error = unindexed.start(RunSpec::new(id("x"))).err().unwrap();
    assert!(matches!(error, LogError::Io { .. }), "{error}");
}

#[test]
fn an_id_in_use_by_another_process_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (other_process(folder.path()), other_process(folder.path()));
    let writer = one.start(RunSpec::new(id("x"))).unwrap();
    assert!(matches!(two.start(RunSpec::new(id("x"))), Err(LogError::AlreadyExists { .. })));
    assert!(matches!(two.append(&id("x"), Stream::Stdout, b"\n"), Err(LogError::InUse { .. })));
    writer.finish(success()).unwrap();
    assert!(matches!(two.append(&id("x"), Stream::Stdout, b"\n"), Err(LogError::Finished { .. })));
    let leftovers: Vec<_> = fs::read_dir(folder.path().join("job_runs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != "x")
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn fields_of_an_existing_metadata_file_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let writer = store.start(RunSpec::new(id("x"))).unwrap();
    let path = folder.path().join("job_runs/x/metadata.json");
    fs::write(&path, r#"{"job_run_id":"x","owner":"somebody","exit_code":1}"#).unwrap();
    writer.finish(success()).unwrap();
    let text = fs::read_to_string(path).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((json["owner"].as_str(), json["exit_code"].as_i64()), (Some("somebody"), Some(0)), "{text}");
}

#[tokio::test]
async fn a_log_cut_short_by_somebody_is_a_gap_and_not_a_wrong_line() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    writer.append(Stream::Stdout, b"one\ntwo\nthree\nfour\n").unwrap();
    writer.finish(success()).unwrap();
    let log = folder.path().join("job_runs/x/stdout.log");
    fs::OpenOptions::new().write(true).open(log).unwrap().set_len(8).unwrap();
    for view in [View::STDOUT, View::All] {
        let (lines, end) = read(&store, &id("x"), ReadOptions::new(view)).await;
        assert_eq!(lines, [(1, "one".into()), (2, "two".into()), (2, "gap of 2".into())], "{view}");
        assert!(matches!(end, ReadEnd::Complete(_)));
    }
}

/// The index stays small and so does the journal, whatever the job does.
#[test]
fn index_and_journal_cost_next_to_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let line = format!("{}\n", "x".repeat(99));
    let mut bulk = store.start(RunSpec::new(id("bulk"))).unwrap();
    let batch = line.repeat(2_500);
    for _ in 0..400 {
        bulk.append(Stream::Stdout, batch.as_bytes()).unwrap();
        // So that the index is committed more than once.
        thread::sleep(Duration::from_millis(5));
    }
    bulk.finish(success()).unwrap();
    let mut slow = store.start(RunSpec::new(id("slow"))).unwrap();
    for _ in 0..2_000 {
        slow.append(Stream::Stdout, line.as_bytes()).unwrap();
        slow.flush().unwrap();
    }
    slow.finish(success()).unwrap();
    let file = |path: &str| fs::metadata(folder.path().join(path)).unwrap();
    let size = |path: &str| file(path).len();
    let bulk_bytes = size("job_runs/bulk/stdout.log");
    // While it is open the file has room to grow into, which takes no blocks yet.
    let index_bytes = file("index.redb").blocks() * 512;
    assert!(index_bytes <= bulk_bytes / 1_000 + 100 * 1024, "open: {index_bytes}");
    store.close().unwrap();
    assert_eq!(bulk_bytes, 100_000_000);
    assert!(size("job_runs/bulk/journal") <= bulk_bytes / 1_000, "{}", size("job_runs/bulk/journal"));
    let index_bytes = size("index.redb");
    assert!(index_bytes <= bulk_bytes / 1_000 + 100 * 1024, "closed: {index_bytes}");
    let slow_bytes = size("job_runs/slow/stdout.log");
    assert!(size("job_runs/slow/journal") <= slow_bytes * 12 / 100, "{}", size("job_runs/slow/journal"));
}

/// What a thread of the store is just doing does not outlive the store.
#[test]
fn a_store_that_is_dropped_leaves_its_folder_to_the_next_one_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..150 {
        let store = open(folder.path());
        let writer = store.start(RunSpec::new(id(&format!("run-{round}")))).unwrap();
        if round % 2 == 0 {
            drop(store);
            drop(writer);
        } else {
            drop(writer);
            drop(store);
        }
    }
}
