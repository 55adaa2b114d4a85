//! What the file store makes of folders that were damaged, swapped or taken away.

mod changed;
mod folders;
mod fuzz;
mod lost;
mod reused;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use databuild_logs::{
    Batch, Exit, FileLogStore, FileStoreOptions, JobMetadata, JobRunId, LineNumber, LogError, LogStore,
    Outcome, ReadEnd, ReadEvent, ReadOptions, ReadStream, RunEnd, RunQuery, RunSpec, Start, StateKind,
    Stream, UnixMicros, View,
};
use futures_util::{FutureExt, StreamExt};

use crate::support::{copy_folder, wait_until};

const VIEWS: [View; 3] = [View::STDOUT, View::STDERR, View::All];

/// A store that asks after the writers of its runs all the time.
fn service(folder: &Path) -> FileLogStore {
    let liveness_interval = Duration::from_millis(1);
    FileLogStore::open(folder, FileStoreOptions { liveness_interval, ..FileStoreOptions::default() }).unwrap()
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

/// A line or a hole: the position behind it in its view, the stream, the number in the stream, and the text.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    position: u64,
    stream: Stream,
    number: u64,
    text: Option<String>,
}

async fn drain(mut events: ReadStream) -> Result<(Vec<Seen>, ReadEnd), LogError> {
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        match event? {
            ReadEvent::Lines(batch) => seen.extend(batch.lines().map(|line| Seen {
                position: line.position.0,
                stream: batch.stream,
                number: line.number.0,
                text: Some(String::from_utf8_lossy(line.text).into_owned()),
            })),
            ReadEvent::Gap { gap, next } => seen.push(Seen {
                position: next.0,
                stream: gap.stream,
                number: gap.after.0 + gap.lines,
                text: None,
            }),
            ReadEvent::End(end) => return Ok((seen, end)),
        }
    }
    panic!("the stream ended without an end");
}

async fn read_store(
    store: &dyn LogStore,
    run: &str,
    options: ReadOptions,
) -> Result<(Vec<Seen>, ReadEnd), LogError> {
    in_time(drain(store.read(&id(run), options)?)).await
}

/// What has to come by itself.
async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("a stream that never ends")
}

async fn read(store: &dyn LogStore, run: &str, options: ReadOptions) -> (Vec<Seen>, ReadEnd) {
    read_store(store, run, options).await.unwrap()
}

fn followed(view: View) -> ReadOptions {
    ReadOptions { follow: true, ..ReadOptions::new(view) }
}

fn texts(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(|seen| seen.text.as_deref().unwrap_or("(gap)")).collect()
}

/// A run of both streams that is over: its folder, and what it printed.
fn finished_run(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let store = other_process(folder.path());
    let mut writer = store.start(RunSpec::new(id(name)).command(["make"])).unwrap();
    for n in 1..=6 {
        let stream = if n % 2 == 0 { Stream::Stderr } else { Stream::Stdout };
        writer.append(stream, format!("{stream} {n}\n").as_bytes()).unwrap();
        writer.flush().unwrap();
    }
    writer.append(Stream::Stdout, b"no end").unwrap();
    writer.finish(success()).unwrap();
    let of_run = folder.path().join("job_runs").join(name);
    (folder, of_run)
}

/// Whatever became of the journal, every line has its number, and the end is the one that was written down.
async fn lines_are_right(store: &dyn LogStore, what: &str) {
    for view in VIEWS {
        let (seen, end) = read(store, "x", followed(view)).await;
        for stream in Stream::BOTH {
            let numbers: Vec<_> = seen.iter().filter(|line| line.stream == stream).collect();
            let expected: Vec<_> = match stream {
                Stream::Stdout => vec!["stdout 1", "stdout 3", "stdout 5", "no end"],
                Stream::Stderr => vec!["stderr 2", "stderr 4", "stderr 6"],
            };
            let shown = view == View::All || view == View::One(stream);
            let expected: Vec<_> =
                (1..).zip(expected.into_iter().map(String::from)).filter(|_| shown).collect();
            let got: Vec<_> =
                numbers.iter().map(|line| (line.number, line.text.clone().unwrap_or_default())).collect();
            assert_eq!(got, expected, "{stream} in {view}, {what}");
        }
        let positions: Vec<_> = seen.iter().map(|line| line.position).collect();
        assert_eq!(positions, (1..=seen.len() as u64).collect::<Vec<_>>(), "{view}, {what}");
        let ReadEnd::Complete(metadata) = end else { panic!("{end:?} of {view}, {what}") };
        assert_eq!(metadata.state.kind(), StateKind::Succeeded, "{what}");
    }
}

