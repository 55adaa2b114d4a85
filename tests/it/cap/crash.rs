//! Writers that die while they give something up, and disks that can't do it.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use databuild_logs::{RunQuery, StateKind};
use rustix::process::Signal;

use super::*;
use crate::power::make_old;
use crate::support::cli::{Databuild, until};

const CAP: u64 = 300_000;

/// Opens a folder in which writers died, looks at a run, and closes it; how many lines are known of it.
async fn recovered(logs: &Path, run: &str) -> [u64; 2] {
    let store = FileLogStore::open(logs, capped(0)).unwrap();
    assert!(!store.runs(&RunQuery::default()).unwrap().runs.is_empty());
    let kind = || store.run(&id(run)).unwrap().state.kind();
    // A folder that was just copied may not be whole yet.
    until(|| kind() == StateKind::Lost, || format!("it is never lost: {:?}", kind()));
    let known = store.run(&id(run)).unwrap();
    let printed = [known.stdout.lines, known.stderr.lines];
    check_run(&store, run, printed).await;
    store.close().unwrap();
    printed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_is_killed_at_any_moment_leaves_a_run_that_is_read_right() {
    for round in 0..25 {
        let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "0.3");
        let logs = databuild.home.path().join("logs");
        let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "r", "--", "cat"]);
        let log = logs.join("job_runs/r/stdout.log");
        until(|| log.exists(), || "the run does not begin".to_owned());
        let printing = thread::spawn(move || {
            let mut printed = 0;
            loop {
                let text: String = (printed + 1..=printed + 100).map(|n| line(OUT, n) + "\n").collect();
                if input.write_all(text.as_bytes()).is_err() {
                    return printed;
                }
                printed += 100;
            }
        });
        until(|| fs::metadata(&log).unwrap().len() > 2 * CAP, || "it does not print".to_owned());
        thread::sleep(Duration::from_micros(round * 777));
        job.signal(Signal::KILL);
        drop(job);
        let printed = printing.join().unwrap();
        let [known, _] = recovered(&logs, "r").await;
        assert!(known <= printed + 100, "{known} of {printed}");
        assert!(blocks(&logs, "r") <= CAP + 64 * 1024 + 4 * 4096, "{}", blocks(&logs, "r"));
        check_folder(&logs);
    }
}

/// A copy of the files of a run that is being written: its writer holds no lock on them.
fn copy_of(folder: &Path) -> (tempfile::TempDir, PathBuf) {
    let copy = tempfile::tempdir().unwrap();
    let run = copy.path().join("job_runs/r");
    fs::create_dir_all(&run).unwrap();
    for name in ["stdout.log", "stderr.log", "journal"] {
        fs::copy(folder.join("job_runs/r").join(name), run.join(name)).unwrap();
    }
    (copy, run)
}

/// A run in the middle of its life, of which something was given up.
fn half_a_run(folder: &Path) -> (FileLogStore, Job) {
    let store = FileLogStore::open_folder(folder, capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, 5 * CAP);
    job.print_bytes(ERR, 3 * CAP);
    job.writer.flush().unwrap();
    (store, job)
}

#[tokio::test]
async fn what_was_written_down_and_not_done_is_done_by_who_recovers_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let (store, job) = half_a_run(folder.path());
    let (copy, run) = copy_of(folder.path());
    for stream in Stream::BOTH {
        let part = store.given_up(&id("r"), stream).unwrap().unwrap();
        let log = File::options().write(true).open(run.join(format!("{stream}.log"))).unwrap();
        // As it was before it was freed.
        let whole = vec![b'x'; usize::try_from(part.end.0 - part.start.0 - 1).unwrap()];
        log.write_all_at(&whole, part.start.0).unwrap();
    }
    assert!(blocks(copy.path(), "r") > 5 * CAP);
    assert_eq!(recovered(copy.path(), "r").await, job.printed);
    assert!(blocks(copy.path(), "r") <= CAP + 64 * 1024 + 6 * 4096);
    check_folder(copy.path());
}

