//! What a reader is given of a run that was larger than it may be, and what is on the disk.

use databuild_logs::{ByteOffset, RunQuery, ServerOptions, Start};
use proptest::prelude::*;

use super::*;
use crate::support::cli::{Databuild, Running, until};
use crate::support::disk::SmallDisk;
use crate::support::http::Server;

const CAP: u64 = 400_000;

/// One hole of each stream, of lines that came by turns: whoever is cut off behind any event is told of what is missing
/// and not told yet, all of it.
#[tokio::test]
async fn a_reader_cut_off_between_the_holes_of_both_streams_is_told_of_all_that_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, 2 * CAP);
    for _ in 0..400 {
        job.print(ERR, 40);
        job.print(OUT, 20);
    }
    job.finish();
    let mut events = store.read(&id("r"), ReadOptions::new(View::All)).unwrap();
    let (mut told, mut places) = (Vec::new(), vec![(0, LineNumber(0))]);
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Gap { gap, next } => {
                told.push(gap);
                places.push((told.len(), next));
            }
            ReadEvent::Lines(batch) => places.push((told.len(), LineNumber(batch.last_position().0))),
            ReadEvent::End(_) => {}
        }
    }
    assert!(told.windows(2).any(|pair| pair[0].stream != pair[1].stream), "{told:?}");
    for &(before, at) in &places {
        let resumed = ReadOptions { start: Start::After(at), ..ReadOptions::new(View::All) };
        let again = read(&store, "r", resumed).await.gaps;
        let repeats_one = before > 0 && again == told[before - 1..];
        assert!(again == told[before..] || repeats_one, "behind {at:?} of {told:?}: {again:?}");
    }
}

/// Where the head and the tail of a log are by its journal: the part between them.
fn given_up(store: &dyn LogStore, run: &str, stream: Stream) -> std::ops::Range<u64> {
    let part = store.given_up(&id(run), stream).unwrap().expect("something is given up");
    part.start.0..part.end.0
}

#[tokio::test]
async fn head_and_tail_of_a_stream_are_kept_to_the_byte_and_the_numbers_of_the_hole_are_true() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, CAP - 10_000);
    assert_eq!(store.given_up(&id("r"), OUT).unwrap(), None, "it is not too large yet");
    job.print_bytes(OUT, 4 * CAP);
    let (printed, bytes) = (job.printed, job.bytes[0]);
    let run = job.finish();

    let all: String = (1..=printed[0]).map(|n| line(OUT, n) + "\n").collect();
    let part = given_up(&store, "r", OUT);
    assert!((CAP / 4 - 200..=CAP / 4).contains(&part.start), "the head is a quarter: {part:?}");
    let tail = bytes - part.end;
    assert!((CAP * 2 / 5..=CAP * 3 / 4).contains(&tail), "the tail is the rest: {tail}");
    let log = fs::read(folder.path().join("job_runs/r/stdout.log")).unwrap();
    assert_eq!(log.len() as u64, bytes, "the file is as long as it was");
    let [begin, end] = [part.start, part.end].map(|at| usize::try_from(at).unwrap());
    assert!(log[..begin] == all.as_bytes()[..begin] && log[end..] == all.as_bytes()[end..]);
    let freed = &log[begin..end - 1];
    assert!(freed.iter().all(|&byte| byte == 0), "what is given up is gone to the byte");
    let lost = all[begin..end].lines().count() as u64;
    assert_eq!((run.stdout.dropped_bytes, run.stdout.dropped_lines), (part.end - part.start, lost));
    assert_eq!((run.stdout.bytes, run.stdout.lines), (bytes, printed[0]));

    let shown = read(&store, "r", ReadOptions::new(View::STDOUT)).await;
    let after = LineNumber(all[..begin].lines().count() as u64);
    let reason = GapReason::RunSizeCap;
    let gap = Gap { stream: OUT, after, lines: lost, bytes: part.end - part.start, reason };
    assert_eq!((shown.gaps.as_slice(), shown.lines + lost), (&[gap][..], printed[0]));
    check_run(&store, "r", printed).await;
    store.close().unwrap();
    check_folder(folder.path());
}

