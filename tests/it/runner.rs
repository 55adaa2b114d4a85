//! Real jobs, recorded.
#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

mod directives;
mod verb;

use std::ffi::OsString;
use std::fs;
use std::future::Future;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use databuild_logs::{
    ByteOffset, Exit, JobCommand, JobEnd, JobEvent, JobMetadata, JobRunId, JobSignal, LogError, LogStore,
    MemoryLogStore, Outcome, RunSpec, RunState, RunnerError, RunnerOptions, StateKind, Stream,
    SubProcessBackend, SubProcessRunning, Tee,
};

/// A wait that is this long means that what is waited for does not happen.
const TOO_LONG: Duration = Duration::from_secs(60);

struct Bench {
    store: Arc<MemoryLogStore>,
    options: RunnerOptions,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            store: Arc::default(),
            options: RunnerOptions { kill_grace: TOO_LONG, outlive_grace: TOO_LONG },
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A job in this bench's folder.
    fn job(&self, command: &[&str]) -> JobCommand {
        let mut job = JobCommand::new(RunSpec::new(JobRunId::generate()), command);
        job.cwd = Some(self.folder.path().to_owned());
        job
    }

    fn try_start(&self, job: JobCommand) -> Result<SubProcessRunning, RunnerError> {
        let store: Arc<dyn LogStore> = self.store.clone();
        SubProcessBackend::with_options(store, self.options).start(job)
    }

    fn sh(&self, script: &str) -> SubProcessRunning {
        self.try_start(self.job(&["sh", "-c", script])).unwrap()
    }

    fn bytes(&self, id: &JobRunId, stream: Stream) -> Vec<u8> {
        self.store.read_bytes(id, stream, ByteOffset(0), usize::MAX).unwrap().to_vec()
    }

    fn stdout(&self, running: &SubProcessRunning) -> String {
        String::from_utf8(self.bytes(running.job_run_id(), Stream::Stdout)).unwrap()
    }

    fn until_stdout(&self, running: &SubProcessRunning, text: &str) {
        until(&format!("{text:?} on stdout"), || self.stdout(running) == text);
    }

    /// A named pipe, by which the test says to a job when to go on. Good for once: a second reader could find the
    /// first writer still there.
    fn gate(&self, name: &str) {
        assert!(Command::new("mkfifo").arg(self.path(name)).status().unwrap().success());
    }

    /// Lets the job that waits at this gate go on.
    fn open_gate(&self, name: &str) {
        fs::write(self.path(name), "go\n").unwrap();
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < TOO_LONG, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(2 * TOO_LONG, future).await.expect("no end in sight") })
}

fn end(running: &SubProcessRunning) -> Arc<JobEnd> {
    block_on(running.wait())
}

fn recorded(end: &JobEnd) -> &JobMetadata {
    end.metadata.as_ref().unwrap()
}

/// The events up to the end, without it.
fn events(running: &mut SubProcessRunning) -> Vec<JobEvent> {
    block_on(async {
        let mut events = Vec::new();
        while let Some(event) = running.next_event().await {
            events.push(event);
        }
        assert!(matches!(events.pop(), Some(JobEvent::Ended(_))));
        events
    })
}

#[test]
fn a_log_holds_exactly_the_jobs_bytes() {
    let bench = Bench::new();
    let running = bench.sh(r"printf 'a\0b\n\377\376\r\nno end'; printf 'x\0' >&2; exit 3");
    let end = end(&running);
    assert_eq!(end.outcome, Outcome::Exited(Exit::Code(3)));
    assert_eq!(bench.bytes(running.job_run_id(), Stream::Stdout), b"a\0b\n\xff\xfe\r\nno end");
    assert_eq!(bench.bytes(running.job_run_id(), Stream::Stderr), b"x\0");
    let run = recorded(&end);
    assert_eq!((run.state.kind(), run.stdout.lines, run.note.as_deref()), (StateKind::Failed, 3, None));
    assert_eq!(run.spec.command[0], "sh");
}

