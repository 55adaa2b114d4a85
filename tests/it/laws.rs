//! The five laws, each a test by its name, of the executable and the service as they are used. Many tests elsewhere go
//! into one law or the other farther; these say what the laws are. The second needs root, to mount a small disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::sync::Arc;

use databuild_logs::{
    FileLogStore, FileStoreOptions, GcRequest, JobMetadata, LogLine, LogStore, ServerOptions, Tombstone,
};
use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::cli::{Databuild, Running, until};
use crate::support::disk::SmallDisk;
use crate::support::http::{ANY_PORT, Server};

fn logs_of(databuild: &Databuild) -> PathBuf {
    databuild.home.path().join("logs")
}

fn metadata(databuild: &Databuild, run: &str) -> JobMetadata {
    let path = logs_of(databuild).join("job_runs").join(run).join("metadata.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A job of this id that is a shell script.
fn job(databuild: &Databuild, run: &str, script: &str) -> Running {
    job_with_input(databuild, run, script).0
}

fn job_with_input(databuild: &Databuild, run: &str, script: &str) -> (Running, ChildStdin) {
    databuild.start_with_input(&["run", "-q", "--id", run, "--cwd", "/", "--", "bash", "-c", script])
}

/// Files are the truth, the index is derived: delete it, damage it, and the same is made of the files.
#[test]
fn law_1_files_are_the_truth_and_the_index_is_derived() {
    let databuild = Databuild::new();
    let scripts = [
        ("many", "seq 20000; seq 20000 >&2"),
        ("failed", "printf 'no end'; exit 3"),
        ("silent", "true"),
        ("by-turns", "for i in {1..300}; do echo out $i; echo err $i >&2; done"),
    ];
    // The index of a service that sees these things happen.
    let indexed = |happens: &dyn Fn()| {
        let (service, url) = databuild.serve();
        happens();
        let asking = Databuild::asking(&url);
        let listed = |more: &[&str]| {
            let runs = asking.run(&[&["runs", "-o", "json"], more].concat());
            runs.text().lines().count()
        };
        let is_over = || listed(&[]) == scripts.len() && listed(&["--state", "running"]) == 0;
        until(is_over, || service.stderr());
        service.signal(Signal::TERM);
        service.done().code(0);
        databuild.run(&["index", "dump", "-o", "json"]).code(0).text().to_owned()
    };
    let before = indexed(&|| {
        for (run, script) in scripts {
            drop(job(&databuild, run, script).done());
        }
    });
    assert!(before.lines().count() > scripts.len());

    let index = logs_of(&databuild).join("index.redb");
    let read = || scripts.map(|(run, _)| databuild.run(&["logs", run, "--all", "-o", "json"]).code(0).stdout);
    let lines = read();
    let damages: [(&str, &dyn Fn()); 4] = [
        ("deleted", &|| fs::remove_file(&index).unwrap()),
        ("emptied", &|| fs::write(&index, "").unwrap()),
        ("overwritten", &|| fs::write(&index, [b'x'; 50_000]).unwrap()),
        ("made anew offline", &|| drop(databuild.run(&["index", "rebuild"]).code(0))),
    ];
    for (what, damage) in damages {
        damage();
        assert!(read() == lines, "{what}: the same lines without it");
        assert_eq!(indexed(&|| ()), before, "{what}: the same index from the files");
    }
    databuild.run(&["index", "check", "--deep"]).code(0);
}

/// The job is never hurt: on a full disk it goes on to its own end, what could not be kept is counted and shown where
/// it is missing, and no line gets the number of another.
#[test]
fn law_2_the_job_is_never_hurt() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MIN_FREE_MB", "0");
    let disk = SmallDisk::at(logs_of(&databuild), 4);
    let at = |step: &str| databuild.home.path().join(step);
    let wait = |step: &str| format!("until test -e {}; do sleep 0.01; done", at(step).display());
    let say = |step: &str| format!("touch {}", at(step).display());
    let script = [
        "seq 1 1000",
        &say("printed"),
        &wait("full"),
        "seq 1001 60000",
        &say("lost"),
        &wait("room"),
        "sleep 1.2",
        "seq 60001 61000; exit 7",
    ];
    let job = job(&databuild, "r", &script.join("\n"));
    let reached = |step: &str| until(|| at(step).exists(), || job.stderr());
    reached("printed");
    let log = logs_of(&databuild).join("job_runs/r/stdout.log");
    until(|| fs::read(&log).unwrap().ends_with(b"\n1000\n"), || job.stderr());
    disk.fill();
    fs::write(at("full"), "").unwrap();
    reached("lost");
    disk.make_room();
    fs::write(at("room"), "").unwrap();
    job.done().code(7);

    let run = metadata(&databuild, "r");
    let shown = databuild.run(&["logs", "r", "-o", "json"]).code(0);
    let lines: Vec<LogLine> = shown.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<u64> = lines.iter().map(|line| line.n.0).collect();
    for (line, number) in lines.iter().zip(&numbers) {
        assert_eq!(line.m.as_deref(), Some(&*number.to_string()), "a line has its own number");
    }
    assert!(numbers.is_sorted() && numbers.contains(&1000) && numbers.contains(&61000));
    assert!(run.stdout.dropped_lines > 10_000, "{run:?}");
    assert_eq!(numbers.len() as u64 + run.stdout.dropped_lines, 61_000, "what is missing is counted");
    shown.says("were not kept: disk full");
}

/// Exactly once per reader: one that is cut off behind any event, again and again and by a restart of the service too,
/// and goes on with the last id that it saw, misses nothing and is given nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn law_3_exactly_once_per_reader() {
    let databuild = Databuild::new();
    let open = || -> Arc<dyn LogStore> {
        Arc::new(FileLogStore::open(logs_of(&databuild), FileStoreOptions::default()).unwrap())
    };
    let script = "for i in {1..400}; do echo out $i; echo err $i >&2; sleep 0.005; done";
    let job = job(&databuild, "r", script);
    let mut server = Server::start_at(ANY_PORT, open(), ServerOptions::default()).await;
    for view in ["stdout", "stderr", "all"] {
        let target = format!("/api/job_runs/r/logs/{view}?follow=true");
        let (mut seen, mut last, mut connections) = (Vec::new(), String::new(), 0);
        while !last.ends_with('!') {
            connections += 1;
            let mut events = server.open(&target, &[("Last-Event-ID", &last)]).await;
            let mut left = connections % 23 + 1;
            'connection: while left > 0 {
                for event in events.events_until(|_| true).await {
                    // Whatever else came with it is cut off, and never seen.
                    if left == 0 {
                        break 'connection;
                    }
                    left -= 1;
                    last.clone_from(&event.id);
                    if last.ends_with('!') {
                        break 'connection;
                    }
                    seen.push(event.data);
                }
            }
            if connections % 20 == 0 {
                server.stop().await.unwrap();
                server = Server::start_at(ANY_PORT, open(), ServerOptions::default()).await;
            }
        }
        for stream in ["out", "err"].into_iter().filter(|stream| view == "all" || view.ends_with(stream)) {
            let of_stream: Vec<&String> = seen.iter().filter(|line| line.starts_with(stream)).collect();
            let printed: Vec<String> = (1..=400).map(|number| format!("{stream} {number}")).collect();
            assert_eq!(of_stream, printed.iter().collect::<Vec<_>>(), "{view}");
        }
        assert_eq!(seen.len(), if view == "all" { 800 } else { 400 }, "{view}");
        assert!(connections > 30, "{view}: {connections}");
    }
    job.done().code(0);
    server.stop().await.unwrap();
}

