//! What is left when the service or the writer of a run dies. Processes here are real ones, and `kill -9` is what ends
//! them.

mod moved;
mod told;

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use databuild_logs::{
    Client, ClientEnd, ClientEvent, Completion, Exit, FileLogStore, FileStoreOptions, JobMetadata, JobRunId,
    LogQuery, LogStore, ReadEnd, ReadEvent, ReadOptions, RunQuery, StateKind, View,
};
use futures_util::StreamExt;
use rustix::process::Signal;

use crate::power::make_old;
use crate::support::address::HeldAddress;
use crate::support::cli::{Databuild, Running, until};

/// How often a loop kills: a few dozen seconds by default; `DATABUILD_TEST_KILLS=5000` for a night.
fn kills() -> u64 {
    std::env::var("DATABUILD_TEST_KILLS").map_or(100, |count| count.parse().unwrap())
}

/// Numbers that differ from run to run. A test that fails says with which seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let seed = RandomState::new().hash_one(0);
        eprintln!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn sleep_up_to(&mut self, longest: Duration) {
        let micros = u64::try_from(longest.as_micros()).unwrap().max(1);
        thread::sleep(Duration::from_micros(self.below(micros)));
    }
}

pub(crate) fn databuild() -> Databuild {
    Databuild::new().with("DATABUILD_LOG_MIN_FREE_MB", "0")
}

fn serve(databuild: &Databuild, address: &HeldAddress) -> Running {
    let service = databuild.start(&["serve", "--listen", &address.to_string()]);
    service.wait_for("listening on http://");
    service
}

fn run_folder(databuild: &Databuild, id: &str) -> PathBuf {
    databuild.home.path().join("logs/job_runs").join(id)
}

/// The run's `metadata.json`. Followers hear of an end when the journal tells of it, which is a moment earlier.
pub(crate) fn metadata(folder: &Path) -> JobMetadata {
    until(|| folder.join("metadata.json").exists(), || format!("no metadata.json in {}", folder.display()));
    serde_json::from_slice(&fs::read(folder.join("metadata.json")).unwrap()).unwrap()
}

/// A job that prints the lines it is told to: `databuild run -- cat`, fed by a thread.
struct Job {
    process: Running,
    feeder: JoinHandle<u64>,
    enough: Arc<AtomicBool>,
}

impl Job {
    fn start(databuild: &Databuild, id: &str, mut random: Random) -> Self {
        let (process, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", id, "--", "cat"]);
        let enough = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&enough);
        let feeder = thread::spawn(move || {
            let mut lines = 0;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..random.below(40) {
                    lines += 1;
                    feed(&mut input, &line(lines), random.below(20) == 0);
                }
                random.sleep_up_to(Duration::from_millis(20));
            }
            lines
        });
        Self { process, feeder, enough }
    }

    /// Lets it come to its end; how many lines it printed.
    fn end(self) -> u64 {
        self.enough.store(true, Ordering::Relaxed);
        let lines = self.feeder.join().unwrap();
        self.process.done().code(0);
        lines
    }
}

/// Writes a line, sometimes in two pieces with a moment between them.
fn feed(input: &mut ChildStdin, line: &str, in_pieces: bool) {
    let (one, two) = line.split_at(if in_pieces { line.len() / 2 } else { 0 });
    if in_pieces {
        input.write_all(one.as_bytes()).unwrap();
        thread::sleep(Duration::from_millis(3));
    }
    input.write_all(two.as_bytes()).unwrap();
}

fn line(number: u64) -> String {
    format!("this is line number {number} of the job\n")
}

/// What a follower was given.
struct Followed {
    lines: u64,
    reconnects: u64,
    end: Completion,
}

