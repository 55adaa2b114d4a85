//! What needs the index when its disk is full: evicting above all, which is what makes room.

use rustix::process::Signal;

use super::*;

const RUNS: [&str; 5] = ["1", "2", "3", "4", "5"];

/// Five runs of 600 kB that the index knows, `1` the oldest, and nothing that would evict one of them by itself.
fn five_runs() -> (Databuild, SmallDisk) {
    let databuild = no_floor().with("DATABUILD_LOG_TTL_DAYS", "0").with("DATABUILD_LOG_MAX_SIZE_GB", "0");
    let disk = SmallDisk::at(databuild.home.path().join("logs"), 8);
    for run in RUNS {
        let script = "yes this line is printed over and over again | head -c 600000";
        databuild.run(&["run", "--quiet", "--id", run, "--", "sh", "-c", script]).code(0);
    }
    databuild.run(&["gc", "--dry-run"]).code(0);
    (databuild, disk)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_evicted(databuild: &Databuild, runs: &[&str], what: &str) {
    let store = open(databuild);
    for run in runs {
        assert!(matches!(store.run(&run.parse().unwrap()), Err(LogError::Evicted(_))), "{run}, {what}");
    }
}

fn serve(databuild: &Databuild) -> (Running, Databuild) {
    let (service, url) = databuild.serve();
    (service, Databuild::asking(url))
}

/// What redb says of every write behind one that failed, which tells nobody anything.
const WORDS_OF_THE_DATABASE: &str = "Previous I/O error";

#[test]
fn evicting_by_request_frees_a_disk_that_is_full_to_the_brim() {
    let oldest: &[&str] = &["--older-than", "1s", "--keep-last", "4"];
    for (request, evicted) in [(oldest, 1), (&["--max-size", "1MB"], 5)] {
        for served in [true, false] {
            let (databuild, disk) = five_runs();
            thread::sleep(Duration::from_secs(1));
            let serving = served.then(|| serve(&databuild));
            let asking = serving.as_ref().map_or(&databuild, |(_, asking)| asking);
            disk.fill();
            let done = asking.run(&[&["gc"], request].concat()).code(0);
            let what = format!("{request:?}, by a service: {served}: {done:?}");
            assert!(done.text().contains("evicted"), "{what}");
            assert!(disk.free() >= 500_000, "{} bytes are free, {what}", disk.free());
            assert_eq!(names(&disk.at.join("trash")), [""; 0], "{what}");
            let left = names(&disk.at.join("job_runs"));
            assert_eq!(left, RUNS[evicted..], "{what}");
            drop(serving);
            disk.make_room();
            assert_evicted(&databuild, &RUNS[..evicted], &what);
            databuild.run(&["index", "check", "--deep"]).code(0);
        }
    }
}

/// What is told of an eviction, if anything is. The exit code is 1 where something is unfinished.
fn report_of(gc: &Done) -> Option<GcReport> {
    let report: Option<GcReport> = serde_json::from_str(gc.text()).ok();
    let is_done = report.as_ref().is_some_and(|report| report.unfinished.is_none());
    assert_eq!(gc.code, Some(i32::from(!is_done)), "{gc:?}");
    report
}

/// The disk takes no byte more for the index from some call on, however many logs are removed.
#[test]
fn an_eviction_that_the_index_can_not_hear_of_is_told_and_finished_by_the_next() {
    let mut unfinished = 0;
    for n in 1.. {
        assert!(n < 100, "there is no end");
        let (databuild, disk) = five_runs();
        let index = [disk.at.join("index.redb")];
        let gc = ["gc", "--max-size", "1", "--keep-last", "0", "-o", "json"];
        let (done, injected) =
            databuild.run_injected(&format!("pwrite64:error=ENOSPC:when={n}+"), &index, &gc);
        let what = format!("from call {n} on: {done:?}");
        let left = names(&disk.at.join("job_runs"));
        if let Some(report) = report_of(&done) {
            let told: Vec<_> = report.evicted.iter().map(|run| run.id.as_str()).collect();
            assert_eq!(told, RUNS[..5 - left.len()], "{what}");
            if report.unfinished.is_some() {
                unfinished += 1;
                let note = done.stderr.lines().find(|line| line.starts_with("databuild: "));
                assert!(note.is_some_and(|note| note.contains("No space left on device")), "{what}");
            }
            let logs = names(&disk.at.join("trash"))
                .iter()
                .any(|run| disk.at.join("trash").join(run).join("stdout.log").exists());
            assert!(!logs, "their room is free: {what}");
        } else {
            assert_eq!(left.len(), 5, "what is evicted is told: {what}");
        }
        assert!(!done.stderr.contains(WORDS_OF_THE_DATABASE), "{what}");
        // The next finishes it, whether it is asked to evict or only opens the folder.
        match n % 2 {
            0 => drop(databuild.run(&gc).code(0)),
            _ => {
                let (_service, asking) = serve(&databuild);
                until(|| names(&disk.at.join("trash")).is_empty(), || format!("the trash stays, {what}"));
                asking.run(&gc).code(0);
            }
        }
        assert_eq!(names(&disk.at.join("trash")), [""; 0], "{what}");
        assert_evicted(&databuild, &RUNS, &what);
        databuild.run(&["index", "check", "--deep"]).code(0);
        if !injected {
            break;
        }
    }
    assert!(unfinished >= 2, "{unfinished}");
}

/// Somebody has the files of the evicted run open, so that removing them makes no room.
#[test]
fn what_a_service_can_not_tell_its_index_stays_evicted_and_takes_no_other_run_with_it() {
    let (databuild, disk) = five_runs();
    let folder = run_folder(&databuild, "1");
    let held: Vec<_> = names(&folder).iter().map(|name| fs::File::open(folder.join(name)).unwrap()).collect();
    let (_service, asking) = serve(&databuild);
    thread::sleep(Duration::from_secs(1));
    disk.fill();
    let gc = |expected: &[&str]| {
        let gc = ["gc", "--older-than", "1s", "--keep-last", "4", "-o", "json"];
        let report = report_of(&asking.run(&gc)).unwrap();
        assert_eq!(report.evicted.iter().map(|run| run.id.as_str()).collect::<Vec<_>>(), expected);
        assert_eq!(report.kept, []);
        assert_eq!(names(&disk.at.join("job_runs")), RUNS[1..]);
        asking.run(&["logs", "1"]).says("was evicted at");
        report
    };
    let first = gc(&["1"]);
    let why = first.unfinished.expect("the index has no room");
    assert!(why.contains("No space left on device"), "{why}");
    assert!(gc(&[]).unfinished.is_some());
    let size = first.bytes_after + 100_000;
    let report = report_of(&asking.run(&["gc", "--max-size", &size.to_string(), "-o", "json"])).unwrap();
    assert_eq!(report.evicted, [], "what is gone does not count: {report:?}");
    drop(held);
    assert_eq!(gc(&[]).unfinished, None);
    assert_eq!(names(&disk.at.join("trash")), [""; 0]);
}

/// The file in the run's folder is what counts, and that takes no room.
#[test]
fn a_pin_set_on_a_full_disk_holds_whatever_the_index_can_hear_of_it() {
    let (databuild, disk) = five_runs();
    let (service, asking) = serve(&databuild);
    disk.fill();
    for run in RUNS {
        asking.run(&["runs", "pin", run]).code(0);
    }
    assert!(service.stderr().contains("the index hears later of a pin"), "{}", service.stderr());
    let done = asking.run(&["gc", "--max-size", "1", "--keep-last", "0"]).code(0).says("it is pinned");
    assert_eq!(names(&disk.at.join("job_runs")), RUNS, "{done:?}");
    for run in RUNS {
        asking.run(&["runs", "unpin", run]).code(0);
        assert!(!run_folder(&databuild, run).join("pinned").exists());
    }
    asking.run(&["runs", "pin", "3"]).code(0);
    service.signal(Signal::TERM);
    let done = service.done();
    assert!(!done.stderr.contains(WORDS_OF_THE_DATABASE), "{}", done.stderr);
    disk.make_room();
    databuild.run(&["index", "check", "--repair"]).code(0);
    databuild.run(&["gc", "--max-size", "1", "--keep-last", "0"]).code(0);
    assert_eq!(names(&disk.at.join("job_runs")), ["3"]);
}

/// A run that ends on a full disk is one that the index can't take, however often that is tried.
#[test]
fn a_service_that_ends_on_a_full_disk_says_so_in_words_that_tell_why() {
    // Whether its index needs more room just then is not sure.
    let was_full = (0..8).any(|_| {
        let (databuild, disk) = five_runs();
        let (service, _) = serve(&databuild);
        let jobs: Vec<_> = (0..40)
            .map(|job| {
                let id = format!("job-{job}");
                let args = ["run", "--quiet", "--id", &id, "--", "sh", "-c", "cat"];
                let (job, input) = databuild.start_with_input(&args);
                until(|| run_folder(&databuild, &id).exists(), || "the run does not begin".to_owned());
                (input, job)
            })
            .collect();
        disk.fill();
        for (mut input, job) in jobs {
            input.write_all(line(1).as_bytes()).unwrap();
            drop(input);
            job.done().code(0);
            disk.fill();
        }
        let begin = Instant::now();
        let is_full = || service.stderr().contains("the index can't be written");
        while !is_full() && begin.elapsed() < Duration::from_secs(2) {
            thread::sleep(Duration::from_millis(10));
        }
        let was_full = is_full();
        disk.fill();
        service.signal(Signal::TERM);
        let done = service.done();
        assert!(!done.stderr.contains(WORDS_OF_THE_DATABASE), "{}", done.stderr);
        assert!(!was_full || done.stderr.contains("No space left on device"), "{}", done.stderr);
        was_full
    });
    assert!(was_full, "the index was never refused anything");
}

/// Removes the index and takes all room that is left, a service's own included.
fn without_index(disk: &SmallDisk) {
    fs::remove_file(disk.at.join("index.redb")).unwrap();
    disk.fill();
}

#[test]
fn without_an_index_a_service_starts_on_a_full_disk_and_makes_one_when_there_is_room() {
    let (databuild, disk) = five_runs();
    without_index(&disk);
    let (service, asking) = serve(&databuild);
    for run in RUNS {
        let read = asking.run(&["logs", run, "-n", "2"]).code(0);
        assert!(read.text().starts_with("this line is printed"), "{read:?}");
    }
    assert_eq!(asking.run(&["runs", "-o", "json"]).code(0).text().lines().count(), RUNS.len());
    asking.run(&["logs", "never"]).code(3);
    assert!(!disk.at.join("index.redb").exists(), "half of one is none");
    assert_eq!(names(&disk.at.join("job_runs")), RUNS, "nothing is ever evicted here");
    disk.make_room();
    until(|| disk.at.join("index.redb").exists(), || format!("it makes none: {}", service.stderr()));
    assert_eq!(asking.run(&["runs", "-o", "json"]).code(0).text().lines().count(), RUNS.len());
    service.signal(Signal::TERM);
    service.done().code(0);
    databuild.run(&["index", "check", "--deep"]).code(0);
}

#[test]
fn without_an_index_the_oldest_runs_make_room_for_one() {
    for damaged in [false, true] {
        let (databuild, disk) = five_runs();
        let databuild = databuild.with("DATABUILD_LOG_TTL_DAYS", "400");
        databuild.run(&["runs", "pin", "1"]).code(0);
        match damaged {
            true => fs::write(disk.at.join("index.redb"), [0; 8192]).unwrap(),
            false => fs::remove_file(disk.at.join("index.redb")).unwrap(),
        }
        disk.fill();
        let (service, asking) = serve(&databuild);
        let is_evicted = || asking.run(&["logs", "2"]).stderr.contains("was evicted at");
        until(is_evicted, || format!("nothing is evicted: {}", service.stderr()));
        until(
            || disk.at.join("index.redb").exists() && names(&disk.at.join("trash")).is_empty(),
            || format!("the trash stays: {}", service.stderr()),
        );
        assert_eq!(names(&disk.at.join("job_runs")), ["1", "3", "4", "5"], "no more than it takes");
        assert_eq!(asking.run(&["runs", "-o", "json"]).code(0).text().lines().count(), 4);
        service.signal(Signal::TERM);
        service.done().code(0);
        databuild.run(&["index", "check", "--deep"]).code(0);
        assert_evicted(&databuild, &["2"], "told by the index");
    }
}

#[test]
fn an_index_that_can_not_be_made_leaves_nothing_behind() {
    let (databuild, disk) = five_runs();
    without_index(&disk);
    databuild.run(&["index", "rebuild"]).code(1).says("No space left on device");
    assert!(!disk.at.join("index.redb.new").exists());
    disk.make_room();
    databuild.run(&["index", "rebuild"]).code(0);
    databuild.run(&["index", "check", "--deep"]).code(0);
}

/// Somebody makes room by hand, where nothing but the memory of the service has what is left of a run.
#[test]
fn a_trash_that_is_emptied_by_hand_takes_no_tombstone_with_it() {
    let (databuild, disk) = five_runs();
    let (service, asking) = serve(&databuild);
    thread::sleep(Duration::from_secs(1));
    let folder = run_folder(&databuild, "1");
    let held: Vec<_> = names(&folder).iter().map(|name| fs::File::open(folder.join(name)).unwrap()).collect();
    disk.fill();
    let gc = || {
        let gc = ["gc", "--older-than", "1s", "--keep-last", "4", "-o", "json"];
        report_of(&asking.run(&gc)).unwrap()
    };
    let first = gc();
    assert!(first.unfinished.is_some() && first.evicted.len() == 1, "{first:?}");
    for name in names(&disk.at.join("trash")) {
        fs::remove_dir_all(disk.at.join("trash").join(name)).unwrap();
    }
    drop(held);
    disk.make_room();
    let second = gc();
    assert_eq!((&second.unfinished, second.evicted.len()), (&None, 0), "{second:?}");
    asking.run(&["logs", "1"]).code(3).says("was evicted at");
    service.signal(Signal::TERM);
    service.done().code(0);
    databuild.run(&["index", "check", "--deep"]).code(0);
    assert_evicted(&databuild, &["1"], "after a restart");
}
