//! The index made anew is the index that was.

use std::fs;
use std::path::{Path, PathBuf};

use databuild_logs::{
    Exit, FileLogStore, FileStoreOptions, JobMetadata, LogError, LogStore, Outcome, RebuildProgress, RunEnd,
    RunQuery, RunSpec, RunWriter, Stream, compact_index, rebuild_index,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::{assert_numbered, dump, id, index_file, numbered, open, plain, plain_of, quarantined, success};
use crate::support::cli::{Databuild, errors_on_terminal};
use crate::support::wait_until;

fn rebuild(folder: &Path) -> databuild_logs::RebuildReport {
    rebuild_index(folder, |_| ()).unwrap()
}

/// What a run does next.
#[derive(Clone, Debug)]
enum Act {
    Append(Stream, Vec<u8>),
    Flush,
}

fn act() -> impl Strategy<Value = Act> {
    let text = prop_oneof![
        Just(b"line\n".to_vec()),
        Just(b"no end".to_vec()),
        Just(b"\n\n\r\n".to_vec()),
        (1..3000usize, 1..90usize)
            .prop_map(|(lines, width)| format!("{:width$}\n", "x").repeat(lines).into_bytes()),
        (1..200_000usize).prop_map(|length| vec![b'y'; length]),
    ];
    prop_oneof![
        6 => (any::<bool>(), text).prop_map(|(stderr, text)| {
            Act::Append(if stderr { Stream::Stderr } else { Stream::Stdout }, text)
        }),
        1 => Just(Act::Flush),
    ]
}

/// Who writes a run, and how it ends.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Service(Outcome),
    Foreign(Outcome),
    /// Its writer is dropped without a word.
    Dropped,
    /// It has no journal.
    Plain,
    /// Somebody writes it all the while.
    Live,
}

fn kind() -> impl Strategy<Value = Kind> {
    let outcome = prop_oneof![
        Just(Outcome::Exited(Exit::Code(0))),
        Just(Outcome::Exited(Exit::Code(3))),
        Just(Outcome::Exited(Exit::Signal(9))),
        Just(Outcome::Cancelled(Exit::Signal(15))),
    ];
    prop_oneof![
        outcome.clone().prop_map(Kind::Service),
        outcome.prop_map(Kind::Foreign),
        Just(Kind::Dropped),
        Just(Kind::Plain),
        Just(Kind::Live),
    ]
}

fn act_out(writer: &mut dyn RunWriter, acts: &[Act]) {
    for act in acts {
        match act {
            Act::Append(stream, bytes) => writer.append(*stream, bytes).unwrap(),
            Act::Flush => writer.flush().unwrap(),
        }
    }
    writer.flush().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_rebuilt_index_equals_the_old_one(history in vec((kind(), vec(act(), 0..12)), 1..8)) {
        let folder = tempfile::tempdir().unwrap();
        let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
        let mut live = Vec::new();
        {
            let store = open(folder.path());
            for (number, (kind, acts)) in history.iter().enumerate() {
                let mut spec = RunSpec::new(id(&format!("r{number}"))).command(["make"]);
                spec.building_partitions = vec![format!("p{}", number % 3), "all".into()];
                match *kind {
                    Kind::Service(outcome) => {
                        let mut writer = store.start(spec).unwrap();
                        act_out(&mut *writer, acts);
                        writer.finish(RunEnd::now(outcome)).unwrap();
                    }
                    Kind::Foreign(outcome) => {
                        let mut writer = other.start(spec).unwrap();
                        act_out(&mut *writer, acts);
                        writer.finish(RunEnd::now(outcome)).unwrap();
                    }
                    Kind::Dropped => act_out(&mut *other.start(spec).unwrap(), acts),
                    Kind::Plain => {
                        let logs = acts.iter().filter_map(|act| match act {
                            Act::Append(Stream::Stdout, bytes) => Some(("stdout.log", bytes.as_slice())),
                            Act::Append(Stream::Stderr, bytes) => Some(("stderr.log", bytes.as_slice())),
                            Act::Flush => None,
                        });
                        plain_of(folder.path(), spec.id.as_str(), &logs.collect::<Vec<_>>());
                    }
                    Kind::Live => {
                        let mut writer = other.start(spec).unwrap();
                        act_out(&mut *writer, acts);
                        live.push(writer);
                    }
                }
            }
            store.close().unwrap();
        }
        // Takes in what was not discovered before.
        let store = open(folder.path());
        prop_assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), history.len());
        store.close().unwrap();
        let old = dump(folder.path());
        let report = rebuild(folder.path());
        prop_assert_eq!((report.runs, report.live), (history.len() as u64, live.len() as u64));
        let new = dump(folder.path());
        for (old, new) in old.iter().zip(&new) {
            prop_assert_eq!(old, new);
        }
        prop_assert_eq!(old.len(), new.len());
        let runs = open(folder.path()).runs(&RunQuery::default()).unwrap().runs;
        let started = runs.iter().map(|run: &JobMetadata| run.started_at);
        prop_assert!(started.rev().is_sorted(), "numbered in the order of their starts");
    }
}

