//! The executable on a folder: with a service in front of it, and without.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use databuild_logs::LogLine;

use crate::support::cli::{Databuild, Done, NOBODY, Running};

fn record(databuild: &Databuild, id: &str, script: &str) -> Done {
    databuild.run(&["run", "--quiet", "--id", id, "--", "sh", "-c", script])
}

#[test]
fn a_run_that_can_not_be_listed_is_named() {
    let databuild = Databuild::new();
    databuild.run(&["run", "--quiet", "--id", "good", "--", "true"]).code(0);
    let folder = databuild.home.path().join("logs/job_runs/bad");
    std::fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", folder.join("journal")).unwrap();
    let listed = databuild.run(&["runs"]).code(0).says("a run folder can't be read");
    assert!(listed.text().contains("good") && listed.stderr.contains("bad"), "{listed:?}");
}

#[test]
fn without_a_service_the_folder_is_read() {
    let databuild = Databuild::asking(NOBODY);
    record(&databuild, "alpha", "echo out; echo err >&2; printf end; exit 3").code(3);
    record(&databuild, "beta", "echo other").code(0);
    let shown = |args: &[&str]| databuild.run(&[&["logs"], args].concat());
    assert_eq!(shown(&["alpha"]).code(0).text(), "out\nend\n");
    assert_eq!(shown(&["al", "--stderr"]).code(0).text(), "err\n");
    assert_eq!(shown(&["latest"]).code(0).text(), "other\n");
    assert_eq!(shown(&["alpha", "-o", "raw"]).code(0).text(), "out\nend");
    assert_eq!(shown(&["alpha", "-o", "raw", "-n", "1"]).code(0).text(), "end");
    assert_eq!(shown(&["alpha", "-o", "raw", "--since-line", "0", "-n", "1"]).code(0).text(), "out\n");
    assert_eq!(shown(&["alpha", "--since-line", "1"]).code(0).text(), "end\n");
    shown(&["alpha", "-f", "--exit-status"]).code(3).says("run alpha failed with exit code 3 after");
    shown(&["unknown"]).code(5).says("does not know the run either");
    let all = shown(&["alpha", "--all", "-o", "json"]).code(0);
    let lines: Vec<LogLine> = all.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|line| line.t.is_some()));
    let runs = databuild.run(&["runs"]).code(0);
    let first: Vec<_> = runs.text().lines().skip(1).map(|row| row.split(' ').next().unwrap()).collect();
    assert_eq!(first, ["beta", "alpha"]);
}

#[test]
fn a_run_that_goes_on_is_followed_in_its_folder() {
    let databuild = Databuild::asking(NOBODY);
    let gate = databuild.home.path().join("gate");
    let script = format!("echo one; until [ -e {} ]; do sleep 0.01; done; echo two", gate.display());
    let run = databuild.start(&["run", "--quiet", "--id", "r", "--", "sh", "-c", &script]);
    let stdout = databuild.home.path().join("logs/job_runs/r/stdout.log");
    crate::support::cli::until(|| stdout.exists(), || "the run does not start".to_owned());
    let mut follower = databuild.start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), "one");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(follower.line(), "two");
    follower.done().code(0).says("run r succeeded in ");
    run.done().code(0);
}

#[test]
fn a_service_follows_what_others_write_into_its_folder() {
    let databuild = Databuild::new();
    let (service, url) = databuild.serve();
    let asking = Databuild::asking(&url);
    let mut follower = asking.start(&["logs", "-f", "r"]);
    record(&databuild, "r", "echo one; echo two").code(0);
    assert_eq!([follower.line(), follower.line()], ["one", "two"]);
    follower.done().code(0).says("run r succeeded");
    let runs = asking.run(&["runs", "-o", "json"]).code(0);
    assert!(runs.text().contains("\"job_run_id\":\"r\""), "{runs:?}");
    service.signal(rustix::process::Signal::TERM);
    service.done().code(0);
}

#[test]
fn what_the_service_does_not_know_is_read_in_the_folder() {
    let elsewhere = Databuild::new();
    let (_service, url) = elsewhere.serve();
    let databuild = Databuild::asking(&url);
    record(&databuild, "here", "echo here").code(0);
    assert_eq!(databuild.run(&["logs", "here"]).code(0).text(), "here\n");
    assert_eq!(databuild.run(&["logs", "latest"]).code(0).text(), "here\n");
    let done = databuild.run(&["logs", "nowhere"]).code(3);
    done.says(&format!("there is no run nowhere in the service at {url} or the folder "));
}