/// The most memory that a process has had, in kB.
fn peak_memory(process: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Memory does not grow with the log, the line or the reader's slowness: neither that of who records, nor that of who
/// serves readers that do not read.
#[tokio::test(flavor = "multi_thread")]
async fn law_4_memory_does_not_grow() {
    let peaks_of = async |what: &str, print: &str| {
        let databuild = Databuild::new();
        let (service, url) = databuild.serve();
        let go = databuild.home.path().join("go");
        let script = format!("{print}; echo; echo end; until test -e {}; do sleep 0.01; done", go.display());
        let job = job(&databuild, "r", &script);
        let mut stuck = Vec::new();
        for _ in 0..8 {
            let mut reader = TcpStream::connect(url.trim_start_matches("http://")).await.unwrap();
            let request = "GET /api/job_runs/r/logs/stdout?follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n";
            reader.write_all(request.as_bytes()).await.unwrap();
            stuck.push(reader);
        }
        let mut last = Databuild::asking(&url).start(&["logs", "r", "--follow", "-n", "1"]);
        while last.line() != "end" {}
        // When one that does read has all of it, the others have long been given what their connections take.
        let all = Databuild::asking(&url).command(&["logs", "r"]).stdout(Stdio::null()).status();
        assert!(all.unwrap().success(), "{what}");
        let peaks = [peak_memory(&job), peak_memory(&service)];
        fs::write(go, "").unwrap();
        job.done().code(0);
        peaks
    };
    let few = peaks_of("1 MB", "yes 'a line of a log' | head -c 1000000").await;
    for (what, print) in [
        ("40 MB", "yes 'a line of a log' | head -c 40000000"),
        ("a line of 40 MB", "head -c 40000000 /dev/zero | tr '\\0' x"),
    ] {
        let many = peaks_of(what, print).await;
        // The same job took from 9.2 to 9.9 MB. Each reader has a buffer of its own, which 1 MB does not fill.
        for ((few, many), more) in few.into_iter().zip(many).zip([8 * 1024, 16 * 1024]) {
            assert!(many < few + more, "{what}: {many} kB, and {few} kB with 1 MB");
        }
    }
}

/// Every stream ends, and says why: the run is over, its writer died, it was evicted, the service shuts down.
#[tokio::test(flavor = "multi_thread")]
async fn law_5_every_stream_ends() {
    let databuild = Databuild::new();
    let store = FileLogStore::open(logs_of(&databuild), FileStoreOptions::default()).unwrap();
    let store: Arc<dyn LogStore> = Arc::new(store);
    let server = Server::start_at(ANY_PORT, Arc::clone(&store), ServerOptions::default()).await;
    let follow = async |run: &str| {
        let mut events = server.open(&format!("/api/job_runs/{run}/logs/stdout?follow=true"), &[]).await;
        events.events_until(|event| event.data == "begun").await;
        events
    };
    let gate = |step: &str| databuild.home.path().join(step);
    let until_there = |gate: &Path| format!("until test -e {}; do sleep 0.01; done", gate.display());

    let ends = job(&databuild, "ends", &format!("echo begun; {}; exit 4", until_there(&gate("end"))));
    let mut follower = follow("ends").await;
    fs::write(gate("end"), "").unwrap();
    let end = follower.events_until(|event| event.name != "log").await.pop().unwrap();
    ends.done().code(4);
    assert_eq!((end.name.as_str(), state(&end.data)), ("complete", "failed".to_owned()));

    let (dies, _input) = job_with_input(&databuild, "dies", "echo begun; exec cat");
    let mut follower = follow("dies").await;
    dies.signal(Signal::KILL);
    let end = follower.events_until(|event| event.name != "log").await.pop().unwrap();
    assert_eq!((end.name.as_str(), state(&end.data)), ("complete", "lost".to_owned()));

    // More than a connection takes in by itself: the follower is still within it when it goes.
    let script = "line=$(head -c 9999 /dev/zero | tr '\\0' x); for i in {1..3000}; do echo $line; done";
    job(&databuild, "goes", script).done().code(0);
    until(|| store.run(&"goes".parse().unwrap()).is_ok_and(|run| run.state.is_over()), String::new);
    let mut follower = server.open("/api/job_runs/goes/logs/stdout?follow=true", &[]).await;
    store.gc(&GcRequest { max_bytes: Some(1), ..GcRequest::default() }).unwrap();
    let end = follower.events_until(|event| event.name != "log").await.pop().unwrap();
    assert_eq!(end.name, "evicted");
    assert_eq!(serde_json::from_str::<Tombstone>(&end.data).unwrap().id.as_str(), "goes");

    let (goes_on, _input) = job_with_input(&databuild, "goes-on", "echo begun; exec cat");
    let mut follower = follow("goes-on").await;
    let (stopped, events) = tokio::join!(server.stop(), follower.events_until(|event| event.name != "log"));
    stopped.unwrap();
    assert_eq!(events.last().unwrap().name, "shutdown");
    goes_on.signal(Signal::TERM);
    goes_on.done().code(128 + 15);
}

/// The state of a run that is over, from the data of `complete`.
fn state(data: &str) -> String {
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
    data["state"].as_str().unwrap().to_owned()
}