#[tokio::test]
async fn a_journal_with_any_bit_flipped_or_cut_anywhere_costs_no_line_and_not_the_end() {
    let (_folder, of_run) = finished_run("x");
    let journal = fs::read(of_run.join("journal")).unwrap();
    let metadata = fs::read(of_run.join("metadata.json")).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let damaged = parent.path().join("job_runs/x");
    copy_folder(&of_run, &damaged);
    let flips = (0..8 * journal.len()).map(|bit| {
        let mut flipped = journal.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        (flipped, format!("bit {} of byte {} flipped", bit % 8, bit / 8))
    });
    let cuts = (0..journal.len()).map(|at| (journal[..at].to_vec(), format!("cut at {at}")));
    // It keeps nothing of a run that is over.
    let reader = other_process(parent.path());
    for (number, (bytes, what)) in flips.chain(cuts).enumerate() {
        fs::write(damaged.join("journal"), &bytes).unwrap();
        lines_are_right(&reader, &what).await;
        if number % 200 == 0 {
            let store = service(parent.path());
            lines_are_right(&store, &what).await;
            store.close().unwrap();
            drop(store);
            fs::remove_file(parent.path().join("index.redb")).unwrap();
            assert_eq!(fs::read(damaged.join("metadata.json")).unwrap(), metadata, "{what}");
            assert_eq!(fs::read(damaged.join("journal")).unwrap(), bytes, "{what}");
        }
    }
}

#[tokio::test]
async fn metadata_that_is_garbage_is_no_obstacle() {
    let (folder, of_run) = finished_run("x");
    for garbage in ["", "{", "[]", "null", r#"{"job_run_id":"y","exit_code":1}"#, "\0\0\0"] {
        fs::write(of_run.join("metadata.json"), garbage).unwrap();
        lines_are_right(&other_process(folder.path()), garbage).await;
    }
}

#[tokio::test]
async fn a_folder_that_was_copied_is_a_run_with_the_name_of_the_copy() {
    let (folder, of_run) = finished_run("x");
    copy_folder(&of_run, &folder.path().join("job_runs/y"));
    let stores: [Arc<dyn LogStore>; 2] =
        [Arc::new(other_process(folder.path())), Arc::new(service(folder.path()))];
    for store in &stores {
        for name in ["x", "y"] {
            let run = store.run(&id(name)).unwrap();
            assert_eq!((run.id().as_str(), run.state.kind()), (name, StateKind::Succeeded));
            let (seen, _) = read(&**store, name, followed(View::STDERR)).await;
            assert_eq!(texts(&seen), ["stderr 2", "stderr 4", "stderr 6"]);
        }
        assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), 2);
    }
}

#[tokio::test]
async fn logs_of_zeros_or_with_other_lines_end_every_stream_and_show_what_is_missing() {
    let (folder, of_run) = finished_run("x");
    let log = of_run.join("stdout.log");
    let sound = fs::read(&log).unwrap();
    let damages: [(&str, Vec<u8>); 4] = [
        ("zeros", vec![0; sound.len()]),
        ("more ends of lines", vec![b'\n'; sound.len()]),
        ("shorter", sound[..4].to_vec()),
        ("empty", Vec::new()),
    ];
    for (what, bytes) in damages {
        fs::write(&log, bytes).unwrap();
        let store = other_process(folder.path());
        for view in VIEWS {
            let (_, end) = read(&store, "x", followed(view)).await;
            assert!(matches!(end, ReadEnd::Complete(_)), "{what} {view}");
        }
        let (seen, _) = read(&store, "x", followed(View::All)).await;
        let stderr: Vec<_> =
            seen.iter().filter(|line| line.stream == Stream::Stderr).map(|line| line.position).collect();
        assert_eq!(stderr, [2, 4, 6], "the other stream's lines keep their places: {what}");
        // Whoever resumes gets what the others get.
        for (index, before) in seen.iter().enumerate() {
            let start = Start::After(LineNumber(before.position));
            let (rest, _) = read(&store, "x", ReadOptions { start, ..followed(View::All) }).await;
            assert_eq!(rest, seen[index + 1..], "{what} after {}", before.position);
        }
    }
    fs::remove_file(&log).unwrap();
    for view in VIEWS {
        let (_, end) = read(&other_process(folder.path()), "x", followed(view)).await;
        assert!(matches!(end, ReadEnd::Complete(_)), "{view}");
    }
}

