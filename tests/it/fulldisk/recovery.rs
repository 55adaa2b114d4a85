//! What a service writes into the folders of runs that others wrote: ends of those that are lost, and the
//! `metadata.json` that a writer did not get to. The disk refuses one call of it, or all from some time on.

use databuild_logs::{CheckOptions, check_index};
use rustix::process::Signal;

use super::*;
use crate::support::end_of_start;

/// Files of a run, and its folder.
const NAMES: [&str; 6] = ["stdout.log", "stderr.log", "journal", ".metadata.json.new", "metadata.json", ""];
/// Calls, and what comes of them.
const REFUSED: [(&str, &str); 10] = [
    ("write", "EIO"),
    ("write", "ENOSPC"),
    ("rename", "ENOSPC"),
    ("openat", "EIO"),
    ("ftruncate", "EIO"),
    ("fdatasync", "EIO"),
    ("fsync", "EIO"),
    ("statx", "EIO"),
    ("flock", "EIO"),
    ("ftruncate,write,fsync", "EIO"),
];

/// A folder with runs whose writer was killed, each at another moment: with a mark, with a log behind its last mark, with
/// a torn journal, and behind its end, but before its `metadata.json`.
fn killed_writers() -> (Databuild, Vec<String>) {
    let databuild = no_floor();
    let ids: Vec<_> = ["marked", "unmarked", "torn"].map(str::to_owned).into();
    let script = "printf 'one\ntwo\nhal'; exec cat";
    let start = |id| databuild.start_with_input(&["run", "--quiet", "--id", id, "--", "sh", "-c", script]);
    let (writers, _inputs): (Vec<_>, Vec<_>) = ids.iter().map(|id| start(id)).unzip();
    let is_marked = |id: &String| {
        let file = |name| fs::read(run_folder(&databuild, id).join(name)).unwrap_or_default();
        let journal = file("journal");
        file("stdout.log").len() == 11 && end_of_start(&journal).is_some_and(|end| end < journal.len())
    };
    until(|| ids.iter().all(is_marked), || "the runs do not begin".to_owned());
    writers.iter().for_each(|writer| writer.signal(Signal::KILL));
    drop(writers);
    let append = |id: &str, name: &str, bytes: &[u8]| {
        let file = File::options().append(true).open(run_folder(&databuild, id).join(name));
        file.unwrap().write_all(bytes).unwrap();
    };
    append("unmarked", "stdout.log", b"f\nfour\n");
    append("torn", "journal", &[5, 1, 2]);
    databuild.run(&["run", "--quiet", "--id", "ended", "--", "sh", "-c", "echo one; exit 7"]).code(7);
    fs::remove_file(run_folder(&databuild, "ended").join("metadata.json")).unwrap();
    (databuild, ids)
}

/// Starts a service to which the system refuses what is said.
fn serve_refused(databuild: &Databuild, ids: &[String], inject: &str) -> Running {
    let trace = databuild.home.path().join("trace");
    let calls = format!("trace={}", inject.split(':').next().unwrap());
    let inject = format!("inject={inject}");
    let files: Vec<_> = ids
        .iter()
        .map(String::as_str)
        .chain(["ended"])
        .flat_map(|id| NAMES.map(|name| run_folder(databuild, id).join(name)))
        .collect();
    let mut options = vec!["--seccomp-bpf", "-e", &calls, "-e", &inject];
    for file in &files {
        options.extend(["-P", file.to_str().unwrap()]);
    }
    databuild.start_traced(&trace, &options, &["serve", "--listen", "127.0.0.1:0"])
}

fn has_ended(databuild: &Databuild, ids: &[String]) -> bool {
    let ended = |id: &str| run_folder(databuild, id).join("metadata.json").exists();
    ids.iter().all(|id| ended(id)) && ended("ended")
}

/// What the folders hold once nothing is refused any more.
fn check(databuild: &Databuild, ids: &[String], what: &str) {
    let store = open(databuild);
    until(|| has_ended(databuild, ids), || format!("{what}: some have no end"));
    store.runs(&databuild_logs::RunQuery::default()).unwrap();
    store.close().unwrap();
    drop(store);
    for id in ids {
        let run = metadata(&run_folder(databuild, id));
        assert_eq!(run.state.kind(), StateKind::Lost, "{what}: {id}");
        let lines = if id == "unmarked" { 4 } else { 3 };
        assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (lines, 0), "{what}: {id}");
    }
    let ended = metadata(&run_folder(databuild, "ended"));
    assert!(matches!(ended.state, RunState::Failed { exit: Exit::Code(7), .. }), "{what}: {ended:?}");
    assert_eq!(ended.stdout.lines, 1, "{what}");
    let options = CheckOptions { deep: true, repair: false };
    let report = check_index(databuild.home.path().join("logs"), options, |_| {}).unwrap();
    assert!(report.findings.is_empty(), "{what}: {report:#?}");
}

/// Ends the service, whoever traces it.
fn stop(service: &Running) {
    let id = service.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    for child in children.split_whitespace() {
        let child = rustix::process::Pid::from_raw(child.parse().unwrap()).unwrap();
        rustix::process::kill_process(child, Signal::TERM).unwrap();
    }
}

#[test]
fn an_end_that_the_disk_refuses_once_is_tried_again_until_it_is_written() {
    let injected = thread::scope(|scope| {
        let sweeps = REFUSED.map(|(calls, error)| {
            scope.spawn(move || {
                let mut injected = 0;
                for n in [1, 2, 3, 5, 8] {
                    let what = format!("{calls}:error={error}:when={n}");
                    let (databuild, ids) = killed_writers();
                    let service = serve_refused(&databuild, &ids, &what);
                    service.wait_for("listening on http://");
                    if !matches!(calls, "openat" | "statx" | "flock") {
                        until(|| has_ended(&databuild, &ids), || format!("{what}: {}", service.stderr()));
                    } else {
                        // What it could not even look at it looks for again every half minute.
                        thread::sleep(Duration::from_secs(3));
                    }
                    stop(&service);
                    service.done().code(0);
                    let trace = fs::read_to_string(databuild.home.path().join("trace")).unwrap();
                    injected += u64::from(trace.contains("(INJECTED)"));
                    check(&databuild, &ids, &what);
                }
                (calls, injected)
            })
        });
        sweeps.map(|sweep| sweep.join().unwrap())
    });
    assert!(injected.iter().all(|(_, count)| *count > 0), "{injected:?}");
}

/// Of a disk that takes nothing any more, readers are told the truth, and it is written when the disk is well.
#[test]
fn on_a_disk_that_takes_no_end_a_lost_run_is_told_of_and_written_later() {
    thread::scope(|scope| {
        for (calls, error) in [("write", "ENOSPC"), ("write", "EIO"), ("fdatasync", "EIO"), ("rename", "EIO")]
        {
            scope.spawn(move || {
                let what = format!("{calls}:error={error}:when=1+");
                let (databuild, ids) = killed_writers();
                let service = serve_refused(&databuild, &ids, &what);
                let asking = Databuild::asking(service.address().unwrap());
                for id in &ids {
                    let told = asking.run(&["logs", "--follow", id]).says("lost");
                    let expected = if id == "unmarked" { "one\ntwo\nhalf\nfour\n" } else { "one\ntwo\nhal" };
                    assert_eq!(told.text().trim_end(), expected.trim_end(), "{what}: {id}");
                    let folder = run_folder(&databuild, id);
                    assert!(!folder.join("metadata.json").exists(), "{what}: its journal comes first");
                }
                stop(&service);
                service.done();
                check(&databuild, &ids, &what);
            });
        }
    });
}