#[tokio::test]
async fn both_streams_share_what_a_run_may_keep() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    for round in 0..400 {
        job.print(OUT, 40);
        job.print(ERR, if round < 200 { 1 } else { 60 });
    }
    let printed = job.printed;
    job.finish();
    for stream in Stream::BOTH {
        assert!(!given_up(&store, "r", stream).is_empty());
    }
    assert!(blocks(folder.path(), "r") <= CAP + 4 * 4096);
    check_run(&store, "r", printed).await;
    store.close().unwrap();
    check_folder(folder.path());
}

#[tokio::test]
async fn a_quiet_stream_is_kept_whole_beside_a_noisy_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    for _ in 0..400 {
        job.print(OUT, 50);
        job.print(ERR, 1);
    }
    let printed = job.printed;
    let run = job.finish();
    assert_eq!(run.stderr.dropped_lines, 0);
    check_run(&store, "r", printed).await;
    // In the order of both, every line of the quiet one stands between what is missing of the other.
    let shown = read(&store, "r", ReadOptions::new(View::All)).await;
    assert!(shown.gaps.len() > 100 && shown.apart[1..].iter().all(|apart| *apart), "{}", shown.gaps.len());
}

#[tokio::test]
async fn a_read_begins_at_any_line_also_at_one_that_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    for _ in 0..250 {
        job.print(OUT, 60);
        job.print(ERR, 30);
    }
    let printed = job.printed;
    job.finish();
    let whole = read(&store, "r", ReadOptions::new(View::STDOUT)).await.gaps[0];
    let folders = FileLogStore::open_folder(folder.path(), capped(0)).unwrap();
    for store in [&store, &folders] {
        let (begin, end) = (whole.after.0, whole.after.0 + whole.lines);
        for after in [begin - 1, begin, begin + 1, begin + whole.lines / 2, end - 1, end, end + 1, printed[0]]
        {
            for times in [false, true] {
                let start = Start::After(LineNumber(after));
                let shown =
                    read(store, "r", ReadOptions { start, times, ..ReadOptions::new(View::STDOUT) }).await;
                let gaps = if after < end { vec![whole] } else { vec![] };
                assert_eq!((shown.position, shown.gaps), (printed[0], gaps), "since {after}, times {times}");
                let first = if after < begin { after + 1 } else { end.max(after) + 1 };
                assert_eq!(shown.first, (first <= printed[0]).then_some((OUT, first)), "since {after}");
            }
        }
        let total = printed.iter().sum::<u64>();
        for after in (0..=total).step_by(997) {
            let start = Start::After(LineNumber(after));
            let shown = read(store, "r", ReadOptions { start, ..ReadOptions::new(View::All) }).await;
            assert_eq!(shown.position, total, "both since {after}");
        }
        for count in [0, 1, 100, printed[0] - end, printed[0] - end + 1, printed[0]] {
            let start = Start::LastLines { count, after: LineNumber::START };
            let shown = read(store, "r", ReadOptions { start, ..ReadOptions::new(View::STDOUT) }).await;
            assert_eq!(
                shown.lines,
                count.min(printed[0] - end) + if count == printed[0] { begin } else { 0 }
            );
            assert_eq!(shown.gaps.len(), usize::from(count > printed[0] - end), "the last {count}");
        }
    }
}

/// Whatever is printed in whatever pieces, with whatever cap.
#[derive(Clone, Debug)]
enum Act {
    Lines(Stream, u64),
    Flush,
}