/// A journal record with its frame, as the format's page has it.
fn record(body: &[u8], offset: u64) -> Vec<u8> {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&offset.to_le_bytes());
    crc.update(body);
    let mut bytes = vec![u8::try_from(body.len()).unwrap()];
    bytes.extend_from_slice(&crc.finalize().to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A run of three lines, a hole of four and three more, and one line of standard error on either side of the hole.
fn run_with_a_hole(folder: &Path) {
    let store = other_process(folder);
    let mut writer = store.start(RunSpec::new(id("hole"))).unwrap();
    writer.append(Stream::Stdout, b"1\n2\n3\n").unwrap();
    writer.flush().unwrap();
    writer.append(Stream::Stderr, b"a\n").unwrap();
    writer.flush().unwrap();
    let live = folder.join("job_runs/hole");
    let crashed = folder.join("crashed/job_runs/hole");
    copy_folder(&live, &crashed);
    writer.finish(success()).unwrap();
    let mut journal = fs::read(crashed.join("journal")).unwrap();
    for body in [&[3, 9, 4, 40, 1][..], &[0x12, 9, 1, 2], &[2, 9, 3, 7]] {
        let bytes = record(body, journal.len() as u64);
        journal.extend_from_slice(&bytes);
    }
    fs::write(crashed.join("journal"), journal).unwrap();
    fs::write(crashed.join("stdout.log"), "1\n2\n3\n8\n9\n10\n").unwrap();
    fs::write(crashed.join("stderr.log"), "a\nb\n").unwrap();
}

#[tokio::test]
async fn a_read_that_begins_within_a_hole_numbers_what_follows_as_any_other() {
    let folder = tempfile::tempdir().unwrap();
    run_with_a_hole(folder.path());
    let crashed = folder.path().join("crashed");
    let stores: [Arc<dyn LogStore>; 2] = [Arc::new(other_process(&crashed)), Arc::new(service(&crashed))];
    for store in &stores {
        for (view, total) in [(View::STDOUT, 10), (View::All, 12)] {
            let (all, _) = read(&**store, "hole", followed(view)).await;
            let shown = texts(&all);
            match view {
                View::All => assert_eq!(shown, ["1", "2", "3", "a", "(gap)", "b", "8", "9", "10"]),
                _ => assert_eq!(shown, ["1", "2", "3", "(gap)", "8", "9", "10"]),
            }
            assert_eq!(all.last().unwrap().position, total);
            for after in 0..=total {
                let start = Start::After(LineNumber(after));
                let (rest, _) = read(&**store, "hole", ReadOptions { start, ..followed(view) }).await;
                let expected: Vec<_> = all.iter().filter(|seen| seen.position > after).cloned().collect();
                assert_eq!(rest, expected, "{view} after {after}");
            }
        }
    }
}

#[tokio::test]
async fn the_time_of_an_unterminated_last_line_is_the_end_of_the_run_wherever_it_is_read_from() {
    let folder = tempfile::tempdir().unwrap();
    let store = service(folder.path());
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    writer.append(Stream::Stdout, b"one\ntwo").unwrap();
    let ended_at = UnixMicros(UnixMicros::now().0 + 60_000_000);
    writer.finish(RunEnd { ended_at, ..success() }).unwrap();
    let check = async |store: &dyn LogStore, what: &str| {
        let times = ReadOptions { times: true, ..ReadOptions::new(View::STDOUT) };
        let mut events = store.read(&id("x"), times).unwrap();
        let mut last = None;
        while let Some(event) = events.next().await {
            if let ReadEvent::Lines(batch) = event.unwrap() {
                last = batch.lines().last().and_then(|line| line.time);
            }
        }
        assert_eq!(last, Some(ended_at), "{what}");
        for (since, expected) in [(ended_at, vec!["two"]), (UnixMicros(ended_at.0 + 1), vec![])] {
            let start = Start::Since(since);
            let (seen, _) = read(store, "x", ReadOptions { start, ..ReadOptions::new(View::All) }).await;
            assert_eq!(texts(&seen), expected, "{what}");
        }
    };
    check(&store, "from memory").await;
    store.close().unwrap();
    drop(store);
    check(&other_process(folder.path()), "from the folder").await;
    check(&service(folder.path()), "from the index").await;
}

#[tokio::test]
async fn a_log_that_is_made_after_its_reader_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let of_run = folder.path().join("job_runs/x");
    fs::create_dir_all(&of_run).unwrap();
    let store = service(folder.path());
    let mut reader = store.read(&id("x"), followed(View::STDOUT)).unwrap();
    assert!(reader.next().now_or_never().is_none(), "there is nothing yet");
    fs::write(of_run.join("stdout.log"), "one\ntwo\n").unwrap();
    let first = in_time(reader.next()).await;
    let Some(Ok(ReadEvent::Lines(batch))) = first else { panic!("{first:?}") };
    assert_eq!(batch.first_line, LineNumber(1));
}