#[tokio::test]
async fn a_rebuild_needs_nothing_but_the_folders() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(folder.path());
        numbered(&store, "r1", 20_000);
        numbered(&store, "r2", 5);
        store.close().unwrap();
    }
    plain(folder.path(), "by-hand", 10_000);
    fs::remove_file(index_file(folder.path())).unwrap();
    let mut told = Vec::new();
    let report = rebuild_index(folder.path(), |progress| told.push(progress)).unwrap();
    assert_eq!((report.runs, report.scanned, report.live), (3, 1, 0));
    assert!(report.places >= 20_000 * 80 / 65_536, "{report:?}");
    assert_eq!(told.last(), Some(&RebuildProgress { runs: 3, of_runs: 3 }));
    assert!(!folder.path().join("index.redb.new").exists());
    let store = open(folder.path());
    assert_eq!(quarantined(folder.path()), 0);
    assert_numbered(&store, "r1", 20_000).await;
    assert_numbered(&store, "by-hand", 10_000).await;
}

#[test]
fn a_rebuild_is_refused_while_a_service_has_the_folder_and_waits_if_told_to() {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    numbered(&store, "r1", 3);
    assert!(matches!(rebuild_index(&logs, |_| ()), Err(LogError::InUse { .. })));
    for verb in ["rebuild", "check", "compact", "dump"] {
        let code = if verb == "check" { 4 } else { 1 };
        databuild.run(&["index", verb]).code(code).says("in use by another process").says("--wait");
    }
    let waiting = databuild.start(&["index", "rebuild", "--wait"]);
    waiting.wait_for("waiting until nobody else has the index");
    assert_eq!(store.run(&id("r1")).unwrap().stdout.lines, 3, "the service does not notice");
    store.close().unwrap();
    let done = waiting.done().code(0);
    assert!(done.text().starts_with("1 runs and 0 places"), "{done:?}");
    databuild.run(&["index", "check"]).code(0);
}

/// Long enough for a few lines of how far it is: the journal of one run is opened late.
#[test]
fn a_rebuild_shows_a_bar_on_a_terminal_and_lines_elsewhere() {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    ["r1", "r2", "r3"].iter().for_each(|run| numbered(&store, run, 3));
    store.close().unwrap();
    let shown = errors_on_terminal(databuild.command(&["index", "rebuild"]), 80);
    assert!(shown.contains("of 3 runs") && shown.contains('█'), "{shown:?}");
    assert!(shown.contains('\r') || shown.contains("\x1b["), "it is drawn over itself: {shown:?}");
    let last = shown.rsplit(['\r', '\n']).next().unwrap();
    assert!(!last.contains('█'), "it does not stay: {shown:?}");
    let slow = logs.join("job_runs/r2/journal");
    let delay = "inject=openat:delay_enter=11000000:when=1";
    let options = ["-e", "trace=openat", "-e", delay, "-P", slow.to_str().unwrap()];
    let done = databuild.start_traced(Path::new("/dev/null"), &options, &["index", "rebuild"]).done().code(0);
    let told: Vec<_> = done.stderr.lines().collect();
    assert!(!told.is_empty() && told.iter().all(|line| line.ends_with(" of 3 runs")), "{told:?}");
    assert!(!done.stderr.contains(['\x1b', '\r', '█']), "{told:?}");
    // What is over at once says nothing of how far it is.
    assert_eq!(databuild.run(&["index", "rebuild"]).code(0).stderr, "");
}

#[test]
fn a_rebuild_that_was_cut_short_leaves_the_old_index() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    numbered(&store, "r1", 3);
    store.close().unwrap();
    let before = dump(folder.path());
    // What a rebuild leaves that is killed: a file that does not count, and a lock that nobody has.
    fs::write(folder.path().join("index.redb.new"), "half").unwrap();
    assert_eq!(dump(folder.path()), before);
    rebuild(folder.path());
    assert_eq!(dump(folder.path()), before);
    assert!(!folder.path().join("index.redb.new").exists());
}