/// Follows a run to its end over however many connections; every line is checked as it comes. Adds itself to `begun` with
/// the first of them.
async fn follow(client: Client, id: JobRunId, view: View, begun: Arc<AtomicUsize>) -> Followed {
    let mut events = client.read(&id, LogQuery { follow: true, ..LogQuery::new(view) });
    let (mut lines, mut reconnects) = (0, 0);
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ClientEvent::Lines(batch) => {
                begun.fetch_add(usize::from(lines == 0), Ordering::Relaxed);
                for found in batch.lines() {
                    lines += 1;
                    assert_eq!(found.number.0, lines, "{id}: a line was lost or repeated");
                    assert_eq!(found.text, line(lines).trim_end().as_bytes(), "{id}: line {lines}");
                }
            }
            ClientEvent::Gap(gap) => panic!("{id}: {gap:?}"),
            ClientEvent::Reconnecting { .. } => reconnects += 1,
            ClientEvent::End(ClientEnd::Complete(end)) => return Followed { lines, reconnects, end },
            ClientEvent::End(end) => panic!("{id}: {end:?}"),
        }
    }
    panic!("{id}: no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_is_killed_over_and_over_and_no_follower_loses_or_repeats_a_line() {
    let databuild = databuild();
    let address = HeldAddress::any();
    let mut random = Random::new();
    let mut service = serve(&databuild, &address);
    let jobs: Vec<_> = (0..3)
        .map(|n| (format!("job-{n}"), Job::start(&databuild, &format!("job-{n}"), Random::new())))
        .collect();
    let begun = Arc::new(AtomicUsize::new(0));
    let followers: Vec<_> = jobs
        .iter()
        .flat_map(|(id, _)| [(id, View::STDOUT), (id, View::All)])
        .map(|(id, view)| {
            let client = Client::new(&format!("http://{address}"), None).unwrap();
            (id.clone(), tokio::spawn(follow(client, id.parse().unwrap(), view, Arc::clone(&begun))))
        })
        .collect();
    // A client that never reached its service gives up; from here on all of them go on.
    until(|| begun.load(Ordering::Relaxed) == followers.len(), || "not all of them follow".to_owned());
    for _ in 0..kills() {
        // Long enough to be reached most of the time, and short enough to be killed while it opens its index.
        random.sleep_up_to(Duration::from_millis(400));
        service.signal(Signal::KILL);
        drop(service);
        databuild.run(&["index", "check", "--deep"]).code(0);
        service = databuild.start(&["serve", "--listen", &address.to_string()]);
    }
    service.wait_for("listening on http://");
    let printed: Vec<_> = jobs.into_iter().map(|(id, job)| (id, job.end())).collect();
    let mut reconnects = 0;
    for (id, follower) in followers {
        let followed = tokio::time::timeout(Duration::from_secs(120), follower).await.unwrap().unwrap();
        let expected = printed.iter().find(|(job, _)| *job == id).unwrap().1;
        assert_eq!(followed.lines, expected, "{id}");
        assert_eq!((followed.end.exit_code, followed.end.dropped_bytes), (Some(0), 0), "{id}");
        reconnects += followed.reconnects;
    }
    assert!(reconnects >= kills() / 10, "only {reconnects} reconnects: nothing was tried");
    for (id, lines) in printed {
        assert_eq!(metadata(&run_folder(&databuild, &id)).stdout.lines, lines);
    }
}