#[test]
fn two_services_cannot_hold_one_folder() {
    let databuild = Databuild::new();
    let (_service, _) = databuild.serve();
    let done = databuild.run(&["serve", "--listen", "127.0.0.1:0"]).code(1);
    done.says("is in use by another process").says("hint: one service holds a log folder: stop the other");
}

#[test]
fn a_log_folder_that_cannot_be_made_or_written_is_named() {
    let databuild = Databuild::asking(NOBODY);
    for dir in ["/dev/null/logs", "/proc/logs"] {
        let serve = databuild.run(&["serve", "--listen", "127.0.0.1:0", "--log-dir", dir]).code(1);
        serve.says(dir).says("--log-dir takes another");
        let run = databuild.run(&["run", "--log-dir", dir, "--", "true"]).code(125);
        run.says("databuild: ").says(&format!("the log folder is {dir}: --log-dir takes another"));
    }
}

/// A folder of root's, and the executable as somebody else. Who is not root can't write there either.
#[test]
fn a_log_folder_that_is_there_and_can_not_be_written_is_named() {
    let databuild = Databuild::asking(NOBODY);
    let is_root = rustix::process::geteuid().is_root();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(databuild.home.path(), 0o755);
    let dir = databuild.home.path().join("logs");
    mode(&dir, if is_root { 0o755 } else { 0o555 });
    // A place where another user finds it, whatever the way to our own.
    let executable = databuild.home.path().join("databuild");
    fs::copy(env!("CARGO_BIN_EXE_databuild"), &executable).unwrap();
    let done = |args: &[&str]| {
        let mut command = Command::new(&executable);
        command.args(args).env_clear().env("DATABUILD_LOG_DIR", &dir).env("HOME", "/nonexistent");
        if is_root {
            command.uid(65_534).gid(65_534);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(command.spawn().unwrap()).done()
    };
    let hint = format!("the log folder is {}: --log-dir takes another", dir.display());
    let run = done(&["run", "--", "true"]).code(125).says("Permission denied").says(&hint);
    assert_eq!(run.text(), "");
    done(&["serve", "--listen", "127.0.0.1:0"]).code(1).says("Permission denied").says(&hint);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn a_service_that_is_killed_and_started_again_costs_no_line() {
    let databuild = Databuild::new();
    let (service, url) = databuild.serve();
    let gate = |n: u32| databuild.home.path().join(format!("gate-{n}"));
    let wait = |n: u32| format!("until [ -e {} ]; do sleep 0.01; done", gate(n).display());
    let script = format!("echo 1; {}; echo 2; {}; echo 3", wait(1), wait(2));
    let run = databuild.start(&["run", "--quiet", "--id", "r", "--", "sh", "-c", &script]);
    let mut follower = Databuild::asking(&url).start(&["logs", "-f", "r"]);
    assert_eq!(follower.line(), "1");
    service.signal(rustix::process::Signal::KILL);
    assert_eq!(service.done().code, None);
    std::fs::write(gate(1), "").unwrap();
    let again = databuild.start(&["serve", "--listen", url.strip_prefix("http://").unwrap()]);
    again.wait_for("listening on ");
    assert_eq!(follower.line(), "2");
    std::fs::write(gate(2), "").unwrap();
    assert_eq!(follower.line(), "3");
    let done = follower.done().code(0).says("run r succeeded");
    assert_eq!(done.text(), "1\n2\n3\n");
    run.done().code(0);
}

#[test]
fn a_folder_given_by_hand_comes_before_a_service_that_nobody_chose() {
    let databuild = Databuild::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let dir = elsewhere.path().to_str().unwrap();
    record(&databuild, "here", "echo here").code(0);
    databuild.run(&["--log-dir", dir, "run", "--quiet", "--id", "there", "--", "echo", "there"]).code(0);
    assert_eq!(databuild.run(&["--log-dir", dir, "logs", "latest"]).code(0).text(), "there\n");
    let runs = databuild.run(&["--log-dir", dir, "runs", "-o", "json"]).code(0);
    assert_eq!(
        (runs.text().lines().count(), runs.text().contains("\"there\"")),
        (1, true),
        "{}",
        runs.text()
    );
}

#[test]
fn what_the_runner_has_to_say_of_a_run_is_shown_with_its_log() {
    let databuild = Databuild::asking(NOBODY);
    databuild.run(&["run", "--id", "r", "--", "no-such-command"]).code(127);
    databuild.run(&["logs", "r"]).code(0).says("no-such-command");
    databuild.run(&["logs", "r", "-f", "--exit-status"]).code(127).says("run r failed with exit code 127");
}