fn act() -> impl Strategy<Value = Act> {
    let stream = prop_oneof![3 => Just(OUT), 1 => Just(ERR)];
    prop_oneof![
        8 => (stream, prop_oneof![Just(1), 1..40u64, 400..3_000u64]).prop_map(|(stream, lines)| Act::Lines(stream, lines)),
        1 => Just(Act::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn whatever_is_printed_head_tail_and_numbers_are_true(
        acts in proptest::collection::vec(act(), 1..80),
        cap in prop_oneof![1..2_000u64, 2_000..200_000u64, 200_000..1_500_000u64],
    ) {
        let folder = tempfile::tempdir().unwrap();
        let store = FileLogStore::open(folder.path(), capped(cap)).unwrap();
        let mut job = Job::start(&store, "r");
        for act in acts {
            match act {
                Act::Lines(stream, lines) => job.print(stream, lines),
                Act::Flush => job.writer.flush().unwrap(),
            }
            // The last mark of each stream stays until there is another, and a block at each end of what is cut.
            let marks = 2 * (cap / 4).clamp(200, 64 * 1024);
            prop_assert!(blocks(folder.path(), "r") <= cap + marks + 6 * 4096);
        }
        let printed = job.printed;
        job.finish();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check_run(&store, "r", printed));
        store.close().unwrap();
        check_folder(folder.path());
        let again = FileLogStore::open(folder.path(), capped(0)).unwrap();
        runtime.block_on(check_run(&again, "r", printed));
    }
}

#[test]
fn the_disk_holds_no_more_than_the_cap_and_a_step_while_twenty_times_as_much_is_printed() {
    const CAP: u64 = 4_000_000;
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    let mut most = 0;
    while job.bytes.iter().sum::<u64>() < 20 * CAP {
        job.print(OUT, 1_000);
        job.print(ERR, 100);
        most = most.max(blocks(folder.path(), "r"));
    }
    assert!(most <= CAP + CAP / 16, "{most} bytes of disk");
    assert!(most >= CAP / 2);
    job.finish();
    assert!(blocks(folder.path(), "r") <= CAP + CAP / 16);
}

/// The lines of a run that printed one long line among short ones, by their numbers.
async fn lengths(store: &dyn LogStore) -> (Vec<(u64, usize)>, Vec<Gap>) {
    let mut events = store.read(&id("r"), ReadOptions::new(View::STDOUT)).unwrap();
    let (mut lines, mut gaps) = (Vec::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => {
                lines.extend(batch.lines().map(|line| (line.number.0, line.text.len())))
            }
            ReadEvent::Gap { gap, .. } => gaps.push(gap),
            ReadEvent::End(_) => {}
        }
    }
    (lines, gaps)
}

#[tokio::test]
async fn a_line_too_long_to_be_kept_is_a_hole_of_one_line_and_what_follows_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    writer.append(OUT, b"first\n").unwrap();
    let mut most = 0;
    for _ in 0..200 {
        writer.append(OUT, &[b'x'; 10_000]).unwrap();
        most = most.max(blocks(folder.path(), "r"));
    }
    assert!(most <= CAP + 3 * 4096, "{most} bytes of disk for a line without end");
    writer.append(OUT, b"\nthird\n").unwrap();
    let run = writer.finish(success()).unwrap();
    let (lines, gaps) = lengths(&store).await;
    assert_eq!(lines, [(1, 5), (3, 5)]);
    let reason = GapReason::RunSizeCap;
    assert_eq!(gaps, [Gap { stream: OUT, after: LineNumber(1), lines: 1, bytes: 2_000_001, reason }]);
    assert_eq!((run.stdout.lines, run.stdout.dropped_lines, run.stdout.dropped_bytes), (3, 1, 2_000_001));
    store.close().unwrap();
    check_folder(folder.path());
}

#[tokio::test]
async fn a_long_line_that_fits_is_the_end_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    for _ in 0..1_000 {
        writer.append(OUT, format!("{:999}\n", "").as_bytes()).unwrap();
    }
    let long = usize::try_from(CAP / 4).unwrap();
    writer.append(OUT, " ".repeat(long).as_bytes()).unwrap();
    let run = writer.finish(success()).unwrap();
    let (lines, gaps) = lengths(&store).await;
    assert_eq!(lines.last(), Some(&(1_001, long)));
    assert_eq!((gaps.len(), run.stdout.lines), (1, 1_001));
    assert_eq!(gaps[0].lines + lines.len() as u64, 1_001);
}