#[tokio::test]
async fn an_index_that_is_ahead_of_the_files_leads_nobody_astray() {
    let folder = tempfile::tempdir().unwrap();
    let store = service(folder.path());
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    for n in 0..3_000 {
        let stream = if n % 3 == 0 { Stream::Stderr } else { Stream::Stdout };
        writer.append(stream, format!("{n}\n").as_bytes()).unwrap();
        writer.flush().unwrap();
    }
    store.close().unwrap();
    let crashed = folder.path().join("crashed");
    copy_folder(&folder.path().join("job_runs/x"), &crashed.join("job_runs/x"));
    fs::copy(folder.path().join("index.redb"), crashed.join("index.redb")).unwrap();
    let journal = fs::OpenOptions::new().write(true).open(crashed.join("job_runs/x/journal")).unwrap();
    journal.set_len(journal.metadata().unwrap().len() / 2).unwrap();
    writer.finish(success()).unwrap();
    service(&crashed).close().unwrap();
    let store = service(&crashed);
    let (all, end) = read(&store, "x", followed(View::All)).await;
    assert!(matches!(end, ReadEnd::Complete(_)));
    assert_eq!(all.len(), 3_000);
    for after in (0..3_000).step_by(97) {
        let start = Start::After(LineNumber(after));
        let options = ReadOptions { start, limit: Some(3), ..followed(View::All) };
        let (some, _) = read(&store, "x", options).await;
        assert_eq!(some, all[after as usize..(after as usize + 3).min(3_000)], "after {after}");
    }
}

/// What is written between a look at a run's folder and the moment from which its events are heard is not slept
/// through.
#[tokio::test]
async fn a_line_of_a_hundred_megabytes_is_cut_and_its_neighbours_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = service(folder.path());
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..100 {
        writer.append(Stream::Stdout, &piece).unwrap();
    }
    writer.append(Stream::Stdout, b"\nafter\n").unwrap();
    for view in [View::STDOUT, View::All] {
        let mut events = store.read(&id("x"), ReadOptions::new(view)).unwrap();
        let Some(Ok(ReadEvent::Lines(cut))) = events.next().await else { panic!("no line") };
        assert_eq!(cut.cut.map(|cut| cut.full_bytes), Some(100 << 20));
        assert_eq!(cut.bytes.len(), Batch::MAX_LINE_BYTES);
        let Some(Ok(ReadEvent::Lines(next))) = events.next().await else { panic!("no line") };
        assert_eq!((next.first_line.0, &next.bytes[..]), (2, &b"after\n"[..]));
    }
    writer.finish(success()).unwrap();
}

#[test]
fn a_torn_record_is_not_there_yet_and_is_cut_off_when_its_writer_is_gone() {
    let (_guard, of_run) = finished_run("x");
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("job_runs/x");
    copy_folder(&of_run, &run);
    fs::remove_file(run.join("metadata.json")).unwrap();
    let journal = fs::read(run.join("journal")).unwrap();
    fs::write(run.join("journal"), &journal[..journal.len() - 1]).unwrap();
    let store = service(folder.path());
    wait_until("its writer is missed", || store.run(&id("x")).unwrap().state.kind() == StateKind::Lost);
    let lost = store.run(&id("x")).unwrap();
    assert_eq!((lost.state.kind(), lost.stdout.lines, lost.stderr.lines), (StateKind::Lost, 4, 3));
    let mut log = fs::OpenOptions::new().append(true).open(run.join("stdout.log")).unwrap();
    log.write_all(b" but more\n").unwrap();
    assert_eq!(store.run(&id("x")).unwrap(), lost, "a run that is over stays as it was");
}
