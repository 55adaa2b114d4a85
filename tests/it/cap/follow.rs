//! Followers that are slower than the job: what they were about to read is given up under their eyes.

use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use databuild_logs::{Client, ClientEnd, ClientEvent, Completion, LogQuery};
use tokio::sync::watch;

use super::*;
use crate::support::cli::{Databuild, until};

const CAP: u64 = 300_000;

/// Reads to the end of the run, and every now and then waits until so much more is printed that what comes next is given
/// up.
async fn follow_slowly(
    store: FileLogStore,
    view: View,
    times: bool,
    mut printed: watch::Receiver<u64>,
) -> Shown {
    let options = ReadOptions { follow: true, times, batch_bytes: 3_000, ..ReadOptions::new(view) };
    let mut events = store.read(&id("r"), options).unwrap();
    let mut shown = Shown::default();
    let mut count = 0;
    while let Some(event) = events.next().await {
        shown.event(event.unwrap());
        count += 1;
        if count % 16 == 0 {
            let enough = *printed.borrow() + 2 * CAP;
            // The job may be over first.
            let _ = printed.wait_for(|bytes| *bytes >= enough).await;
        }
    }
    shown
}

/// Lets slow readers of one store follow what another writes, or the same.
async fn follow_while_printing(writing: FileLogStore, reading: FileLogStore) {
    let mut job = Job::start(&writing, "r");
    let views = [(View::STDOUT, false), (View::STDOUT, true), (View::STDERR, false), (View::All, true)];
    let (printed, is_printed) = watch::channel(0);
    let follow = |(view, times)| follow_slowly(reading.clone(), view, times, is_printed.clone());
    let followers = views.map(|view| tokio::spawn(follow(view)));
    let printing = tokio::task::spawn_blocking(move || {
        while *printed.borrow() < 60 * CAP {
            job.print(OUT, 50);
            job.print(ERR, 40);
            printed.send_replace(job.bytes.iter().sum());
            thread::sleep(Duration::from_micros(500));
        }
        let lines = job.printed;
        (lines, job.finish())
    });
    let (printed, run) = printing.await.unwrap();
    for ((view, times), follower) in views.into_iter().zip(followers) {
        let shown = follower.await.unwrap();
        let what = format!("{view:?}, times {times}");
        assert_eq!(shown.end.as_ref(), Some(&run), "{what}");
        let expected = match view {
            View::STDOUT => printed[0],
            View::STDERR => printed[1],
            View::All => printed.iter().sum(),
        };
        assert_eq!(shown.position, expected, "{what}");
        let lost: u64 = shown.gaps.iter().map(|gap| gap.lines).sum();
        assert_eq!(shown.lines + lost, expected, "{what}");
        assert!(!shown.gaps.is_empty(), "{what}: the reader was not slow");
        // Before they were overtaken they were given more than what is there now.
        assert!(lost < run.stdout.dropped_lines + run.stderr.dropped_lines, "{what}");
    }
    check_run(&reading, "r", printed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_follower_is_given_lines_and_holes_and_never_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    follow_while_printing(store.clone(), store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_follower_of_what_another_store_writes_is_given_no_zeros_either() {
    let folder = tempfile::tempdir().unwrap();
    let writing = FileLogStore::open_folder(folder.path(), capped(CAP)).unwrap();
    let reading = FileLogStore::open(folder.path(), capped(0)).unwrap();
    follow_while_printing(writing, reading.clone()).await;
    reading.close().unwrap();
    drop(reading);
    check_folder(folder.path());
}

/// Follows through a service.
async fn follow_service(client: Client, pause: Duration) -> (Shown, Completion) {
    let mut events = client.read(&id("r"), LogQuery { follow: true, ..LogQuery::new(View::STDOUT) });
    let mut shown = Shown::default();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ClientEvent::Lines(batch) => shown.batch(&batch),
            ClientEvent::Gap(hole) => {
                let (stream, after) = (hole.stream, LineNumber(hole.from.0 - 1));
                let (lines, bytes, reason) = (hole.lines, hole.bytes, hole.reason);
                shown.gap(Gap { stream, after, lines, bytes, reason }, after.plus(lines));
            }
            ClientEvent::Reconnecting { why, .. } => panic!("{why}"),
            ClientEvent::End(ClientEnd::Complete(end)) => return (shown, end),
            ClientEvent::End(end) => panic!("{end:?}"),
        }
        tokio::time::sleep(pause).await;
    }
    panic!("no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_of_a_service_follow_a_job_of_another_process() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "0.3");
    let (_service, url) = databuild.serve();
    let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "r", "--", "cat"]);
    let log = databuild.home.path().join("logs/job_runs/r/stdout.log");
    until(|| log.exists(), || "the run does not begin".to_owned());
    let followers = [0, 1, 20].map(|pause| {
        let client = Client::new(&url, None).unwrap();
        tokio::spawn(follow_service(client, Duration::from_millis(pause)))
    });
    let printing = tokio::task::spawn_blocking(move || {
        let mut printed = 0;
        for _ in 0..6_000 {
            let text: String = (printed + 1..=printed + 50).map(|n| line(OUT, n) + "\n").collect();
            printed += 50;
            input.write_all(text.as_bytes()).unwrap();
            thread::sleep(Duration::from_micros(300));
        }
        printed
    });
    let printed = printing.await.unwrap();
    tokio::task::spawn_blocking(move || job.done().code(0)).await.unwrap();
    for follower in followers {
        let (shown, end) = follower.await.unwrap();
        assert_eq!((shown.position, end.lines), (printed, printed));
        assert_eq!(shown.lines + shown.gaps.iter().map(|gap| gap.lines).sum::<u64>(), printed);
    }
    let shown = databuild.run(&["logs", "r", "-n", "1"]).code(0);
    assert_eq!(shown.text().trim_end_matches('\n'), line(OUT, printed));
}

#[test]
fn a_slow_reader_of_the_verbs_output_is_copied_whole_lines_and_the_end() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "0.3");
    let file = databuild.home.path().join("printed");
    let text: String = (1..=60_000).map(|n| line(OUT, n) + "\n").collect();
    fs::write(&file, &text).unwrap();
    let mut command = databuild.command(&["run", "--id", "r", "--", "cat", file.to_str().unwrap()]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let metadata = databuild.home.path().join("logs/job_runs/r/metadata.json");
    until(|| metadata.exists(), || "the job waits for who reads its copy".to_owned());
    let mut copied = String::new();
    child.stdout.take().unwrap().read_to_string(&mut copied).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(copied.len() < text.len(), "the reader was not slow");
    let mut before = 0;
    let mut torn = 0;
    for copy in copied.lines() {
        let number = copy.get(12..20).and_then(|number| number.parse::<u64>().ok());
        match number.filter(|&number| copy == line(OUT, number)) {
            Some(number) => {
                assert!(number > before, "{number} behind {before}");
                before = number;
            }
            // Where the job overtook the copy.
            None => {
                assert!(line(OUT, before + 1).starts_with(copy), "{copy:.200}");
                torn += 1;
            }
        }
    }
    assert!(before == 60_000 && torn <= 2, "up to {before}, {torn} torn");
}