#[tokio::test]
async fn holes_of_a_full_disk_within_what_is_given_up_are_part_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::at(folder.path().to_owned(), 16);
    let store = FileLogStore::open_folder(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, CAP / 2);
    disk.fill();
    // The first that is lost is an error, and none of the others is.
    let text: String = (job.printed[0] + 1..=job.printed[0] + 3_000).map(|n| line(OUT, n) + "\n").collect();
    job.printed[0] += 3_000;
    job.writer.append(OUT, text.as_bytes()).unwrap_err();
    disk.make_room();
    std::thread::sleep(std::time::Duration::from_millis(150));
    job.print_bytes(OUT, 3 * CAP);
    let printed = job.printed;
    let run = job.finish();
    let shown = read(&store, "r", ReadOptions::new(View::STDOUT)).await;
    assert_eq!((shown.gaps.len(), shown.position), (1, printed[0]), "{:?}", shown.gaps);
    assert_eq!(shown.lost(OUT), (run.stdout.dropped_bytes, run.stdout.dropped_lines));
    assert!(run.stdout.dropped_bytes > given_up(&store, "r", OUT).end - given_up(&store, "r", OUT).start);
    check_run(&store, "r", printed).await;
    drop(store);
    let store = FileLogStore::open(folder.path(), capped(0)).unwrap();
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs, [run]);
    store.close().unwrap();
    check_folder(folder.path());
}

#[tokio::test]
async fn zeros_that_a_job_prints_are_lines_as_others_are() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let text = [vec![0; 4095], vec![b'\n']].concat();
    for _ in 0..1_000 {
        writer.append(OUT, &text).unwrap();
    }
    let (running, _) = lengths(&store).await;
    writer.finish(success()).unwrap();
    let (lines, gaps) = lengths(&store).await;
    assert_eq!(running, lines);
    assert!(lines.iter().all(|&(_, length)| length == 4095));
    assert_eq!((gaps.len(), gaps[0].lines + lines.len() as u64), (1, 1_000));
}

#[tokio::test]
async fn bytes_are_read_up_to_what_is_given_up_and_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, 3 * CAP);
    let bytes = job.bytes[0];
    job.finish();
    let part = given_up(&store, "r", OUT);
    let read = |at: u64| store.read_bytes(&id("r"), OUT, ByteOffset(at), usize::MAX);
    assert_eq!(read(0).unwrap().len() as u64, part.start);
    for at in [part.start, part.start + 1, part.end - 1] {
        assert!(
            matches!(read(at), Err(databuild_logs::LogError::Gap(gap)) if gap.bytes == part.end - part.start)
        );
    }
    let tail = read(part.end).unwrap();
    assert_eq!(tail.len() as u64, bytes - part.end);
    assert!(!tail.contains(&0));
    let kept = [read(0).unwrap(), tail].concat();

    let server = Server::start(store.clone()).await;
    let target = "/api/job_runs/r/logs/stdout/raw";
    let whole = server.get(target).await;
    assert!(whole.body == kept, "head and tail, and nothing between");
    let tag = whole.header("etag").unwrap().to_owned();
    let range = format!("bytes={}-{}", part.start - 10, part.start + 9);
    let with = [("Range", range.as_str()), ("If-Range", tag.as_str())];
    let around = server.get_with(target, &with).await;
    let begin = usize::try_from(part.start).unwrap();
    assert_eq!((around.status, around.body.as_slice()), (206, &kept[begin - 10..begin + 10]));
    assert_eq!(server.get_with(target, &with[..1]).await.status, 200, "without a tag all is given");

    let databuild = Databuild::asking(format!("http://{}", server.address));
    let done = tokio::task::spawn_blocking(move || databuild.run(&["logs", "r", "-o", "raw"]).code(0));
    let done = done.await.unwrap().says("could not be kept");
    assert!(done.stdout == kept);
    let logs = folder.path().to_str().unwrap().to_owned();
    store.close().unwrap();
    drop(server);
    let done = Databuild::new().run(&["logs", "r", "-o", "raw", "--log-dir", &logs]).code(0);
    assert!(done.stdout == kept);
}