#[tokio::test]
async fn after_a_power_cut_what_was_given_up_is_not_taken_for_what_was_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (_store, job) = half_a_run(folder.path());
    let (copy, run) = copy_of(folder.path());
    make_old(&run);
    assert_eq!(recovered(copy.path(), "r").await, job.printed);
    check_folder(copy.path());
}

#[tokio::test]
async fn what_a_power_cut_takes_of_the_head_is_counted_once_beside_what_was_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (_store, _job) = half_a_run(folder.path());
    let (copy, run) = copy_of(folder.path());
    let log = run.join("stdout.log");
    let whole = fs::metadata(&log).unwrap().len();
    File::options().write(true).open(&log).unwrap().set_len(20_000).unwrap();
    make_old(&run);
    let store = FileLogStore::open(copy.path(), capped(0)).unwrap();
    assert!(!store.runs(&RunQuery::default()).unwrap().runs.is_empty());
    until(|| store.run(&id("r")).unwrap().state.kind() == StateKind::Lost, || "it is never lost".to_owned());
    let known = store.run(&id("r")).unwrap().stdout;
    let kept = fs::read_to_string(&log).unwrap();
    assert!(kept.len() > 19_000 && kept.ends_with('\n'));
    assert_eq!(known.lines - known.dropped_lines, kept.lines().count() as u64);
    assert_eq!(known.dropped_bytes, whole - kept.len() as u64);
    store.close().unwrap();
}

#[test]
fn a_file_system_that_can_free_nothing_keeps_the_log_whole() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "0.3");
    let trace = databuild.home.path().join("trace");
    let options = ["--seccomp-bpf", "-e", "trace=fallocate", "-e", "inject=fallocate:error=EOPNOTSUPP"];
    let script = "yes this line is printed over and over again | head -n 30000";
    let args = ["run", "--quiet", "--id", "r", "--", "sh", "-c", script];
    databuild.start_traced(&trace, &options, &args).done().code(0);
    let logs = databuild.home.path().join("logs");
    let log = fs::read_to_string(logs.join("job_runs/r/stdout.log")).unwrap();
    assert_eq!(log, "this line is printed over and over again\n".repeat(30_000));
    let traced = fs::read_to_string(trace).unwrap();
    let tried = traced.lines().filter(|call| call.contains("PUNCH_HOLE")).count();
    assert_eq!(tried, 1, "it is asked once");
    let shown = databuild.run(&["logs", "r"]).code(0);
    assert_eq!(shown.text(), log);
}

#[tokio::test]
async fn a_disk_that_refuses_to_free_anything_costs_room_and_no_line() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "0.3");
    let trace = databuild.home.path().join("trace");
    // The first that is asked for is where nothing is; then some that would free something fail.
    let logs = databuild.home.path().join("logs");
    let log = logs.join("job_runs/r/stdout.log");
    let options = [
        "--seccomp-bpf",
        "-P",
        log.to_str().unwrap(),
        "-e",
        "trace=fallocate",
        "-e",
        "inject=fallocate:error=EIO:when=2..4",
    ];
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo this is line number $i of the job; done";
    let args = ["run", "--quiet", "--id", "r", "--", "sh", "-c", script];
    databuild.start_traced(&trace, &options, &args).done().code(0);
    assert!(fs::read_to_string(trace).unwrap().contains("(INJECTED)"));
    // What could not be freed was freed with what came next.
    assert!(blocks(&logs, "r") <= CAP + 64 * 1024 + 4 * 4096);
    let shown = databuild.run(&["logs", "r", "-n", "2"]).code(0);
    assert_eq!(shown.text(), "this is line number 19999 of the job\nthis is line number 20000 of the job\n");
}

