//! A run with a cap, of whose log somebody else takes something while it goes on: that joins what is given up.

use std::thread::sleep;
use std::time::Duration;

use super::*;

const CAP: u64 = 400_000;

/// Prints to both streams by turns, `before` bytes, then has the log of standard output cut to `length`, then prints
/// `after` bytes; gives how many lines of standard output are left of how many that were printed before.
async fn lines_left(before: u64, length: u64, after: u64) -> (u64, u64) {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    let print = |job: &mut Job, bytes: u64| {
        let until = job.bytes[0] + bytes;
        while job.bytes[0] < until {
            job.print(OUT, 40);
            job.print(ERR, 1);
        }
    };
    print(&mut job, before);
    let log = folder.path().join("job_runs/r/stdout.log");
    fs::File::options().write(true).open(log).unwrap().set_len(length).unwrap();
    let printed_before = job.printed[0];
    // Whether a log is shorter is looked at once in a millisecond.
    sleep(Duration::from_millis(2));
    print(&mut job, after);
    let printed = job.printed;
    let run = job.finish();

    check_run_with(&store, "r", printed, [GapReason::Corrupt, GapReason::RunSizeCap]).await;
    assert!(blocks(folder.path(), "r") <= CAP + 6 * 4096, "{}", blocks(folder.path(), "r"));
    let begin = read(&store, "r", ReadOptions::new(View::STDOUT)).await.gaps[0].after.0;
    store.close().unwrap();
    check_folder(folder.path());
    assert!(run.stdout.dropped_lines >= printed_before - begin, "{run:?}");
    (begin, printed_before)
}

#[tokio::test]
async fn a_log_that_is_emptied_before_its_run_is_too_large_has_one_hole_and_so_has_it_after() {
    assert_eq!(lines_left(CAP / 8, 0, CAP / 8).await.0, 0);
    assert_eq!(lines_left(CAP / 8, 0, 3 * CAP).await.0, 0);
    assert_eq!(lines_left(CAP / 2, 0, 3 * CAP).await.0, 0);
}

#[tokio::test]
async fn a_log_that_is_emptied_after_its_run_was_too_large_has_one_hole() {
    assert_eq!(lines_left(3 * CAP, 0, CAP / 8).await.0, 0);
    assert_eq!(lines_left(3 * CAP, 0, 3 * CAP).await.0, 0);
}

#[tokio::test]
async fn what_is_left_of_the_head_of_a_log_that_is_cut_is_kept_and_no_more_than_the_head() {
    let (left, _) = lines_left(CAP / 8, 20_000, 3 * CAP).await;
    let (all_of_head, of) = lines_left(CAP / 2, CAP * 2 / 5, 3 * CAP).await;
    assert!(0 < left && left < all_of_head && all_of_head < of, "{left}, {all_of_head} of {of}");
    let (as_much, _) = lines_left(3 * CAP, 5 * CAP / 2, CAP / 8).await;
    assert!(as_much <= all_of_head, "{as_much}");
}
