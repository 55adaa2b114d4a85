//! What a power cut may take, and what it may not: its traces are made by hand, in the files that it would leave.

mod replay;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use databuild_logs::{
    ByteOffset, Durability, Exit, FileLogStore, FileStoreOptions, GapReason, JobRunId, LogStore, Outcome,
    ReadEnd, ReadEvent, ReadOptions, RunEnd, RunSpec, StateKind, Stream, View,
};
use futures_util::StreamExt;

use crate::crash::{databuild, metadata};
use crate::support::cli::Databuild;
use crate::support::copy_folder;

/// What a power cut makes of the end of a file.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// It is shorter.
    Short,
    /// It is as long as it was, and the rest of it is zeros.
    Zeros,
}

impl Cut {
    fn apply(self, path: &Path, at: u64) {
        let file = fs::File::options().write(true).open(path).unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(at).unwrap();
        if matches!(self, Self::Zeros) {
            file.set_len(length).unwrap();
        }
    }
}

/// Makes files and folder look as if they were written before the machine was started.
pub(crate) fn make_old(folder: &Path) {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    for path in entries.chain([folder.to_owned()]) {
        let file = fs::File::open(path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    }
}

/// Batches that a run of the power-cut tests appends: whole lines, halves of lines, and a log behind its last mark.
const BATCHES: [&str; 6] = ["a1\na2\n", "a3\na", "4\n", "a5\na6\na7\na8\n", "a9\nhal", "f is all\n"];

/// Writes a run and gives where its log and its journal stood after each batch. It never ends: its writer holds no
/// lock in the copy that is made of its files.
fn write_half_a_run(from: &FileLogStore, id: &JobRunId, folder: &Path) -> Vec<(u64, u64)> {
    let mut writer = from.start(RunSpec::new(id.clone()).command(["make"])).unwrap();
    let length = |name: &str| fs::metadata(folder.join(name)).unwrap().len();
    let mut points = vec![(0, length("journal"))];
    for batch in BATCHES {
        writer.append(Stream::Stdout, batch.as_bytes()).unwrap();
        writer.flush().unwrap();
        points.push((length("stdout.log"), length("journal")));
    }
    std::mem::forget(writer);
    points
}

/// Whatever a power cut leaves of the log and of the journal, each on its own: what is told of the run is true. Lines
/// are those that were written, each under its number, and what is missing is said to be.
#[tokio::test]
async fn after_a_power_cut_an_unfinished_run_is_lost_with_whole_lines_and_honest_gaps() {
    let home = tempfile::tempdir().unwrap();
    let written = home.path().join("written");
    // Hundreds of runs, none of which has to survive this test.
    let unsynced = FileStoreOptions { durability: Durability::None, ..FileStoreOptions::default() };
    let writing = FileLogStore::open_folder(&written, unsynced.clone()).unwrap();
    let cut_store = home.path().join("cut");
    let mut cases = Vec::new();
    for n in 0.. {
        let id: JobRunId = format!("r{n}").parse().unwrap();
        let folder = written.join("job_runs").join(id.as_str());
        let points = write_half_a_run(&writing, &id, &folder);
        // Every place where a batch ended, and some within.
        let log_cuts: Vec<u64> = points.iter().map(|point| point.0).chain([4, 16]).collect();
        let within_record = points[2].1 + 3;
        let journal_cuts: Vec<u64> = points.iter().map(|point| point.1).chain([within_record]).collect();
        let count = 4 * log_cuts.len() * journal_cuts.len();
        if n == count {
            break;
        }
        let (cut_log, cut_journal) = [
            (Cut::Short, Cut::Short),
            (Cut::Short, Cut::Zeros),
            (Cut::Zeros, Cut::Short),
            (Cut::Zeros, Cut::Zeros),
        ][n % 4];
        let (log_at, journal_at) = (log_cuts[n / 4 % log_cuts.len()], journal_cuts[n / 4 / log_cuts.len()]);
        let (log_end, journal_end) = *points.last().unwrap();
        let copy = cut_store.join("job_runs").join(id.as_str());
        copy_folder(&folder, &copy);
        cut_log.apply(&copy.join("stdout.log"), log_at.min(log_end));
        cut_journal.apply(&copy.join("journal"), journal_at.min(journal_end));
        make_old(&copy);
        let marked = points.iter().rev().find(|point| point.1 <= journal_at).unwrap().0;
        cases.push((id, (cut_log, log_at.min(log_end)), (cut_journal, journal_at), marked));
    }
    let store = FileLogStore::open(&cut_store, unsynced).unwrap();
    let text = BATCHES.concat();
    let expected: Vec<_> = text.lines().collect();
    for (id, log, journal, marked) in cases {
        let what = format!("{id}: log {log:?}, journal {journal:?}");
        let survived = &text[..usize::try_from(log.1).unwrap()];
        let mut events =
            store.read(&id, ReadOptions { follow: true, ..ReadOptions::new(View::STDOUT) }).unwrap();
        let (mut at, mut given, mut lost) = (0, 0, 0);
        let end = loop {
            match events.next().await.unwrap().unwrap() {
                ReadEvent::Lines(batch) => {
                    for line in batch.lines() {
                        (at, given) = (at + 1, given + 1);
                        assert_eq!(line.number.0, at, "{what}");
                        let expected = expected[at as usize - 1].as_bytes();
                        let is_last = given >= survived.lines().count() as u64;
                        assert!(
                            line.text == expected || (is_last && expected.starts_with(line.text)),
                            "{what}: line {at} is {:?}",
                            String::from_utf8_lossy(line.text)
                        );
                    }
                }
                ReadEvent::Gap { gap, .. } => {
                    assert_eq!((gap.after.0, gap.reason), (at, GapReason::Corrupt), "{what}");
                    at += gap.lines;
                    lost += gap.lines;
                }
                ReadEvent::End(ReadEnd::Complete(end)) => break *end,
                ReadEvent::End(end) => panic!("{what}: {end:?}"),
            }
        };
        assert_eq!(end.state.kind(), StateKind::Lost, "{what}");
        assert_eq!(end.spec.command, ["make"], "{what}");
        assert_eq!(end.stdout.lines, at, "{what}");
        assert_eq!(end.stdout.dropped_lines, lost, "{what}");
        // Nothing that survived is kept back, but for the beginning of a line that is cut.
        assert!(given >= survived.matches('\n').count() as u64, "{what}: {given} lines");
        let missing = marked > log.1 || (matches!(log.0, Cut::Zeros) && log.1 < text.len() as u64);
        assert_eq!(lost > 0, missing, "{what}: {lost} lines are said to be missing");
        assert_eq!(metadata(&cut_store.join("job_runs").join(id.as_str())), end, "{what}");
    }
}

/// A machine that was shut down in an orderly way while a run went on took nothing of it, also of one that prints sectors
/// of zeros, as a tape archive has them.
#[tokio::test]
async fn zeros_that_a_job_printed_are_kept_and_those_of_one_that_prints_text_are_not() {
    let home = tempfile::tempdir().unwrap();
    let [written, kept] = ["written", "kept"].map(|name| home.path().join(name));
    let writing = FileLogStore::open_folder(&written, FileStoreOptions::default()).unwrap();
    let long = [b'x'; 2000];
    let zeros = [0; 2000];
    for (name, first, second) in
        [("binary", &b"ab\0cd\n"[..], &zeros[..]), ("text", b"text\n", &zeros), ("whole", b"text\n", &long)]
    {
        let id: JobRunId = name.parse().unwrap();
        let mut writer = writing.start(RunSpec::new(id)).unwrap();
        for bytes in [first, second, b"\nlast\n"] {
            writer.append(Stream::Stdout, bytes).unwrap();
            writer.flush().unwrap();
        }
        copy_folder(&written.join("job_runs").join(name), &kept.join("job_runs").join(name));
        make_old(&kept.join("job_runs").join(name));
    }
    let store = FileLogStore::open(&kept, FileStoreOptions::default()).unwrap();
    let mut lost = Vec::new();
    for name in ["binary", "text", "whole"] {
        let run = store.run(&name.parse().unwrap()).unwrap();
        assert_eq!((run.state.kind(), run.stdout.lines), (StateKind::Lost, 3));
        lost.push(run.stdout.dropped_lines);
    }
    assert_eq!(lost, [0, 2, 0]);
}

/// What was acknowledged stays, whatever becomes of the runs beside it and of the index.
#[tokio::test]
async fn after_a_power_cut_a_run_that_had_ended_is_what_it_was() {
    let home = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(home.path(), FileStoreOptions::default()).unwrap();
    let id: JobRunId = "done".parse().unwrap();
    let mut writer = store.start(RunSpec::new(id.clone())).unwrap();
    // Zeros of the job's own are no sign of a power cut.
    writer.append(Stream::Stdout, b"one\n\0\0\0\ntwo\0\0").unwrap();
    let acknowledged = writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    drop(store);
    let folder = home.path().join("job_runs/done");
    make_old(&folder);
    fs::remove_file(home.path().join("index.redb")).unwrap();
    // Of a run that had just begun there is a folder, and nothing in it that was synced.
    let begun = home.path().join("job_runs/begun");
    fs::create_dir(&begun).unwrap();
    for name in ["stdout.log", "stderr.log"] {
        fs::write(begun.join(name), "").unwrap();
    }
    fs::write(begun.join("journal"), [0; 300]).unwrap();
    make_old(&begun);
    let store = FileLogStore::open(home.path(), FileStoreOptions::default()).unwrap();
    assert_eq!(store.run(&id).unwrap(), acknowledged);
    assert_eq!(acknowledged.stdout.bytes, 13);
    let length = usize::try_from(acknowledged.stdout.bytes).unwrap();
    let bytes = store.read_bytes(&id, Stream::Stdout, ByteOffset(0), length).unwrap();
    assert_eq!(bytes, &b"one\n\0\0\0\ntwo\0\0"[..]);
    assert_eq!(store.run(&"begun".parse().unwrap()).unwrap().state.kind(), StateKind::Lost);
    assert_eq!(metadata(&begun).state.kind(), StateKind::Lost);
}

/// The names of durability promise what the calls to the system keep.
#[test]
fn each_durability_syncs_what_its_name_says_and_no_more() {
    let syncs = |durability: &str| {
        let databuild = databuild().with("DATABUILD_LOG_DURABILITY", durability);
        let trace = databuild.home.path().join("trace");
        // Long enough for a sync, and where one has to come, until it has come.
        let pause = |syncs: u32| {
            let synced = |file: &str| {
                format!(r#"[ "$(grep -c 'sync(.*/r/{file}>' {})" -ge {syncs} ]"#, trace.display())
            };
            let is_synced = format!("{} && {}", synced("stdout.log"), synced("journal"));
            let wait = format!("for i in $(seq 200); do {is_synced} && break; sleep 0.1; done");
            format!("sleep 2.5; {}", if durability == "1" { wait } else { ":".to_owned() })
        };
        let script = format!("echo one; {}; echo two; {}; echo three", pause(1), pause(2));
        let options = ["-y", "-e", "trace=fsync,fdatasync,rename"];
        let args = ["run", "--quiet", "--id", "r", "--", "sh", "-c", &script];
        databuild.start_traced(&trace, &options, &args).done().code(0);
        let calls = fs::read_to_string(trace).unwrap();
        let (before_end, end) = calls.split_once("rename(").unwrap();
        let count = |text: &str, file: &str| {
            text.lines().filter(|call| call.contains("sync(") && call.contains(&format!("{file}>"))).count()
        };
        (count(before_end, "/r/stdout.log"), count(before_end, "/r/journal"), count(end, "/r"))
    };
    thread::scope(|scope| {
        let [none, on_finish, periodic] =
            ["none", "on-finish", "1"].map(|durability| scope.spawn(move || syncs(durability)));
        assert_eq!(none.join().unwrap(), (0, 0, 0));
        assert_eq!(on_finish.join().unwrap(), (1, 1, 1));
        let (log, journal, folder) = periodic.join().unwrap();
        assert!(
            (3..=4).contains(&log) && (3..=4).contains(&journal) && folder == 1,
            "{log}, {journal}, {folder}"
        );
    });
}