#[tokio::test]
async fn a_browser_is_told_of_one_hole() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open(folder.path(), capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    job.print_bytes(OUT, 3 * CAP);
    let run = job.finish();
    let server = Server::start_with(store, ServerOptions::default()).await;
    let events = server.get("/api/job_runs/r/logs/stdout").await.events();
    let gaps: Vec<_> = events.iter().filter(|event| event.name == "gap").collect();
    assert_eq!(gaps.len(), 1);
    let told: Value = serde_json::from_str(&gaps[0].data).unwrap();
    let (lines, bytes) = (run.stdout.dropped_lines, run.stdout.dropped_bytes);
    assert_eq!((told["lines"].as_u64(), told["bytes"].as_u64()), (Some(lines), Some(bytes)));
    assert_eq!(told["reason"], "run_size_cap");
    let behind = told["from"].as_u64().unwrap() + lines - 1;
    assert_eq!(gaps[0].id, behind.to_string(), "who resumes there goes on behind it");
    assert_eq!(events.last().unwrap().id, format!("{}!", run.stdout.lines));
    let resumed =
        server.get_with("/api/job_runs/r/logs/stdout", &[("Last-Event-ID", &gaps[0].id)]).await.events();
    assert_eq!(resumed[0].id, (behind + 1).to_string());
}

#[test]
fn the_variable_caps_a_run_of_the_command_line_and_nonsense_is_refused() {
    let name = "DATABUILD_LOG_MAX_RUN_SIZE_MB";
    let databuild = Databuild::new().with(name, "0.3");
    let script = "yes this line is printed over and over again | head -n 50000; echo the end; exit 4";
    databuild.run(&["run", "--quiet", "--id", "r", "--", "sh", "-c", script]).code(4);
    let logs = databuild.home.path().join("logs");
    assert!(blocks(&logs, "r") <= 300_000 + 64 * 1024 + 3 * 4096);
    let run: JobMetadata =
        serde_json::from_slice(&fs::read(logs.join("job_runs/r/metadata.json")).unwrap()).unwrap();
    assert_eq!(run.stdout.lines, 50_001);
    assert!(run.stdout.dropped_lines > 40_000);
    let shown = databuild.run(&["logs", "r", "--all", "-n", "1"]).code(0);
    assert_eq!(shown.text(), "the end\n");
    let shown = databuild.run(&["logs", "r"]).code(0).says("the run reached its size limit");
    assert!(!shown.stdout.contains(&0));
    for (command, bad) in [("run", "-1"), ("serve", "much")] {
        let args = if command == "run" { vec!["run", "--", "true"] } else { vec!["serve"] };
        Databuild::new().with(name, bad).run(&args).says(name);
    }
}

#[test]
fn memory_does_not_grow_with_what_is_given_up() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "1");
    let mut command = databuild.command(&[
        "run",
        "--quiet",
        "--id",
        "r",
        "--",
        "yes",
        "a line that is printed without end",
    ]);
    let child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let _job = Running::new(child);
    let log = databuild.home.path().join("logs/job_runs/r/stdout.log");
    let most_at = |bytes: u64| {
        until(|| fs::metadata(&log).is_ok_and(|file| file.len() > bytes), || "it does not print".to_owned());
        let status = fs::read_to_string(&status).unwrap();
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        most.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let (early, late) = (most_at(10_000_000), most_at(150_000_000));
    assert!(late < early + 1024, "{early} kB, then {late} kB");
}

#[test]
fn the_work_grows_with_what_is_printed_and_no_faster() {
    let databuild = Databuild::new().with("DATABUILD_LOG_MAX_RUN_SIZE_MB", "0.3");
    let trace = databuild.home.path().join("trace");
    let step = 300_000 / 4;
    let freed = [2_000_000, 8_000_000].map(|bytes: u64| {
        let options = ["--seccomp-bpf", "-e", "trace=fallocate,pread64"];
        let (id, script) =
            (format!("r{bytes}"), format!("yes this line is printed over and over again | head -c {bytes}"));
        let args = ["run", "--quiet", "--id", &id, "--", "sh", "-c", &script];
        databuild.start_traced(&trace, &options, &args).done().code(0);
        let trace = fs::read_to_string(&trace).unwrap();
        let count = |call: &str| trace.lines().filter(|line| line.contains(call)).count() as u64;
        assert!(count("pread64") <= 4 * count("PUNCH_HOLE"), "the journal is read, and no log");
        count("PUNCH_HOLE")
    });
    assert!(freed[0] > 5 && freed[0] <= 2_000_000 / (64 * 1024) + 1, "{freed:?}");
    assert!(freed[1] <= 5 * freed[0] && freed[1] > 8_000_000 / step / 2, "{freed:?}");
}
