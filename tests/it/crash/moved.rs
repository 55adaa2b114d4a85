//! The log folder is moved away under a service: nothing at its path says anything of its runs until it is back.

use super::*;
use crate::support::disk::SmallDisk;

/// Without a folder that could be read in its place.
fn asking_only(address: &HeldAddress) -> Databuild {
    Databuild::asking(format!("http://{address}")).with("DATABUILD_LOG_DIR", "/nowhere/at/all")
}

#[test]
fn a_folder_that_is_moved_away_under_the_service_comes_back_whole() {
    let databuild = databuild();
    let address = HeldAddress::any();
    let service = serve(&databuild, &address);
    databuild.run(&["run", "--quiet", "--id", "done", "--", "echo", "x"]).code(0);
    let (job, mut input) =
        databuild.start_with_input(&["run", "--quiet", "--id", "r", "--", "sh", "-c", "cat; exit 3"]);
    input.write_all(line(1).as_bytes()).unwrap();
    let asking = asking_only(&address);
    let mut follower = asking.start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), line(1).trim_end());
    let logs = databuild.home.path().join("logs");
    let away = databuild.home.path().join("away");
    fs::rename(&logs, &away).unwrap();
    input.write_all(line(2).as_bytes()).unwrap();
    drop(input);
    // The job is not hurt; its end is in the journal, if not where `metadata.json` was to be.
    job.done().code(3);
    assert_eq!(fs::read_to_string(away.join("job_runs/r/stdout.log")).unwrap(), [line(1), line(2)].concat());
    // The service says why it can't answer, and of no run that it is gone.
    service.wait_for("has to come back; its runs wait until it is back");
    for verb in [&["runs"][..], &["logs", "done"], &["logs", "never"]] {
        asking.run(verb).code(5).says("the log folder was moved or removed");
    }
    assert!(!logs.exists(), "nothing is made in its place");
    fs::rename(&away, &logs).unwrap();
    service.wait_for("the log folder is back");
    let followed = follower.done().code(0).says("failed with exit code 3");
    assert_eq!(followed.text(), [line(1), line(2)].concat());
    assert_eq!(asking.run(&["logs", "done"]).code(0).text(), "x\n");
    assert_eq!(service.stderr().matches("its runs wait until it is back").count(), 1, "{}", service.stderr());
    drop(service);
    // What was interrupted is completed by the next one.
    let address = HeldAddress::any();
    let _service = serve(&databuild, &address);
    let asking = Databuild::asking(format!("http://{address}"));
    let done = asking.run(&["logs", "-f", "r"]).code(0).says("failed with exit code 3");
    assert_eq!(done.text(), [line(1), line(2)].concat());
    assert_eq!(metadata(&run_folder(&databuild, "r")).stdout.lines, 2);
}

/// Whoever serves what is at the path now has an index and runs of its own.
#[test]
fn a_service_whose_folder_was_moved_away_leaves_alone_what_is_at_its_path() {
    let databuild = databuild();
    let logs = databuild.home.path().join("logs");
    let [away, other] = ["away", "other"].map(|name| databuild.home.path().join(name));
    let run = |id: &str| databuild.run(&["run", "--quiet", "--id", id, "--", "echo", id]).code(0);
    let listed = |address: &HeldAddress| asking_only(address).run(&["runs"]);
    let [first, second] = [HeldAddress::any(), HeldAddress::any()];
    let of_first = serve(&databuild, &first);
    run("one");
    fs::rename(&logs, &away).unwrap();
    fs::create_dir(&logs).unwrap();
    let of_second = serve(&databuild, &second);
    run("two");
    assert!(listed(&second).code(0).text().contains("two"));
    // Each asks its index more than once.
    for _ in 0..5 {
        listed(&first).code(5).says("the log folder was moved or removed");
        assert!(!listed(&second).code(0).text().contains("one"));
        thread::sleep(Duration::from_millis(100));
    }
    let names: Vec<_> = fs::read_dir(&logs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().contains("corrupt")), "{names:?}");
    of_second.signal(Signal::TERM);
    of_second.done().code(0);
    fs::rename(&logs, &other).unwrap();
    fs::rename(&away, &logs).unwrap();
    let back = listed(&first).code(0);
    assert!(back.text().contains("one") && !back.text().contains("two"), "{back:?}");
    of_first.signal(Signal::TERM);
    of_first.done().code(0);
    for folder in [&logs, &other] {
        databuild.run(&["index", "check", "--deep", "--log-dir", folder.to_str().unwrap()]).code(0);
    }
}

