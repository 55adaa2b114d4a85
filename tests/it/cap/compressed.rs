//! A run of which something was given up is compressed as others are.

use std::collections::BTreeMap;

use databuild_logs::{ByteOffset, Start};

use super::*;

const CAP: u64 = 2_000_000;

/// A run of 40 MB that was capped, as a store has it that caps nothing.
fn capped_run(folder: &Path) -> (FileLogStore, [u64; 2]) {
    let store = FileLogStore::open(folder, capped(CAP)).unwrap();
    let mut job = Job::start(&store, "r");
    for _ in 0..250 {
        job.print(OUT, 2_000);
        job.print(ERR, 300);
    }
    let printed = job.printed;
    job.finish();
    store.close().unwrap();
    drop(store);
    (FileLogStore::open(folder, capped(0)).unwrap(), printed)
}

/// All bytes of a log that are kept.
fn kept(store: &FileLogStore, stream: Stream) -> Vec<u8> {
    let part = store.given_up(&id("r"), stream).unwrap().unwrap();
    let end = ByteOffset(store.run(&id("r")).unwrap().totals(stream).bytes);
    let (mut at, mut bytes) = (ByteOffset(0), Vec::new());
    while at < end {
        let piece = store.read_bytes(&id("r"), stream, at, usize::MAX).unwrap();
        bytes.extend_from_slice(&piece);
        at = at.plus(piece.len() as u64);
        if at == part.start {
            at = part.end;
        }
    }
    bytes
}

#[tokio::test]
async fn a_capped_run_reads_the_same_when_it_is_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let (store, printed) = capped_run(folder.path());
    let starts = [0, 1, 40_000, 260_000, printed[0] - 3].map(|after| Start::After(LineNumber(after)));
    let mut before = Vec::new();
    for compressed in [false, true] {
        if compressed {
            let done = store.compress(&id("r")).unwrap();
            assert!(done.bytes_after < done.bytes_before / 2, "zeros cost next to nothing: {done:?}");
        }
        let mut found = Vec::new();
        for start in starts {
            for view in [View::STDOUT, View::STDERR, View::All] {
                let shown = read(&store, "r", ReadOptions { start, ..ReadOptions::new(view) }).await;
                found.push((shown.first, shown.lines, shown.position, shown.gaps));
            }
        }
        if compressed {
            assert!(found == before, "reads that begin anywhere");
        }
        before = found;
        check_run(&store, "r", printed).await;
        for stream in Stream::BOTH {
            let text = kept(&store, stream);
            assert!(text.len() as u64 <= CAP && !text.contains(&0));
        }
    }
    store.close().unwrap();
    drop(store);
    check_folder(folder.path());
    let again = FileLogStore::open(folder.path(), capped(0)).unwrap();
    check_run(&again, "r", printed).await;
}

/// Lines of standard output by their numbers, and what is missing.
async fn lines(store: &FileLogStore, times: bool) -> (BTreeMap<u64, String>, Vec<Gap>) {
    let mut events = store.read(&id("r"), ReadOptions { times, ..ReadOptions::new(View::STDOUT) }).unwrap();
    let (mut lines, mut gaps) = (BTreeMap::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => lines.extend(
                batch.lines().map(|line| (line.number.0, String::from_utf8_lossy(line.text).into_owned())),
            ),
            ReadEvent::Gap { gap, .. } => gaps.push(gap),
            ReadEvent::End(_) => {}
        }
    }
    (lines, gaps)
}

#[tokio::test]
async fn damage_before_and_behind_what_was_given_up_shifts_no_number() {
    let folder = tempfile::tempdir().unwrap();
    let (store, printed) = capped_run(folder.path());
    store.compress(&id("r")).unwrap();
    let file = folder.path().join("job_runs/r/stdout.log.zst");
    let sound = fs::read(&file).unwrap();
    // Most of the file is the frames of the head and the tail; those between are zeros.
    let (whole, _) = lines(&store, false).await;
    let mut hurt = 0;
    for part in 1..20 {
        let mut damaged = sound.clone();
        damaged[sound.len() * part / 20] ^= 0x55;
        fs::write(&file, damaged).unwrap();
        for times in [false, true] {
            let (found, gaps) = lines(&store, times).await;
            for (number, text) in &found {
                assert!(*text == line(OUT, *number), "part {part}: line {number} is {text:.100}");
            }
            let lost: u64 = gaps.iter().map(|gap| gap.lines).sum();
            assert_eq!(found.len() as u64 + lost, printed[0], "part {part}, times {times}: {gaps:?}");
            hurt += usize::from(found.len() < whole.len());
        }
    }
    assert!(hurt > 10, "{hurt} of 38 reads met the damage");
}
