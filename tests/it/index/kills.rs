//! A service that is killed where it enters a call to the system, whatever it is just doing: it starts, takes up runs of
//! other processes, ends one whose writer died, pins, compresses, evicts and stops. Needs `strace`.

use std::path::{Path, PathBuf};
use std::thread;

use databuild_logs::{
    CheckOptions, Finding, FindingKind, LogError, LogStore, RunQuery, RunState, check_index,
};
use rustix::process::Signal;

use super::faults::{LINES, block_on, logs, make_folder};
use super::{assert_numbered, id, index_file, lines, open};
use crate::crash::databuild;
use crate::support::cli::{Databuild, Done, NOBODY, until};
use crate::support::copy_folder;

/// What a service that may be gone has confirmed.
#[derive(Debug)]
struct Confirmed {
    pin: bool,
    eviction: bool,
}

/// A life of a service, with all that it does. Gives what it confirmed, and how it ended.
fn live(databuild: &Databuild, point: &str, files: &[PathBuf]) -> (Confirmed, Done) {
    // Without the tracer between them a signal is the service's.
    let service = databuild.start_killed_at(&["-D"], point, files, &["serve", "--listen", "127.0.0.1:0"]);
    let asking = Databuild::asking(service.address().unwrap_or_else(|| NOBODY.to_owned()));
    for job in ["job-1", "job-2"] {
        databuild.run(&["run", "--quiet", "--id", job, "--", "echo", job]).code(0);
    }
    let log = logs(databuild).join("job_runs/lost/stdout.log");
    let script = format!("echo lost; until grep -q lost {}; do :; done; kill -9 $PPID", log.display());
    assert_eq!(databuild.run(&["run", "--quiet", "--id", "lost", "--", "sh", "-c", &script]).code, None);
    let is_seen = || asking.run(&["runs", "--state", "lost"]).text().contains("lost");
    until(|| is_seen() || service.is_over(), || format!("nobody sees it: {}", service.stderr()));
    let confirms = |args: &[&str]| asking.run(args).code == Some(0);
    let pin = confirms(&["runs", "pin", "job-1"]);
    confirms(&["runs", "compress", "new"]);
    let mut eviction = false;
    let evict = ["gc", "--max-size", "1KB", "--keep-last", "3"];
    let is_evicted = |run| !logs(databuild).join("job_runs").join(run).exists();
    until(
        || {
            // It takes a moment until the runs that ended just now count among those to be kept.
            eviction = confirms(&evict) && ["a", "b"].iter().all(is_evicted);
            eviction || service.is_over()
        },
        || format!("they are not evicted: {}", service.stderr()),
    );
    service.signal(Signal::TERM);
    (Confirmed { pin, eviction }, service.done())
}

/// What whoever opens the folder next finds: all that was recorded and confirmed, and nothing that disagrees.
#[track_caller]
fn has_all(folder: &Path, confirmed: &Confirmed, what: &str) {
    let store = open(folder);
    // It looks around in the background; this waits for it.
    store.runs(&RunQuery::default()).unwrap();
    let state = |run| store.run(&id(run)).unwrap().state;
    until(|| matches!(state("lost"), RunState::Lost { .. }), || format!("{what}: it is {:?}", state("lost")));
    until(|| is_without_trash(folder), || format!("{what}: something stays in the trash"));
    for run in ["a", "b"] {
        match block_on(lines(&store, run, 0, 1)) {
            Err(LogError::Evicted(stone)) => assert_eq!(stone.lines, LINES, "{what}: {run}"),
            Ok(_) if !confirmed.eviction => block_on(assert_numbered(&store, run, LINES)),
            other => panic!("{what}: {run}: {other:?}"),
        }
    }
    assert_eq!(block_on(lines(&store, "new", 0, 1)).map(|lines| lines.len()).ok(), Some(1), "{what}");
    block_on(assert_numbered(&store, "new", LINES));
    for run in ["job-1", "job-2", "lost"] {
        assert_eq!(block_on(lines(&store, run, 0, 9)).unwrap(), [run], "{what}");
    }
    assert!(folder.join("job_runs/job-1/pinned").exists() || !confirmed.pin, "{what}: the pin is gone");
    store.close().unwrap();
    drop(store);
    let findings =
        |repair| check_index(folder, CheckOptions { deep: true, repair }, |_| ()).unwrap().findings;
    // What harms nobody waits for its turn: a file that was being compressed stands beside the one that counts, and of
    // a pin and of what a run takes up the index hears within a day. Both are in the run's folder first.
    let harms_nobody = |found: &Finding| match found.kind {
        FindingKind::Leftover => found.run == Some(id("new")),
        FindingKind::RecordDiffers => [Some(id("new")), Some(id("job-1"))].contains(&found.run),
        _ => false,
    };
    let found = findings(true);
    assert!(found.iter().all(harms_nobody), "{what}: {found:?}");
    assert_eq!(findings(false), [], "{what}");
}

fn is_without_trash(folder: &Path) -> bool {
    std::fs::read_dir(folder.join("trash")).map_or(true, |mut entries| entries.next().is_none())
}

#[test]
fn a_service_killed_at_any_call_of_its_life_has_lost_nothing_that_it_confirmed() {
    let home = tempfile::tempdir().unwrap();
    let template = home.path().join("template");
    make_folder(&template);
    let sweep = |call: &str, of_index: bool| {
        let (mut kills, mut n) = (0u32, 1);
        loop {
            assert!(n < 2_000, "{call} has no end");
            let databuild = databuild();
            let folder = logs(&databuild);
            copy_folder(&template, &folder);
            let point = format!("{call}:when={n}");
            let files = if of_index { vec![index_file(&folder)] } else { Vec::new() };
            let (confirmed, done) = live(&databuild, &point, &files);
            has_all(&folder, &confirmed, &format!("{point}: {confirmed:?}"));
            if done.code == Some(0) {
                assert!(confirmed.pin && confirmed.eviction, "{point}: {confirmed:?} {}", done.stderr);
                return kills;
            }
            assert_eq!(done.code, None, "{point}: {}", done.stderr);
            kills += 1;
            // The first calls one by one, the many of the same kind behind them in longer steps.
            n += 1 + n / 6;
        }
    };
    let of_index = [("pwrite64", true), ("fdatasync", true), ("ftruncate", true)];
    let of_folders = ["rename", "renameat", "renameat2", "unlink", "unlinkat"].map(|call| (call, false));
    let kills = thread::scope(|scope| {
        let calls = of_index.into_iter().chain(of_folders);
        let sweeps: Vec<_> =
            calls.map(|(call, of_index)| scope.spawn(move || sweep(call, of_index))).collect();
        sweeps.into_iter().map(|sweep| sweep.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(kills.iter().all(|&kills| kills >= 1) && kills.iter().sum::<u32>() >= 40, "{kills:?}");
}