/// Lines that every job of [`a_killed_writer_leaves_a_run_that_is_lost_or_finished_and_never_half`] prints.
const PRINTED: u64 = 200;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_writer_leaves_a_run_that_is_lost_or_finished_and_never_half() {
    let databuild = databuild();
    let mut random = Random::new();
    let script = format!(
        "n=0; while [ $n -lt {PRINTED} ]; do n=$((n+1)); echo this is line number $n of the job; done"
    );
    let run = |id: &str, script: &str| databuild.start(&["run", "--id", id, "--", "sh", "-c", script]);
    // Two whose end is certain; the first tells how long a whole life is.
    let began = Instant::now();
    run("whole", &script).done().code(0);
    let life = began.elapsed();
    let script_of_endless = "echo this is line number 1 of the job; exec cat";
    let (mut endless, _input) =
        databuild.start_with_input(&["run", "--id", "endless", "--", "sh", "-c", script_of_endless]);
    endless.line();
    endless.signal(Signal::KILL);
    endless.done();
    let mut printed = vec![("whole".to_owned(), PRINTED), ("endless".to_owned(), 1)];
    // The first half dies under the eyes of a service, the second is found when one comes.
    let mut service = Some(serve(&databuild, &HeldAddress::any()));
    for n in 0..kills() {
        if n == kills() / 2 {
            drop(service.take());
        }
        let id = format!("killed-{n}");
        let process = run(&id, &script);
        random.sleep_up_to(life + life / 4);
        process.signal(Signal::KILL);
        let seen = process.done().stdout;
        // What came out of the tool had gone into the log before.
        printed.push((id, seen.iter().filter(|&&byte| byte == b'\n').count() as u64));
    }
    drop(service);
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    let store = FileLogStore::open(databuild.home.path().join("logs"), options).unwrap();
    let (mut lost, mut finished) = (0, 0);
    for (id, acknowledged) in printed {
        let folder = run_folder(&databuild, &id);
        if !folder.exists() {
            assert_eq!(acknowledged, 0, "{id} printed and has no folder");
            continue;
        }
        let found = metadata(&folder);
        let lines = check_lines(&store, &id, &found).await;
        assert!(lines >= acknowledged, "{id}: {acknowledged} lines were acknowledged, {lines} are there");
        match found.state.kind() {
            StateKind::Lost => lost += 1,
            StateKind::Succeeded => {
                finished += 1;
                assert_eq!(lines, PRINTED, "{id}");
            }
            other => panic!("{id} is {other}"),
        }
    }
    assert!(lost > 0 && finished > 0, "{lost} lost, {finished} finished");
}

/// Reads a run's standard output, which must be a beginning of what its job prints, and agree with its metadata. A
/// kill can cut a write in two where a page of the file ends, and the last line of a lost run with it.
async fn check_lines(store: &FileLogStore, id: &str, metadata: &JobMetadata) -> u64 {
    let id = id.parse().unwrap();
    let mut events = store.read(&id, ReadOptions { follow: true, ..ReadOptions::new(View::All) }).unwrap();
    let mut lines = 0;
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => {
                for found in batch.lines() {
                    lines += 1;
                    assert_eq!(found.number.0, lines, "{id}");
                    let printed = line(lines);
                    if batch.bytes.ends_with(b"\n") {
                        assert_eq!(found.text, printed.trim_end().as_bytes(), "{id}");
                    } else {
                        assert!(printed.as_bytes().starts_with(found.text), "{id}: {:?}", found.text);
                        assert_eq!((metadata.state.kind(), metadata.stdout.lines), (StateKind::Lost, lines));
                    }
                }
            }
            ReadEvent::Gap { gap, .. } => panic!("{id}: {gap:?}"),
            ReadEvent::End(ReadEnd::Complete(end)) => {
                assert_eq!(*end, *metadata, "the store and the file agree");
                assert_eq!((metadata.stdout.lines, metadata.stderr.lines), (lines, 0), "{id}");
                return lines;
            }
            ReadEvent::End(end) => panic!("{id}: {end:?}"),
        }
    }
    panic!("{id}: no end");
}

/// Prints a little, and ends with 3.
const SHORT_JOB: &str =
    "n=0; while [ $n -lt 40 ]; do n=$((n+1)); echo this is line number $n of the job; done; exit 3";

/// What `databuild run` asks of the system that has to do with the run, its files, its job, or its own end.
const CALLS: [&str; 20] = [
    "mkdir",
    "openat",
    "write",
    "flock",
    "fallocate",
    "renameat2",
    "rename",
    "ftruncate",
    "fdatasync",
    "fsync",
    "close",
    "statx",
    "unlink",
    "pipe2",
    "clone3",
    "pidfd_open",
    "ppoll",
    "futex",
    "exit",
    "exit_group",
];

