//! `databuild run`: a real job, recorded by one command.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use super::*;

/// `databuild run` with a log folder of its own.
fn verb(log_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_databuild"));
    command.env("DATABUILD_LOG_DIR", log_dir).arg("run").stdin(Stdio::null());
    command
}

#[test]
fn the_verb_ends_its_job_and_itself_however_stuck_the_reader_of_its_output_is() {
    let logs = tempfile::tempdir().unwrap();
    let mut verb = verb(logs.path());
    verb.args(["--id", "x", "--", "sh", "-c", "trap 'exit 3' TERM; yes & wait"]);
    let mut running = verb.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let log = logs.path().join("job_runs/x/stdout.log");
    until("more is recorded than pipes take", || fs::metadata(&log).is_ok_and(|log| log.len() > 4 << 20));
    let pid = Pid::from_child(&running);
    let terminate = || kill_process(pid, Signal::TERM).unwrap();
    terminate();
    let metadata = logs.path().join("job_runs/x/metadata.json");
    until("the end is recorded", || metadata.exists());
    let mut status = None;
    until("the end of the verb", || {
        terminate();
        status = running.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(3));
}

#[test]
fn the_verb_says_which_directives_it_can_not_use() {
    let logs = tempfile::tempdir().unwrap();
    let script =
        "echo 'DATABUILD_MISSING_DEPS_JSON:{oops'; for i in $(seq 20); do echo 'DATABUILD_X_JSON:}'; done";
    let output = verb(logs.path()).args(["-q", "--", "sh", "-c", script]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("databuild: a line DATABUILD_MISSING_DEPS_JSON can't be used: "), "{said}");
    assert!(said.ends_with("databuild: nor can 13 other lines of that kind\n"), "{said}");
    assert_eq!((output.status.code(), said.lines().count()), (Some(0), 9));
}

#[test]
fn the_verb_says_that_its_copy_is_not_whole_and_that_the_log_is() {
    let logs = tempfile::tempdir().unwrap();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut verb = verb(logs.path());
    let output =
        verb.args(["--id", "x", "--", "sh", "-c", "echo out; exit 3"]).stdout(full).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let what = "databuild: the copy to standard output is not whole: No space left on device";
    assert!(said.starts_with(what) && said.ends_with("`databuild logs` has the rest\n"), "{said}");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(fs::read(logs.path().join("job_runs/x/stdout.log")).unwrap(), b"out\n");
}

#[test]
fn the_verb_copies_both_streams_and_gives_the_commands_exit_code() {
    let logs = tempfile::tempdir().unwrap();
    let script = ["--", "sh", "-c", "echo out; echo err >&2; exit 3"];
    let output = verb(logs.path()).args(script).output().unwrap();
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(output.status.code(), Some(3));
    let output = verb(logs.path()).arg("-q").args(script).output().unwrap();
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b""[..], &b""[..]));
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn the_verb_says_with_its_exit_code_what_went_wrong() {
    let logs = tempfile::tempdir().unwrap();
    let code = |args: &[&str]| verb(logs.path()).args(args).output().unwrap().status.code();
    assert_eq!(code(&["--", "sh", "-c", "kill -KILL $$"]), Some(137));
    assert_eq!(code(&["--cwd", "/nowhere", "--", "true"]), Some(125));
    for nonsense in [&["--id", "../x", "--", "true"][..], &["--no-such-flag", "--", "true"], &[]] {
        assert_eq!(code(nonsense), Some(125), "{nonsense:?}");
    }
    assert_eq!(code(&["--", "/"]), Some(126));
    let output = verb(logs.path()).args(["--", "no-such-command-anywhere"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(output.stderr, b"databuild: no-such-command-anywhere: command not found\n");
}

#[test]
fn the_verb_gives_the_command_its_folder_environment_and_input() {
    let logs = tempfile::tempdir().unwrap();
    let mut child = verb(logs.path())
        .args(["--cwd", "/", "--env", "A=1=2", "--env", "B=", "--", "sh", "-c", "pwd; echo \"$A$B\"; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"input\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "/\n1=2\ninput\n");
}

#[test]
fn the_verb_passes_signals_on_and_leaves_the_decision_to_the_command() {
    let logs = tempfile::tempdir().unwrap();
    let script = "trap 'echo int' INT; trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    let mut child =
        verb(logs.path()).args(["--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let pid = Pid::from_child(&child);
    let mut expect = |line: &str| assert_eq!(lines.next().as_deref(), Some(line));
    expect("ready");
    kill_process(pid, Signal::INT).unwrap();
    expect("int");
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

#[test]
fn a_reader_of_the_verb_that_leaves_does_not_hurt_the_command() {
    let logs = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let done = folder.path().join("done");
    let mut child = verb(logs.path())
        .arg("--cwd")
        .arg(folder.path())
        .args(["--", "sh", "-c", "seq 100000 && echo yes >done"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(fs::read_to_string(done).unwrap(), "yes\n");
}

#[test]
fn the_verb_records_the_run_and_refuses_an_id_that_exists() {
    let logs = tempfile::tempdir().unwrap();
    let args = ["--id", "x", "--partition", "data/a", "--label", "k=v=w", "-q", "--", "echo", "hello"];
    assert_eq!(verb(logs.path()).args(args).status().unwrap().code(), Some(0));
    let run = logs.path().join("job_runs/x");
    assert_eq!(fs::read(run.join("stdout.log")).unwrap(), b"hello\n");
    let json: JobMetadata = serde_json::from_slice(&fs::read(run.join("metadata.json")).unwrap()).unwrap();
    assert_eq!(json.spec.building_partitions, ["data/a"]);
    assert_eq!(json.spec.labels["k"], "v=w");
    let output = verb(logs.path()).args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8(output.stderr).unwrap().contains("exists already"));
}
