//! A disk that is full, or refuses a write: the job goes on, what is lost is counted and shown where it is missing, and
//! writing goes on when there is room again. File systems here are real ones that are filled to the brim, and the
//! system's calls are made to fail one after the other. Needs root, to mount, and `strace`.

mod index;
mod recovery;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use databuild_logs::{
    Client, ClientEnd, ClientEvent, Completion, Exit, FileLogStore, FileStoreOptions, Gap, GapReason,
    GcReport, JobMetadata, LogError, LogQuery, LogStore, Outcome, ReadEnd, ReadEvent, ReadOptions, RunEnd,
    RunSpec, RunState, StateKind, Stream, View,
};
use futures_util::StreamExt;

use crate::support::cli::{Databuild, Done, Running, until};
use crate::support::disk::SmallDisk;

fn no_floor() -> Databuild {
    Databuild::new().with("DATABUILD_LOG_MIN_FREE_MB", "0")
}

fn open(databuild: &Databuild) -> FileLogStore {
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    FileLogStore::open(databuild.home.path().join("logs"), options).unwrap()
}

fn run_folder(databuild: &Databuild, id: &str) -> PathBuf {
    databuild.home.path().join("logs/job_runs").join(id)
}

fn metadata(folder: &Path) -> JobMetadata {
    serde_json::from_slice(&fs::read(folder.join("metadata.json")).unwrap()).unwrap()
}

fn line(number: u64) -> String {
    format!("this is line number {number} of the job\n")
}

/// What a reader was given of one stream: lines by their numbers, and the holes between them.
#[derive(Debug, Default, PartialEq)]
struct Given {
    lines: BTreeMap<u64, String>,
    gaps: Vec<Gap>,
    /// The number of the last line given or missing.
    at: u64,
}

impl Given {
    fn line(&mut self, number: u64, text: &[u8]) {
        self.at += 1;
        assert_eq!(number, self.at, "a line was lost without a word, or repeated");
        self.lines.insert(number, String::from_utf8(text.to_vec()).unwrap());
    }

    fn gap(&mut self, gap: Gap) {
        assert_eq!(gap.after.0, self.at, "a hole is where its lines are missing");
        self.at += gap.lines;
        self.gaps.push(gap);
    }

    fn lost(&self) -> (u64, u64) {
        (self.gaps.iter().map(|gap| gap.bytes).sum(), self.gaps.iter().map(|gap| gap.lines).sum())
    }

    /// Checks that this is what a job printed that printed `total` numbered lines, but for the holes.
    fn check_numbered(&self, total: u64) {
        assert_eq!(self.at, total);
        assert!(self.lines.iter().all(|(number, text)| *text == line(*number).trim_end()));
        let missing: u64 =
            (1..=total).filter(|n| !self.lines.contains_key(n)).map(|n| line(n).len() as u64).sum();
        assert_eq!(self.lost().0, missing, "bytes of the lines that are missing");
        assert!(self.gaps.iter().all(|gap| gap.reason == GapReason::DiskFull), "{:?}", self.gaps);
    }
}

/// Reads one stream to its end from a store.
async fn read(store: &FileLogStore, id: &str, stream: Stream) -> (Given, JobMetadata) {
    let options = ReadOptions { follow: true, ..ReadOptions::new(View::One(stream)) };
    let mut events = store.read(&id.parse().unwrap(), options).unwrap();
    let mut given = Given::default();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => {
                batch.lines().for_each(|line| given.line(line.number.0, line.text));
            }
            ReadEvent::Gap { gap, .. } => given.gap(gap),
            ReadEvent::End(ReadEnd::Complete(run)) => return (given, *run),
            ReadEvent::End(end) => panic!("{end:?}"),
        }
    }
    panic!("no end");
}