#[test]
fn the_order_across_the_streams_is_that_of_arrival() {
    let bench = Bench::new();
    bench.gate("gate-1");
    bench.gate("gate-2");
    let running = bench.sh("echo 1 >&2; read _ <gate-1; echo 2; read _ <gate-2; echo 3 >&2; exit 0");
    let stderr = |text: &[u8]| bench.bytes(running.job_run_id(), Stream::Stderr) == text;
    until("1", || stderr(b"1\n"));
    bench.open_gate("gate-1");
    bench.until_stdout(&running, "2\n");
    bench.open_gate("gate-2");
    end(&running);
    let read = databuild_logs::ReadOptions::new(databuild_logs::View::All);
    let mut events = bench.store.read(running.job_run_id(), read).unwrap();
    let mut lines = String::new();
    block_on(async {
        use futures_util::StreamExt;
        while let Some(event) = events.next().await {
            if let databuild_logs::ReadEvent::Lines(batch) = event.unwrap() {
                lines.push_str(std::str::from_utf8(&batch.bytes).unwrap());
            }
        }
    });
    assert_eq!(lines, "1\n2\n3\n");
}

#[test]
fn output_is_recorded_while_the_job_runs() {
    let bench = Bench::new();
    bench.gate("gate");
    let mut running = bench.sh("printf unfinished; read _ <gate");
    bench.until_stdout(&running, "unfinished");
    assert!(running.poll().is_empty());
    assert!(!running.has_ended());
    bench.open_gate("gate");
    assert_eq!(end(&running).exit(), Some(Exit::Code(0)));
    assert!(matches!(&running.poll()[..], [JobEvent::Ended(_)]));
    assert!(running.poll().is_empty());
}

#[test]
fn a_job_that_closes_its_streams_early_runs_on() {
    let bench = Bench::new();
    bench.gate("gate-1");
    bench.gate("gate-2");
    let script = "echo a; exec >&-; read _ <gate-1; echo b >&2; exec 2>&-; read _ <gate-2; exit 4";
    let running = bench.sh(script);
    bench.until_stdout(&running, "a\n");
    bench.open_gate("gate-1");
    until("b", || bench.bytes(running.job_run_id(), Stream::Stderr) == b"b\n");
    assert!(!running.has_ended());
    bench.open_gate("gate-2");
    assert_eq!(end(&running).outcome, Outcome::Exited(Exit::Code(4)));
}

#[test]
fn a_job_that_forks_and_leaves_is_collected_until_its_pipes_close() {
    let bench = Bench::new();
    bench.gate("gate");
    let running = bench.sh("{ read _ <gate; echo late; } & echo early; exit 5");
    bench.until_stdout(&running, "early\n");
    bench.open_gate("gate");
    let end = end(&running);
    assert_eq!(bench.stdout(&running), "early\nlate\n");
    assert_eq!((end.outcome, end.note.as_deref()), (Outcome::Exited(Exit::Code(5)), None));
}

#[test]
fn output_of_processes_that_stay_is_cut_off_and_the_run_says_so() {
    let mut bench = Bench::new();
    bench.options.outlive_grace = Duration::from_millis(20);
    bench.gate("gate");
    let running = bench.sh("{ read _ <gate; echo too late; } & echo early; exit 0");
    let end = end(&running);
    let run = recorded(&end);
    assert_eq!(run.state.kind(), StateKind::Succeeded);
    let note = "output of processes that outlived the command was cut off after 20ms";
    assert_eq!(run.note.as_deref(), Some(note));
    bench.open_gate("gate");
    assert_eq!(bench.stdout(&running), "early\n");
}

#[test]
fn a_flood_from_processes_that_stay_is_cut_off_too() {
    let mut bench = Bench::new();
    bench.options.outlive_grace = Duration::from_millis(1);
    let running = bench.sh("yes & exit 0");
    let end = end(&running);
    assert!(recorded(&end).note.as_deref().is_some_and(|note| note.contains("cut off")));
}

#[test]
fn a_binary_flood_is_kept_byte_for_byte() {
    let bench = Bench::new();
    let mut state = 1u64;
    let flood: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    })
    .take(5_000_000)
    .collect();
    fs::write(bench.path("flood"), &flood).unwrap();
    let running = bench.sh("cat flood & cat flood >&2; wait");
    assert_eq!(end(&running).exit(), Some(Exit::Code(0)));
    for stream in Stream::BOTH {
        assert!(bench.bytes(running.job_run_id(), stream) == flood, "{stream} differs");
    }
}