/// Kills the writer where it enters each of its calls, one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_killed_at_any_call_leaves_a_beginning_of_what_was_printed() {
    let databuild = databuild();
    let args = |id: &str| ["run", "--id", id, "--", "sh", "-c", SHORT_JOB].map(str::to_owned);
    let killed_at_every = |call: &str, of_files: bool| {
        let mut printed = Vec::new();
        for n in 1.. {
            assert!(n < 80, "{call} has no end");
            let id = format!("{call}-{}{n}", if of_files { "of-files-" } else { "" });
            let names = ["stdout.log", "stderr.log", "journal", ".metadata.json.new", ""];
            let files: Vec<_> = names.iter().map(|name| run_folder(&databuild, &id).join(name)).collect();
            let args = args(&id);
            let done = databuild.run_killed_at(
                &format!("{call}:when={n}"),
                if of_files { &files } else { &[] },
                &args.each_ref().map(String::as_str),
            );
            // What came out of the tool had gone into the log before.
            printed.push((id, done.stdout));
            match done.code {
                Some(3) => break,
                Some(137) | None => {}
                code => panic!("{call} {n}: {code:?}, {}", done.stderr),
            }
        }
        printed
    };
    let printed: Vec<_> = thread::scope(|scope| {
        let sweeps: Vec<_> = CALLS
            .iter()
            .map(|call| (call, false))
            .chain(["write", "openat", "fsync"].iter().map(|call| (call, true)))
            .map(|(call, of_files)| scope.spawn(move || killed_at_every(call, of_files)))
            .collect();
        sweeps.into_iter().flat_map(|sweep| sweep.join().unwrap()).collect()
    });
    let killed = printed.len() - CALLS.len() - 3;
    assert!(killed > 60, "only {killed} kills");
    let logs = databuild.home.path().join("logs");
    let options = FileStoreOptions { min_free_bytes: 0, ..FileStoreOptions::default() };
    let store = FileLogStore::open(&logs, options).unwrap();
    let (mut lost, mut failed) = (0, 0);
    for (id, printed) in printed {
        let folder = run_folder(&databuild, &id);
        if !folder.exists() {
            assert!(printed.is_empty(), "{id} printed and has no folder");
            continue;
        }
        let found = metadata(&folder);
        let lines = check_lines(&store, &id, &found).await;
        let log = fs::read(folder.join("stdout.log")).unwrap();
        assert!(log.starts_with(&printed), "{id}: what was printed had been written");
        match found.state.kind() {
            StateKind::Lost => lost += 1,
            StateKind::Failed => {
                failed += 1;
                assert_eq!((found.state.exit(), lines), (Some(Exit::Code(3)), 40), "{id}");
            }
            other => panic!("{id} is {other}"),
        }
    }
    assert!(lost > 10 && failed > CALLS.len(), "{lost} lost, {failed} failed");
    // When runs are listed, the index knows every folder.
    assert!(!store.runs(&RunQuery::default()).unwrap().runs.is_empty());
    store.close().unwrap();
    drop(store);
    databuild.run(&["index", "check", "--deep"]).code(0);
}

#[test]
fn a_second_service_on_the_same_folder_is_refused_and_hurts_nobody() {
    let databuild = databuild();
    let address = HeldAddress::any();
    let _service = serve(&databuild, &address);
    databuild.start(&["serve", "--listen", "127.0.0.1:0"]).done().code(1).says("in use by another process");
    databuild.run(&["run", "--quiet", "--id", "r", "--", "echo", "still here"]).code(0);
    let asking = Databuild::asking(format!("http://{address}"));
    assert_eq!(asking.run(&["logs", "-f", "r"]).code(0).text(), "still here\n");
}

#[test]
fn what_a_killed_writer_had_only_prepared_is_removed() {
    let home = tempfile::tempdir().unwrap();
    let prepared = |name: &str| {
        let folder = home.path().join("job_runs").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("journal"), "").unwrap();
        make_old(&folder);
        folder
    };
    let (abandoned, in_use, by_others) = (prepared(".a.1-0.new"), prepared(".b.1-0.new"), prepared(".c"));
    let fresh = home.path().join("job_runs/.d.1-0.new");
    fs::create_dir(&fresh).unwrap();
    let journal = fs::File::open(in_use.join("journal")).unwrap();
    rustix::fs::flock(&journal, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let store = FileLogStore::open(home.path(), FileStoreOptions::default()).unwrap();
    // It looks around in the background; this waits for it.
    store.runs(&RunQuery::default()).unwrap();
    assert!(!abandoned.exists());
    assert!(in_use.exists() && by_others.exists() && fresh.exists());
}