/// The same through a service, while the run goes on.
async fn follow(client: Client, id: &'static str) -> (Given, Completion) {
    let query = LogQuery { follow: true, ..LogQuery::new(View::STDOUT) };
    let mut events = client.read(&id.parse().unwrap(), query);
    let mut given = Given::default();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ClientEvent::Lines(batch) => {
                batch.lines().for_each(|line| given.line(line.number.0, line.text));
            }
            ClientEvent::Gap(notice) => {
                let after = databuild_logs::LineNumber(notice.from.0 - 1);
                let (lines, bytes, reason) = (notice.lines, notice.bytes, notice.reason);
                given.gap(Gap { stream: Stream::Stdout, after, lines, bytes, reason });
            }
            ClientEvent::Reconnecting { why, .. } => panic!("{why}"),
            ClientEvent::End(ClientEnd::Complete(end)) => return (given, end),
            ClientEvent::End(end) => panic!("{end:?}"),
        }
    }
    panic!("no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_a_full_disk_and_is_recorded_again_when_there_is_room() {
    let databuild = no_floor();
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 16);
    let (service, url) = databuild.serve();
    let (job, mut input) =
        databuild.start_with_input(&["run", "--quiet", "--id", "r", "--", "sh", "-c", "cat; exit 5"]);
    let log = run_folder(&databuild, "r").join("stdout.log");
    until(|| log.exists(), || "the run does not begin".to_owned());
    let follower = tokio::spawn(follow(Client::new(&url, None).unwrap(), "r"));
    let mut printed = 0;
    let mut print = |count: u64| {
        for _ in 0..count {
            printed += 1;
            input.write_all(line(printed).as_bytes()).unwrap();
        }
        printed
    };
    let length = || fs::metadata(&log).unwrap().len();
    print(1_000);
    until(|| length() >= 30_000, || "nothing is recorded".to_owned());
    // Three times the disk fills up in the midst of the output, and there is room again.
    for _ in 0..3 {
        disk.fill();
        print(20_000);
        let full = length();
        print(5_000);
        disk.make_room();
        let resumed = Instant::now();
        while length() <= full {
            assert!(resumed.elapsed() < Duration::from_secs(30), "writing does not go on");
            print(10);
            thread::sleep(Duration::from_millis(5));
        }
    }
    let printed = print(100);
    drop(input);
    job.done().code(5);
    let (followed, end) = tokio::time::timeout(Duration::from_secs(60), follower).await.unwrap().unwrap();
    followed.check_numbered(printed);
    assert!(followed.gaps.len() >= 3, "{:?}", followed.gaps);
    assert_eq!((end.exit_code, end.lines, end.dropped_bytes), (Some(5), printed, followed.lost().0));
    drop(service);
    // It is the same run to whoever reads it later, from nothing but its files.
    drop(fs::remove_file(disk.at.join("index.redb")));
    let (read_again, run) = read(&open(&databuild), "r", Stream::Stdout).await;
    assert_eq!(read_again.lines, followed.lines);
    assert_eq!(read_again.gaps, followed.gaps);
    assert_eq!((run.stdout.dropped_bytes, run.stdout.dropped_lines), followed.lost());
    assert_eq!(run, metadata(&run_folder(&databuild, "r")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_run_finds_room_on_a_disk_without_any() {
    let databuild = no_floor();
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 8);
    let jobs: Vec<_> = ["a", "b", "c"]
        .map(|id| {
            let args = ["run", "--quiet", "--id", id, "--", "sh", "-c", "cat; exit 3"];
            let (job, input) = databuild.start_with_input(&args);
            (id, input, job)
        })
        .into();
    until(
        || ["a", "b", "c"].iter().all(|id| run_folder(&databuild, id).exists()),
        || "the runs do not begin".to_owned(),
    );
    disk.fill();
    let mut printed = 0;
    let mut ended = Vec::new();
    for (id, mut input, job) in jobs {
        // In pieces, so that there is something to say of many of them.
        for number in 1..=3_000 {
            input.write_all(line(number).as_bytes()).unwrap();
            printed = number;
        }
        disk.fill();
        drop(input);
        job.done().code(3);
        // Nothing of what was kept for this end is left to the next.
        disk.fill();
        ended.push(id);
    }
    assert_eq!(disk.free(), 0);
    for id in &ended {
        let folder = run_folder(&databuild, id);
        let run = metadata(&folder);
        assert!(matches!(run.state, RunState::Failed { exit: Exit::Code(3), .. }), "{run:?}");
        assert_eq!(run.stdout.lines, printed, "{id}");
        assert!(run.stdout.dropped_lines > 0, "{id}");
        let mut names: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["journal", "metadata.json", "stderr.log", "stdout.log"]);
        let journal = fs::metadata(folder.join("journal")).unwrap();
        assert!(journal.blocks() * 512 < journal.len() + 4096, "room is given back: {journal:?}");
    }
    disk.make_room();
    let store = open(&databuild);
    for id in ended {
        let (given, run) = read(&store, id, Stream::Stdout).await;
        given.check_numbered(printed);
        assert_eq!((run.stdout.dropped_bytes, run.stdout.dropped_lines), given.lost());
        assert_eq!(run, metadata(&run_folder(&databuild, id)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_prints_without_end_leaves_the_machine_its_floor_of_free_space() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MIN_FREE_MB", "24");
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 64);
    let script = "yes this line is printed over and over again | head -n 3000000; exit 9";
    databuild.run(&["run", "--quiet", "--id", "r", "--", "sh", "-c", script]).code(9);
    let free = disk.free();
    // It is looked at every 4 MiB; what was kept for the end of the run is free again.
    assert!((18 << 20..=25 << 20).contains(&free), "{free} bytes are free");
    let (given, run) = read(&open(&databuild), "r", Stream::Stdout).await;
    assert_eq!((given.at, run.stdout.lines), (3_000_000, 3_000_000));
    assert_eq!((run.stdout.dropped_bytes, run.stdout.dropped_lines), given.lost());
    assert!(given.lines.values().all(|text| text == "this line is printed over and over again"));
    assert!(given.gaps.iter().all(|gap| gap.reason == GapReason::DiskFull), "{:?}", given.gaps);
    // Without the floor the disk is all of it.
    let script = "yes this line is printed over and over again | head -n 3000000; exit 9";
    let other = no_floor();
    let logs = databuild.home.path().join("logs");
    other
        .run(&["run", "--quiet", "--id", "s", "--log-dir", logs.to_str().unwrap(), "--", "sh", "-c", script])
        .code(9);
    assert!(disk.free() < 1 << 20, "{} bytes are free", disk.free());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_the_size_of_files_ends_the_recording_and_not_the_job() {
    let databuild = no_floor();
    // The limit is in blocks of 512 bytes.
    let limited = r#"ulimit -f 400; exec "$0" "$@""#;
    let job =
        "n=0; while [ $n -lt 9000 ]; do n=$((n+1)); echo this is line number $n of the job; done; exit 6";
    let args = ["run", "--id", "r", "--", "sh", "-c", job];
    let done = databuild.start_by("sh", &["-c", limited], &args).done().code(6);
    assert_eq!(done.text(), (1..=9_000).map(line).collect::<String>());
    let (given, run) = read(&open(&databuild), "r", Stream::Stdout).await;
    given.check_numbered(9_000);
    assert!(!given.gaps.is_empty());
    assert!(matches!(run.state, RunState::Failed { exit: Exit::Code(6), .. }), "{run:?}");
}

/// What the job of the next tests prints, in pieces that come one after the other.
const SCRIPT: &str =
    r"printf 'one\ntwo\nhal'; sleep 0.02; printf 'f\nfour\n'; echo oops >&2; sleep 0.02; echo five; exit 7";
const OUT: &str = "one\ntwo\nhalf\nfour\nfive\n";

/// Records a job while the system lets a call fail; what came of it, and whether the call was made at all.
fn record_with(databuild: &Databuild, id: &str, script: &str, filter: &[&str], inject: &str) -> (Done, bool) {
    let files: Vec<_> = filter.iter().map(|name| run_folder(databuild, id).join(name)).collect();
    databuild.run_injected(inject, &files, &["run", "--id", id, "--", "sh", "-c", script])
}

/// Checks what a reader is given against what the job printed.
fn check_lines(given: &Given, printed: &str, what: &str) {
    let expected: Vec<_> = printed.lines().collect();
    for (number, text) in &given.lines {
        assert_eq!(text, expected[usize::try_from(*number).unwrap() - 1], "{what}: line {number}");
    }
}

/// Every call that writes to a run's files fails, one at a time and all from some time on, with both errors.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_call_the_disk_refuses_the_job_and_its_output_are_unhurt() {
    // How much room is left is asked only where some of it is left to others.
    let databuild = Databuild::new().with("DATABUILD_LOG_MIN_FREE_MB", "1");
    // The files of the run, its folder, and the folder above.
    let files = ["stdout.log", "stderr.log", "journal", ".metadata.json.new", "metadata.json", "", ".."];
    let long: String = (1..=60_000).map(|number| format!("{number}\n")).collect();
    let mut runs = Vec::new();
    let calls =
        ["write", "ftruncate", "fdatasync", "fsync", "rename", "openat", "statx", "fallocate", "fstatfs"];
    for call in calls {
        let (script, printed, before) = match call {
            // Room is asked for where a hole ends: behind it comes more than is read at once.
            "fallocate" => ("seq 60000; echo oops >&2; exit 7", &*long, "write:error=ENOSPC:when=1 "),
            _ => (SCRIPT, OUT, ""),
        };
        for (error, from_then_on) in [("ENOSPC", ""), ("EIO", ""), ("ENOSPC", "+")] {
            for n in 1.. {
                assert!(n < 60, "{call} has no end");
                let id = format!("{call}-{error}-{n}{}", if from_then_on.is_empty() { "" } else { "-on" });
                let inject = format!("{before}{call}:error={error}:when={n}{from_then_on}");
                let (done, injected) = record_with(&databuild, &id, script, &files, &inject);
                let done = done.code(7).says("oops");
                assert!(done.text() == printed, "{id}");
                runs.push((id, printed, !from_then_on.is_empty()));
                if !injected {
                    assert!(n > 1, "{call} is never called");
                    break;
                }
            }
        }
    }
    let store = open(&databuild);
    for (id, printed, from_then_on) in runs {
        let (out, run) = read(&store, &id, Stream::Stdout).await;
        let (err, _) = read(&store, &id, Stream::Stderr).await;
        check_lines(&out, printed, &id);
        check_lines(&err, "oops\n", &id);
        match run.state {
            RunState::Failed { exit: Exit::Code(7), .. } => {
                let lines = printed.lines().count() as u64;
                assert_eq!((out.at, err.at), (lines, 1), "{id}: every line is there or counted");
                assert_eq!((run.stdout.dropped_bytes, run.stdout.dropped_lines), out.lost(), "{id}");
                assert_eq!((run.stderr.dropped_bytes, run.stderr.dropped_lines), err.lost(), "{id}");
                let kept: u64 = out.lines.values().map(|text| text.len() as u64 + 1).sum();
                assert_eq!(kept + out.lost().0, printed.len() as u64, "{id}");
                // A disk that does not say how much room it has is not full.
                assert!(!id.starts_with("fstatfs") || out.lost() == (0, 0), "{id}");
            }
            // Only a disk that took no word of the end leaves it unknown.
            RunState::Lost { .. } if from_then_on => {}
            other => panic!("{id}: {other:?}"),
        }
        let folder = run_folder(&databuild, &id);
        until(|| folder.join("metadata.json").exists(), || format!("{id} gets no metadata.json"));
        assert_eq!(metadata(&folder), run, "{id}");
    }
}

/// What fails before the job is there ends in a clear refusal: the job is executed as a whole or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_begun_is_refused_before_its_job_is_executed() {
    let databuild = no_floor();
    let (mut refused, mut recorded) = (0, 0);
    for call in ["mkdir", "renameat2", "flock", "fallocate"] {
        for error in ["ENOSPC", "EIO"] {
            for n in 1.. {
                let id = format!("{call}-{error}-{n}");
                let inject = format!("{call}:error={error}:when={n}");
                let (done, injected) = record_with(&databuild, &id, SCRIPT, &[], &inject);
                if done.code == Some(7) {
                    assert_eq!(done.text(), OUT, "{id}");
                    recorded += 1;
                } else {
                    let done = done.code(125).says("databuild: ").says("job_runs");
                    assert_eq!(done.text(), "", "{id}");
                    assert!(!run_folder(&databuild, &id).exists(), "{id}");
                    refused += 1;
                }
                if !injected {
                    break;
                }
            }
        }
    }
    assert!(refused >= 4 && recorded >= 8, "{refused} refused, {recorded} recorded");
    let store = open(&databuild);
    let runs = store.runs(&databuild_logs::RunQuery::default()).unwrap().runs;
    assert_eq!(runs.len(), recorded);
    assert!(runs.iter().all(|run| run.state.kind() == StateKind::Failed));
    let left: Vec<_> = fs::read_dir(databuild.home.path().join("logs/job_runs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A run whose writer was killed behind the end of its journal gets its `metadata.json` by the service, which takes as
/// long as the disk.
#[test]
fn while_a_disk_does_not_get_done_with_a_sync_the_run_is_read_and_others_go_on() {
    let databuild = no_floor();
    databuild.run(&["run", "--quiet", "--id", "r", "--", "echo", "one"]).code(0);
    let (folder, trace) = (run_folder(&databuild, "r"), databuild.home.path().join("trace"));
    fs::remove_file(folder.join("metadata.json")).unwrap();
    let unfinished = folder.join(".metadata.json.new");
    let delay = "inject=fsync,fdatasync:delay_enter=20000000";
    let hangs =
        ["--seccomp-bpf", "-e", "trace=fsync,fdatasync", "-e", delay, "-P", unfinished.to_str().unwrap()];
    let service = databuild.start_traced(&trace, &hangs, &["serve", "--listen", "127.0.0.1:0"]);
    let url = service.address().unwrap();
    let is_written = || fs::metadata(&unfinished).is_ok_and(|file| file.len() > 0);
    until(is_written, || "no metadata.json is written".to_owned());
    let asking = Databuild::asking(&url);
    assert_eq!(asking.run(&["logs", "r"]).code(0).text(), "one\n");
    // Asked for a run that is not there yet, the service would first get to know all folders, and so wait for this one.
    databuild.run(&["run", "--quiet", "--id", "s", "--", "echo", "two"]).code(0);
    assert_eq!(asking.run(&["logs", "--follow", "s"]).code(0).text(), "two\n");
    assert!(!folder.join("metadata.json").exists(), "the sync went on all the while");
    until(|| folder.join("metadata.json").exists(), || "it never gets done".to_owned());
}

/// Somebody empties a log because the disk is full, while lines of it are being lost.
#[tokio::test]
async fn a_log_that_is_emptied_while_the_disk_is_full_gives_no_line_the_number_of_another() {
    let databuild = no_floor();
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 16);
    let store = open(&databuild);
    let mut writer = store.start(RunSpec::new("r".parse().unwrap())).unwrap();
    let log = run_folder(&databuild, "r").join("stdout.log");
    let (mut printed, mut lost) = (0, 0);
    let mut print = |count: u64| {
        for _ in 0..count {
            printed += 1;
            lost += u64::from(writer.append(Stream::Stdout, line(printed).as_bytes()).is_err());
        }
        printed
    };
    print(4000);
    disk.fill();
    // The blocks that the log has may take some more.
    while fs::metadata(&log).unwrap().len() > print(1) * 30 {}
    print(100);
    fs::File::options().write(true).open(&log).unwrap().set_len(0).unwrap();
    disk.fill();
    print(100);
    disk.make_room();
    // Whether there is room again is tried after a while.
    thread::sleep(Duration::from_millis(200));
    let total = print(100);
    assert!(lost > 0, "the disk was not full");
    writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    for store in [&store, &FileLogStore::open_folder(&disk.at, FileStoreOptions::default()).unwrap()] {
        let (given, run) = read(store, "r", Stream::Stdout).await;
        assert_eq!(given.at, total);
        for (number, text) in &given.lines {
            assert_eq!(*text, line(*number).trim_end());
        }
        assert_eq!(given.lines.keys().copied().collect::<Vec<_>>(), (total - 99..=total).collect::<Vec<_>>());
        let missing: u64 = (1..=total - 100).map(|number| line(number).len() as u64).sum();
        assert_eq!((run.stdout.dropped_bytes, run.stdout.dropped_lines), (missing, total - 100));
        assert_eq!(given.lost(), (missing, total - 100), "{:?}", given.gaps);
    }
}