#[tokio::test]
async fn without_its_journal_what_was_given_up_is_one_line_of_zeros_and_the_end_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, 5 * CAP);
    let printed = job.printed[0];
    let run = job.finish();
    let part = store.given_up(&id("r"), OUT).unwrap().unwrap();
    store.close().unwrap();
    drop(store);
    fs::remove_file(folder.path().join("index.redb")).unwrap();
    fs::remove_file(folder.path().join("job_runs/r/journal")).unwrap();
    let store = FileLogStore::open(folder.path(), capped(0)).unwrap();
    let mut events = store.read(&id("r"), ReadOptions::new(View::STDOUT)).unwrap();
    let mut lines = Vec::new();
    while let Some(event) = events.next().await {
        if let ReadEvent::Lines(batch) = event.unwrap() {
            lines.extend(batch.lines().map(|line| (line.number.0, line.text.to_vec(), line.cut)));
        }
    }
    // Nobody knows how many lines it was; `metadata.json` still says how many were printed.
    assert_eq!(lines.len() as u64, printed - run.stdout.dropped_lines + 1);
    let zeros = lines.iter().position(|(_, text, _)| text.contains(&0)).unwrap();
    let (_, text, cut) = &lines[zeros];
    let length = cut.map_or(text.len() as u64, |cut| cut.full_bytes);
    assert_eq!(length, part.end.0 - part.start.0 - 1);
    assert!(text.iter().all(|&byte| byte == 0));
    for (at, (number, text, _)) in lines.iter().enumerate().filter(|(at, _)| *at != zeros) {
        assert_eq!(*number, at as u64 + 1);
        let printed_as = if at < zeros { *number } else { number + run.stdout.dropped_lines - 1 };
        assert_eq!(String::from_utf8_lossy(text), line(OUT, printed_as));
    }
    assert_eq!(lines.last().unwrap().1, line(OUT, printed).as_bytes());
}

/// A journal that is damaged anywhere: every read ends, and what it gives are lines that were printed, or zeros where
/// nobody knows any more that they were given up.
#[tokio::test]
async fn whatever_is_left_of_the_journal_every_read_ends_and_gives_lines_that_were_printed() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    for _ in 0..60 {
        job.print(OUT, 300);
        job.print(ERR, 60);
    }
    job.finish();
    store.close().unwrap();
    drop(store);
    let journal = folder.path().join("job_runs/r/journal");
    let sound = fs::read(&journal).unwrap();
    for at in (9..sound.len()).step_by(sound.len() / 40) {
        for is_cut in [false, true] {
            let mut damaged = sound.clone();
            damaged[at] ^= 0x10;
            damaged.truncate(if is_cut { at } else { sound.len() });
            fs::write(&journal, damaged).unwrap();
            fs::remove_file(folder.path().join("index.redb")).unwrap();
            let store = FileLogStore::open(folder.path(), capped(0)).unwrap();
            for (view, times) in
                [(View::STDOUT, false), (View::STDOUT, true), (View::STDERR, false), (View::All, true)]
            {
                let mut events =
                    store.read(&id("r"), ReadOptions { times, ..ReadOptions::new(view) }).unwrap();
                let mut ended = false;
                while let Some(event) = events.next().await {
                    match event.unwrap() {
                        ReadEvent::Lines(batch) => batch.lines().for_each(|shown| {
                            let text = String::from_utf8_lossy(shown.text);
                            let number = text.get(12..20).and_then(|number| number.parse().ok()).unwrap_or(0);
                            let is_zeros = shown.text.iter().all(|&byte| byte == 0);
                            assert!(is_zeros || text == line(batch.stream, number), "byte {at}: {text:.200}");
                        }),
                        ReadEvent::Gap { .. } => {}
                        ReadEvent::End(end) => ended = matches!(end, ReadEnd::Complete(_)),
                    }
                }
                assert!(ended, "byte {at}, {view:?}");
            }
            store.close().unwrap();
        }
    }
}
