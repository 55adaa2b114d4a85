//! A disk that gets full while there are runs that could go: they go before anything is lost. Needs root, to mount.

use super::*;
use crate::support::cli::{Databuild, until};
use crate::support::disk::SmallDisk;

/// A policy that would evict nothing by itself.
const LENIENT: RetentionPolicy =
    RetentionPolicy { max_age: Some(Duration::from_secs(400 * 24 * 3600)), max_bytes: None, keep_last: 1 };

fn on_small_disk(
    min_free_bytes: u64,
    retention: RetentionPolicy,
) -> (tempfile::TempDir, SmallDisk, FileLogStore) {
    let home = tempfile::tempdir().unwrap();
    let disk = SmallDisk::at(home.path().to_owned(), 48);
    let options = FileStoreOptions { min_free_bytes, retention, ..FileStoreOptions::default() };
    let store = FileLogStore::open(home.path(), options).unwrap();
    (home, disk, store)
}

/// Waits until the index knows that so many runs have ended: what it has not heard of it can't evict.
fn all_in_index(store: &FileLogStore, count: usize) {
    let request = GcRequest { dry_run: true, keep_last: Some(0), ..all() };
    wait_until("the index has them", || evicted(&store.gc(&request).unwrap()).len() == count);
}

/// Prints 20 MB in a run, with three older runs of 5 MB each on the same disk of 48 MB.
fn print_20_mb(store: &FileLogStore) -> databuild_logs::JobMetadata {
    for run in 1..=3 {
        ended(store, &run.to_string(), HOUR * (10 - run), 5_000);
    }
    all_in_index(store, 3);
    let mut writer = store.start(RunSpec::new(id("new"))).unwrap();
    for line in 0..200_000 {
        drop(writer.append(Stream::Stdout, format!("{line:099}\n").as_bytes()));
    }
    writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap()
}

#[test]
fn the_oldest_runs_go_before_a_line_is_lost_at_the_floor() {
    let (_home, disk, store) = on_small_disk(20 << 20, LENIENT);
    let run = print_20_mb(&store);
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (200_000, 0));
    assert!(disk.free() >= 16 << 20, "{}", disk.free());
    let stone = tombstone(&store, "1");
    assert_eq!(stone.reason, "the disk was full");
    assert!(
        left(&store).contains(&"3".to_owned()),
        "no more than needed, and not the last: {:?}",
        left(&store)
    );
    assert_eq!(trash(&disk.at), [""; 0]);
}

#[test]
fn and_on_a_disk_that_is_full_to_the_brim() {
    let (_home, disk, store) = on_small_disk(0, LENIENT);
    for run in 1..=3 {
        ended(&store, &run.to_string(), HOUR * (10 - run), 5_000);
    }
    all_in_index(&store, 3);
    let mut writer = store.start(RunSpec::new(id("new"))).unwrap();
    disk.fill();
    for line in 0..80_000 {
        writer.append(Stream::Stdout, format!("{line:099}\n").as_bytes()).unwrap();
    }
    let run = writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines), (80_000, 0));
    assert_eq!(tombstone(&store, "1").bytes, 5_000_000);
    assert_eq!(left(&store), ["3", "new"]);
    store.close().unwrap();
    drop(store);
    disk.make_room();
    assert_eq!(findings(&disk.at), []);
}

#[test]
fn a_run_begins_on_a_full_disk() {
    let (_home, disk, store) = on_small_disk(0, LENIENT);
    ended(&store, "1", HOUR * 2, 5_000);
    ended(&store, "2", HOUR, 5_000);
    all_in_index(&store, 2);
    disk.fill();
    // Blocks are reserved for its end, which can't be done without.
    let writer = store.start(RunSpec::new(id("new"))).unwrap();
    writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    wait_until("there is room again", || matches!(store.run(&id("1")), Err(LogError::Evicted(_))));
    assert_eq!(left(&store), ["2", "new"]);
}

#[test]
fn where_nothing_is_ever_evicted_nothing_is_evicted_for_room() {
    let (_home, _disk, store) = on_small_disk(20 << 20, RetentionPolicy::OFF);
    let run = print_20_mb(&store);
    assert!(run.stdout.dropped_lines > 0);
    assert_eq!(left(&store), ["1", "2", "3", "new"]);
}

#[test]
fn pinned_runs_and_the_last_ones_stay_on_a_full_disk_too() {
    let (_home, _disk, store) = on_small_disk(20 << 20, RetentionPolicy { keep_last: 2, ..LENIENT });
    for run in 1..=3 {
        ended(&store, &run.to_string(), HOUR * (10 - run), 5_000);
    }
    left(&store);
    store.set_pinned(&id("1"), true).unwrap();
    let mut writer = store.start(RunSpec::new(id("new"))).unwrap();
    for line in 0..250_000 {
        drop(writer.append(Stream::Stdout, format!("{line:099}\n").as_bytes()));
    }
    let run = writer.finish(RunEnd::now(Outcome::Exited(Exit::Code(0)))).unwrap();
    assert!(run.stdout.dropped_lines > 0, "there was nothing to make room with");
    assert_eq!(left(&store), ["1", "2", "3", "new"]);
}

/// A job of another process loses some, and goes on as soon as the service has seen it.
#[test]
fn the_service_makes_room_for_other_processes() {
    let databuild =
        Databuild::new().with("DATABUILD_LOG_MIN_FREE_MB", "20").with("DATABUILD_LOG_TTL_DAYS", "400");
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 48);
    let script = "yes this line is printed over and over again | head -c 12000000";
    for run in ["1", "2"] {
        databuild.run(&["run", "--quiet", "--id", run, "--", "sh", "-c", script]).code(0);
    }
    let service = databuild.start(&["serve", "--listen", "127.0.0.1:0"]);
    service.wait_for("listening on ");
    // Whether there is room again is looked at after a while.
    let script =
        "yes this line is printed over and over again | head -n 300000; cat; sleep 0.3; echo the end";
    let (job, input) =
        databuild.start_with_input(&["run", "--quiet", "--id", "new", "--", "sh", "-c", script]);
    until(
        || service.stderr().contains("a run is evicted") && disk.free() > 22 << 20,
        || format!("no room is made: {} bytes are free, {}", disk.free(), service.stderr()),
    );
    drop(input);
    job.done().code(0);
    let log = fs::read(disk.at.join("job_runs/new/stdout.log")).unwrap();
    assert!(log.ends_with(b"the end\n"), "it goes on");
    assert!(!disk.at.join("job_runs/1").exists());
}