/// Nothing in the new index counts before it is renamed.
#[test]
fn a_new_index_is_synced_once_and_then_takes_the_place_of_the_old_one() {
    let (databuild, _) = with_runs();
    let trace = databuild.home.path().join("trace");
    let calls = ["-e", "trace=fsync,fdatasync,sync_file_range,msync,rename,renameat2"];
    databuild.start_traced(&trace, &calls, &["index", "rebuild"]).done().code(0);
    let trace = fs::read_to_string(trace).unwrap();
    let calls = trace.lines().filter_map(|line| line.split_whitespace().nth(1)?.split('(').next());
    assert_eq!(calls.collect::<Vec<_>>(), ["fsync", "rename", "fsync"], "{trace}");
}

#[test]
fn a_rebuild_that_is_killed_at_any_step_leaves_the_old_index_or_the_new_one() {
    let (databuild, logs) = with_runs();
    let before = dump(&logs);
    let trace = databuild.home.path().join("trace");
    let mut killed = 0;
    // A small index is written with one call.
    for (call, whens) in [("pread64", 1..12), ("pwrite64", 1..2), ("fsync", 1..3), ("rename", 1..2)] {
        for when in whens {
            let inject = format!("inject={call}:signal=KILL:when={when}");
            let done = databuild.start_traced(&trace, &["-e", &inject], &["index", "rebuild"]).done();
            killed += u32::from(done.code != Some(0));
            assert_eq!(dump(&logs), before, "killed at {call} number {when}");
            assert_eq!(quarantined(&logs), 0);
        }
    }
    assert!(killed >= 10, "{killed} rebuilds were killed");
    databuild.run(&["index", "rebuild"]).code(0);
    assert_eq!(dump(&logs), before);
}

#[test]
fn a_new_index_that_can_not_be_written_leaves_the_old_one() {
    let (databuild, logs) = with_runs();
    let before = dump(&logs);
    let trace = databuild.home.path().join("trace");
    for (call, error) in [("pwrite64", "ENOSPC"), ("fsync", "EIO"), ("rename", "EIO"), ("ftruncate", "EIO")] {
        let inject = format!("inject={call}:error={error}:when=1");
        let done = databuild.start_traced(&trace, &["-e", &inject], &["index", "rebuild"]).done();
        // A small index is not made longer in its file.
        let fails = call != "ftruncate";
        assert_eq!(done.code, Some(i32::from(fails)), "{call}: {}", done.stderr);
        assert_eq!(dump(&logs), before, "{call}");
        assert_eq!(quarantined(&logs), 0);
    }
    databuild.run(&["index", "rebuild"]).code(0);
    assert_eq!(dump(&logs), before);
}

/// A log folder with an index.
fn with_runs() -> (Databuild, PathBuf) {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    numbered(&store, "r1", 2_000);
    numbered(&store, "r2", 3);
    store.close().unwrap();
    (databuild, logs)
}

#[test]
fn a_run_that_is_being_written_is_rebuilt_as_such_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    let mut writer = other.start(RunSpec::new(id("live"))).unwrap();
    writer.append(Stream::Stdout, &b"a line\n".repeat(30_000)).unwrap();
    writer.flush().unwrap();
    let report = rebuild(folder.path());
    assert_eq!((report.runs, report.live), (1, 1));
    writer.append(Stream::Stdout, b"another\n").unwrap();
    let store = open(folder.path());
    writer.finish(success()).unwrap();
    wait_until("the service sees its end", || store.run(&id("live")).unwrap().state.is_over());
    assert_eq!(store.run(&id("live")).unwrap().stdout.lines, 30_001);
    store.close().unwrap();
    let old = dump(folder.path());
    rebuild(folder.path());
    assert_eq!(dump(folder.path()), old);
}

#[test]
fn compacting_says_what_it_gave_back() {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    numbered(&store, "r1", 3);
    store.close().unwrap();
    let before = dump(&logs);
    let done = databuild.run(&["index", "compact"]).code(0);
    assert!(done.text().starts_with("index.redb: ") && done.text().contains(" after"), "{done:?}");
    let (before_bytes, after_bytes) = compact_index(&logs).unwrap();
    assert!(after_bytes <= before_bytes);
    assert_eq!(dump(&logs), before);
}

#[test]
fn a_dump_is_an_object_a_line() {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    numbered(&store, "r1", 2_000);
    store.close().unwrap();
    let done = databuild.run(&["index", "dump", "-o", "json"]).code(0);
    let rows: Vec<serde_json::Value> =
        done.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows, dump(&logs));
    let tables: Vec<_> = rows.iter().map(|row| row["table"].as_str().unwrap()).collect();
    assert_eq!(tables, ["runs", "checkpoints", "checkpoints", "evictable", "totals"]);
    assert_eq!(rows[0]["run"], "r1");
    databuild.run(&["index", "dump", "--log-dir", "/nonexistent"]).code(1).says("does not exist");
}