#[test]
fn a_command_that_cannot_be_started_leaves_a_failed_run_that_says_why() {
    let bench = Bench::new();
    fs::write(bench.path("plain"), "text").unwrap();
    fs::write(bench.path("garbage"), [0xff; 64]).unwrap();
    fs::set_permissions(bench.path("garbage"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut elsewhere = bench.job(&["ls"]);
    elsewhere.cwd = Some(bench.path("nowhere"));
    let mut with_nul = bench.job(&["echo"]);
    with_nul.args.push(OsString::from_vec(b"a\0b".to_vec()));
    let nothing: [&str; 0] = [];
    for (job, code, why) in [
        (bench.job(&["no-such-command-anywhere"]), 127, "no-such-command-anywhere: command not found"),
        (bench.job(&["./missing"]), 127, "./missing: command not found"),
        (bench.job(&nothing), 127, "command not found"),
        (bench.job(&["./plain"]), 126, "ermission denied"),
        (bench.job(&["/"]), 126, "/: "),
        (bench.job(&["./garbage"]), 126, "./garbage: "),
        (elsewhere, 125, "nowhere can't be entered: "),
        (with_nul, 125, "starting the command: "),
    ] {
        let id = job.spec.id.clone();
        let error = bench.try_start(job).unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        assert!(error.to_string().contains(why), "{error}");
        let run = bench.store.run(&id).unwrap();
        assert_eq!(run.state.exit(), Some(Exit::Code(code.into())));
        assert_eq!(run.note, Some(error.to_string()));
    }
}

#[test]
fn an_id_that_is_taken_is_refused_before_anything_is_executed() {
    let bench = Bench::new();
    let job = || {
        let mut job = bench.job(&["sh", "-c", "echo x >>ran"]);
        job.spec.id = "twice".parse().unwrap();
        job
    };
    end(&bench.try_start(job()).unwrap());
    let error = bench.try_start(job()).unwrap_err();
    assert!(matches!(error, RunnerError::Log(LogError::AlreadyExists { .. })), "{error}");
    assert_eq!(error.exit_code(), 125);
    assert_eq!(fs::read_to_string(bench.path("ran")).unwrap(), "x\n");
}

#[test]
fn a_cancelled_job_may_end_in_its_own_way() {
    let bench = Bench::new();
    let running = bench.sh("trap 'echo cleaned up; exit 9' TERM; echo ready; while :; do sleep 0.01; done");
    bench.until_stdout(&running, "ready\n");
    running.cancel();
    running.cancel();
    let end = end(&running);
    assert_eq!(end.outcome, Outcome::Cancelled(Exit::Code(9)));
    assert_eq!(bench.stdout(&running), "ready\ncleaned up\n");
    assert_eq!(recorded(&end).state.kind(), StateKind::Cancelled);
}

#[test]
fn a_cancelled_job_that_does_not_listen_is_killed_with_its_whole_group() {
    let mut bench = Bench::new();
    bench.options.kill_grace = Duration::from_millis(20);
    // The end comes only when the pipes close, so only when the inner shell is gone too.
    let deaf = "trap '' TERM; while :; do sleep 0.01; done";
    let running = bench.sh(&format!("trap '' TERM; sh -c \"{deaf}\" & echo ready; {deaf}"));
    bench.until_stdout(&running, "ready\n");
    running.cancel();
    let end = end(&running);
    assert_eq!((end.outcome, end.note.as_deref()), (Outcome::Cancelled(Exit::Signal(9)), None));
}

#[test]
fn a_stopped_job_can_be_cancelled_and_hears_a_signal_that_is_passed_on() {
    let end_it: [fn(&SubProcessRunning); 2] =
        [|running| running.cancel(), |running| assert!(running.forward(JobSignal::Terminate))];
    for end_it in end_it {
        let bench = Bench::new();
        let running = bench.sh("trap 'exit 9' TERM; echo ready; kill -STOP $$; exit 1");
        bench.until_stdout(&running, "ready\n");
        let stat = format!("/proc/{}/stat", running.process_id());
        until("the stop", || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T ")));
        end_it(&running);
        assert_eq!(end(&running).outcome, Outcome::Cancelled(Exit::Code(9)));
    }
}

#[test]
fn a_forwarded_signal_leaves_the_decision_to_the_job() {
    let bench = Bench::new();
    let script = "trap 'echo int' INT; trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done";
    let running = bench.sh(script);
    bench.until_stdout(&running, "ready\n");
    assert!(running.forward(JobSignal::Interrupt));
    bench.until_stdout(&running, "ready\nint\n");
    assert!(running.forward(JobSignal::Interrupt));
    bench.until_stdout(&running, "ready\nint\nint\n");
    assert!(running.forward(JobSignal::Terminate));
    assert_eq!(end(&running).outcome, Outcome::Cancelled(Exit::Code(0)));
    assert!(!running.forward(JobSignal::Interrupt), "the job has ended");
}

#[test]
fn a_signal_from_somebody_else_is_a_failure_and_a_late_cancel_changes_nothing() {
    let bench = Bench::new();
    bench.gate("gate");
    let running = bench.sh("{ read _ <gate; echo late; } & kill -USR1 $$");
    let stat = format!("/proc/{}/stat", running.process_id());
    until("the death", || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")));
    running.cancel();
    assert_eq!(end(&running).outcome, Outcome::Exited(Exit::Signal(10)));
}

#[test]
fn a_job_whose_caller_leaves_is_recorded_to_its_end() {
    let bench = Bench::new();
    bench.gate("gate");
    let running = bench.sh("read _ <gate; echo done");
    let id = running.job_run_id().clone();
    drop(running);
    bench.open_gate("gate");
    until("the end", || matches!(bench.store.run(&id).unwrap().state, RunState::Succeeded { .. }));
    assert_eq!(bench.bytes(&id, Stream::Stdout), b"done\n");
}

#[test]
fn a_jobs_input_is_empty_unless_it_is_given_ours() {
    let bench = Bench::new();
    let running = bench.sh("cat; echo end of input");
    assert_eq!(end(&running).exit(), Some(Exit::Code(0)));
    assert_eq!(bench.stdout(&running), "end of input\n");
}

#[test]
fn a_tee_copies_and_one_that_is_gone_hurts_nothing() {
    let bench = Bench::new();
    let (closed, stdout) = std::io::pipe().unwrap();
    drop(closed);
    let (mut copy, stderr) = std::io::pipe().unwrap();
    let mut job = bench.job(&["sh", "-c", "echo a; echo b >&2; echo c; echo d >&2"]);
    job.tee = Some(Tee::new(stdout.into(), stderr.into()));
    let running = bench.try_start(job).unwrap();
    assert_eq!(end(&running).exit(), Some(Exit::Code(0)));
    assert_eq!(bench.stdout(&running), "a\nc\n");
    let mut copied = String::new();
    copy.read_to_string(&mut copied).unwrap();
    assert_eq!(copied, "b\nd\n");
}

#[test]
fn a_tee_that_nobody_reads_holds_up_neither_the_job_nor_its_record() {
    let bench = Bench::new();
    let (mut stuck, stdout) = std::io::pipe().unwrap();
    let (errors, stderr) = std::io::pipe().unwrap();
    let mut job = bench.job(&["sh", "-c", "seq 1 1000000; echo done >&2; exit 4"]);
    job.tee = Some(Tee::new(stdout.into(), stderr.into()));
    let running = bench.try_start(job).unwrap();
    assert_eq!(end(&running).exit(), Some(Exit::Code(4)));
    let text: String = (1..=1_000_000).map(|number| format!("{number}\n")).collect();
    assert!(bench.stdout(&running) == text, "all of it is recorded");
    // And who reads it later gets all of it too.
    let mut copied = String::new();
    stuck.read_to_string(&mut copied).unwrap();
    assert!(copied == text);
    assert_eq!(std::io::read_to_string(errors).unwrap(), "done\n");
}

#[test]
fn a_reader_that_is_slow_now_and_then_gets_every_byte_once() {
    let bench = Bench::new();
    let (mut slow, stdout) = std::io::pipe().unwrap();
    let script = "for i in $(seq 40); do head -c 100000 /dev/urandom | base64 -w 97; sleep 0.01; done";
    let mut job = bench.job(&["sh", "-c", script]);
    job.tee = Some(Tee::new(stdout.into(), std::fs::File::create("/dev/null").unwrap().into()));
    let running = bench.try_start(job).unwrap();
    let (mut copied, mut piece, mut rest) = (Vec::new(), vec![0; 70_000], 0);
    loop {
        let read = slow.read(&mut piece).unwrap();
        if read == 0 {
            break;
        }
        copied.extend_from_slice(&piece[..read]);
        rest += read;
        if rest > 1_500_000 {
            rest = 0;
            std::thread::sleep(Duration::from_millis(150));
        }
    }
    assert_eq!(end(&running).exit(), Some(Exit::Code(0)));
    assert!(copied == bench.stdout(&running).into_bytes());
}

#[test]
fn many_jobs_run_side_by_side() {
    let bench = Bench::new();
    let jobs: Vec<_> = (0..40).map(|n| (n, bench.sh(&format!("echo {n}; exit {n}")))).collect();
    for (n, running) in jobs {
        assert_eq!(end(&running).exit(), Some(Exit::Code(n)));
        assert_eq!(bench.stdout(&running), format!("{n}\n"));
    }
}