/// The folder of runs alone, with the log folder where it was.
#[test]
fn a_folder_of_runs_that_is_moved_away_or_covered_comes_back_whole() {
    for is_covered in [false, true] {
        let databuild = databuild();
        let address = HeldAddress::any();
        let service = serve(&databuild, &address);
        databuild.run(&["run", "--quiet", "--id", "done", "--", "echo", "x"]).code(0);
        let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "r", "--", "cat"]);
        input.write_all(line(1).as_bytes()).unwrap();
        let asking = asking_only(&address);
        let mut follower = asking.start(&["logs", "-f", "r"]);
        assert_eq!(follower.line(), line(1).trim_end());
        asking.run(&["logs", "done"]).code(0);
        let job_runs = databuild.home.path().join("logs/job_runs");
        let aside = databuild.home.path().join("logs/aside");
        let covering = is_covered.then(|| SmallDisk::at(job_runs.clone(), 1));
        if !is_covered {
            fs::rename(&job_runs, &aside).unwrap();
        }
        // It asks once a second for each run that goes on.
        service.wait_for("WARN databuild_logs::layout::home");
        thread::sleep(Duration::from_millis(1_500));
        for verb in [&["runs"][..], &["logs", "done"], &["logs", "r"], &["gc"]] {
            asking.run(verb).code(5).says("the log folder was moved or removed");
        }
        input.write_all(line(2).as_bytes()).unwrap();
        drop(covering);
        if !is_covered {
            fs::rename(&aside, &job_runs).unwrap();
        }
        service.wait_for("the log folder is back");
        input.write_all(line(3).as_bytes()).unwrap();
        drop(input);
        job.done().code(0);
        let followed = follower.done().code(0).says("succeeded");
        assert_eq!(followed.text(), (1..=3).map(line).collect::<String>());
        assert_eq!(asking.run(&["logs", "done"]).code(0).text(), "x\n");
        service.signal(Signal::TERM);
        service.done().code(0);
        databuild.run(&["index", "check", "--deep"]).code(0);
    }
}

/// What the disk can't tell is not taken for an answer.
#[test]
fn a_look_at_a_run_that_the_disk_refuses_evicts_nobody() {
    let databuild = databuild();
    let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "r", "--", "cat"]);
    let folder = run_folder(&databuild, "r");
    until(|| folder.exists(), || "the run does not begin".to_owned());
    input.write_all(line(1).as_bytes()).unwrap();
    let refused = "inject=statx,lstat,newfstatat:error=EIO:when=6..12";
    let path = folder.to_str().unwrap();
    let options = ["--seccomp-bpf", "-e", "trace=statx,lstat,newfstatat", "-e", refused, "-P", path];
    let trace = databuild.home.path().join("trace");
    let service = databuild.start_traced(&trace, &options, &["serve", "--listen", "127.0.0.1:0"]);
    let asking = Databuild::asking(service.address().unwrap());
    let mut follower = asking.start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), line(1).trim_end());
    service.wait_for("whether its writer lives can't be told");
    until(
        || fs::read_to_string(&trace).unwrap().matches("(INJECTED)").count() >= 7,
        || "it is not looked at again".to_owned(),
    );
    input.write_all(line(2).as_bytes()).unwrap();
    drop(input);
    job.done().code(0);
    let followed = follower.done().code(0).says("succeeded");
    assert_eq!(followed.text(), [line(1), line(2)].concat());
}

/// What a run of the service's own process has said is in its journal within a second or two, wherever that is.
#[test]
fn marks_that_wait_are_written_while_the_log_folder_is_away() {
    let home = tempfile::tempdir().unwrap();
    let [logs, away] = ["logs", "away"].map(|name| home.path().join(name));
    let store = FileLogStore::open(&logs, FileStoreOptions::default()).unwrap();
    let mut writer = store.start(databuild_logs::RunSpec::new("r".parse().unwrap())).unwrap();
    fs::rename(&logs, &away).unwrap();
    let length = || fs::metadata(away.join("job_runs/r/journal")).unwrap().len();
    for text in ["one\n", "two\n", "three\n"] {
        writer.append(databuild_logs::Stream::Stdout, text.as_bytes()).unwrap();
    }
    let before = length();
    until(|| length() > before, || "the last mark waits for the folder".to_owned());
    fs::rename(&away, &logs).unwrap();
    writer.finish(databuild_logs::RunEnd::now(databuild_logs::Outcome::Exited(Exit::Code(0)))).unwrap();
    store.close().unwrap();
}
