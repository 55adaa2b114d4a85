//! How soon followers hear that the writer of their run is gone.

use super::*;

/// How long after its writer is gone a follower hears that a run is lost.
fn told_as_lost_after() -> Duration {
    let databuild = databuild();
    let address = HeldAddress::any();
    let service = serve(&databuild, &address);
    let args = ["run", "--id", "r", "--", "sh", "-c", "echo on; exec cat"];
    let (mut writer, _input) = databuild.start_with_input(&args);
    assert_eq!(writer.line(), "on");
    let asking = Databuild::asking(format!("http://{address}"));
    let mut follower = asking.start(&["logs", "-f", "--exit-status", "r"]);
    assert_eq!(follower.line(), "on");
    writer.signal(Signal::KILL);
    // It waits for the process to be gone, and with it the lock.
    drop(writer);
    let killed = Instant::now();
    let done = follower.done();
    let after = killed.elapsed();
    assert!(done.stderr.contains("lost"), "{}", done.stderr);
    assert_ne!(done.code, Some(0));
    let found = metadata(&run_folder(&databuild, "r"));
    assert_eq!((found.state.kind(), found.stdout.lines), (StateKind::Lost, 1));
    asking.run(&["runs", "--state", "lost"]).code(0);
    drop(service);
    after
}

#[test]
fn a_run_whose_writer_is_killed_is_told_as_lost_within_two_seconds() {
    // A machine that is busy with other things may need another try.
    let mut tries = (0..3).map(|_| told_as_lost_after()).inspect(|after| eprintln!("after {after:?}"));
    assert!(tries.any(|after| after < Duration::from_secs(2)), "each time it took longer");
}

/// How many runs are lost at once in the next test.
const LOST: usize = 40;

/// How many ends are written when the last follower of many runs, whose writers died at once, hears of its own.
async fn written_when_all_hear() -> usize {
    let databuild = databuild();
    let trace = databuild.home.path().join("trace");
    // The syncs of all take ten seconds and more.
    let slow =
        ["--seccomp-bpf", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_exit=50000"];
    let service = databuild.start_traced(&trace, &slow, &["serve", "--listen", "127.0.0.1:0"]);
    let client = Client::new(&service.address().unwrap(), None).unwrap();
    let ids: Vec<_> = (0..LOST).map(|n| format!("r{n}")).collect();
    let script = "echo this is line number 1 of the job; exec cat";
    let start = |id| databuild.start_with_input(&["run", "--id", id, "--", "sh", "-c", script]);
    let (mut writers, _inputs): (Vec<_>, Vec<_>) = ids.iter().map(|id| start(id)).unzip();
    writers.iter_mut().for_each(|writer| drop(writer.line()));
    let begun = Arc::new(AtomicUsize::new(0));
    let followers: Vec<_> = ids
        .iter()
        .map(|id| tokio::spawn(follow(client.clone(), id.parse().unwrap(), View::STDOUT, Arc::clone(&begun))))
        .collect();
    until(|| begun.load(Ordering::Relaxed) == LOST, || "not all of them follow".to_owned());
    writers.iter().for_each(|writer| writer.signal(Signal::KILL));
    drop(writers);
    for follower in followers {
        let followed = tokio::time::timeout(Duration::from_secs(30), follower).await.unwrap().unwrap();
        assert_eq!((followed.lines, followed.end.state), (1, StateKind::Lost));
    }
    let written = ids.iter().filter(|id| run_folder(&databuild, id).join("metadata.json").exists()).count();
    for id in &ids {
        assert_eq!(metadata(&run_folder(&databuild, id)).state.kind(), StateKind::Lost, "{id}");
    }
    written
}

/// Many writers that die at once on a slow disk: nobody who follows waits for the syncs of the others.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_runs_that_are_lost_at_once_every_follower_hears_before_the_disk_is_done() {
    // As above, another try may be needed.
    for _ in 0..3 {
        let written = written_when_all_hear().await;
        eprintln!("{written} of {LOST} ends are written");
        if written < LOST / 2 {
            return;
        }
    }
    panic!("each time the last one hears of it when half of the ends are written");
}
