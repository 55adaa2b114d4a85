//! Compressed files that are not what was written: what can be read has its number, and the rest is a hole.

use databuild_logs::{FindingKind, GapReason};

use super::*;

/// Whatever was read, every line has its own number and text, holes say how many are missing, and nothing is repeated.
fn is_honest(seen: &[Seen], sound: &[Seen], what: &str) {
    let mut at = 0;
    for seen in seen {
        match seen {
            Seen::Line { position, .. } => {
                at += 1;
                assert_eq!(*position, at, "{what}: a line was left out without a word");
                let Seen::Line { stream, number, text, .. } = &sound[at as usize - 1] else {
                    panic!("{what}")
                };
                let Seen::Line { stream: of, number: n, text: t, .. } = seen else { panic!("{what}") };
                assert!((of, n) == (stream, number) && t == text, "{what}: line {at} is another");
            }
            Seen::Gap { next, gap } => {
                assert_eq!((at + gap.lines, gap.reason), (*next, GapReason::Corrupt), "{what}");
                at = *next;
            }
        }
    }
    assert_eq!(at, sound.len() as u64, "{what}: the read comes to the end");
}

fn lost(seen: &[Seen]) -> u64 {
    seen.iter().map(|seen| if let Seen::Gap { gap, .. } = seen { gap.lines } else { 0 }).sum()
}

#[tokio::test]
async fn a_flipped_bit_anywhere_is_a_hole_and_never_a_wrong_line() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let mut sound = Vec::new();
    for view in VIEWS {
        sound.push(read(&store, "x", ReadOptions::new(view)).await);
    }
    store.compress(&id("x")).unwrap();
    store.close().unwrap();
    let indexed = open(folder.path());
    for part in ["stdout.log.zst", "stderr.log.zst"] {
        let path = of_run(folder.path(), "x", part);
        let bytes = fs::read(&path).unwrap();
        let places = [0, 1, 4, 5, 6, 9, 40].into_iter().chain((1..12).map(|n| bytes.len() * n / 12));
        let behind = (1..90).step_by(7).map(|n| bytes.len() - n);
        for byte in places.chain(behind) {
            let mut flipped = bytes.clone();
            flipped[byte] ^= 1 << (byte % 8);
            fs::write(&path, flipped).unwrap();
            let what = format!("byte {byte} of {part}");
            for (view, sound) in VIEWS.into_iter().zip(&sound) {
                let stores: [&dyn LogStore; 2] = [&indexed, &open_folder(folder.path())];
                for store in stores {
                    let seen = read(store, "x", ReadOptions::new(view)).await;
                    is_honest(&seen, sound, &what);
                    let all = sound.len() as u64;
                    assert!(
                        lost(&seen) < all || view == View::STDERR || part.starts_with("stderr"),
                        "{what}: one frame"
                    );
                    // A start within what is lost, before it and behind it.
                    for after in [1, all / 4, all / 2, all - all / 4, all - 1] {
                        let start = Start::After(LineNumber(after));
                        let some = read(store, "x", ReadOptions { start, ..ReadOptions::new(view) }).await;
                        for seen in &some {
                            let Seen::Line { position, text, .. } = seen else { continue };
                            let Seen::Line { text: right, .. } = &sound[*position as usize - 1] else {
                                panic!()
                            };
                            assert!(*position > after && text == right, "{what} behind line {after}");
                        }
                        assert!(some.last().is_some(), "{what} behind line {after}: something is told");
                    }
                }
            }
        }
        fs::write(&path, bytes).unwrap();
    }
}

#[tokio::test]
async fn a_damaged_frame_costs_its_own_lines_and_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let sound = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
    store.compress(&id("x")).unwrap();
    let path = of_run(folder.path(), "x", "stdout.log.zst");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let seen = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
    is_honest(&seen, &sound, "the middle");
    let gaps: Vec<_> = seen.iter().filter(|seen| matches!(seen, Seen::Gap { .. })).collect();
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert!(lost(&seen) > 0 && lost(&seen) * 2 < sound.len() as u64, "{} lines", lost(&seen));
    let Seen::Gap { gap, .. } = gaps[0] else { unreachable!() };
    assert!(gap.bytes <= 256 * 1024);
    // The bytes: an error there, and what is before and behind.
    let (mut read, mut refused, mut offset) = (0, 0, 0);
    let length = store.run(&id("x")).unwrap().stdout.bytes;
    while offset < length {
        match store.read_bytes(&id("x"), Stream::Stdout, ByteOffset(offset), 10_000) {
            Ok(bytes) => {
                assert!(!bytes.is_empty());
                (read, offset) = (read + bytes.len() as u64, offset + bytes.len() as u64);
            }
            Err(LogError::Corrupt { path, .. }) => {
                assert!(path.ends_with("stdout.log.zst"));
                (refused, offset) = (refused + 1, offset + 1_000);
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 0 && read + gap.bytes + 1_000 > length, "{read} of {length} bytes, {refused} refused");
    store.close().unwrap();
    let quick = check_index(folder.path(), CheckOptions::default(), |_| ()).unwrap();
    assert_eq!(quick.findings, [], "only who reads every frame sees that");
    for repair in [false, true] {
        let deep = check_index(folder.path(), CheckOptions { deep: true, repair }, |_| ()).unwrap();
        let kinds: Vec<_> = deep.findings.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [FindingKind::CompressedDamaged], "{deep:?}");
        assert!(!deep.is_clean());
    }
    let last = bytes.len() - 20;
    bytes[middle] ^= 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let quick = check_index(folder.path(), CheckOptions::default(), |_| ()).unwrap();
    let kinds: Vec<_> = quick.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::CompressedDamaged], "the table: {quick:?}");
    assert!(self::read_all(folder.path()).await == sound, "without its table all of it is read");
}

async fn read_all(folder: &Path) -> Vec<Seen> {
    read(&open(folder), "x", ReadOptions::new(View::STDOUT)).await
}

#[tokio::test]
async fn a_damaged_journal_costs_times_and_not_lines() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let sound = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
    store.compress(&id("x")).unwrap();
    store.close().unwrap();
    let path = of_run(folder.path(), "x", "journal.zst");
    let bytes = fs::read(&path).unwrap();
    for byte in [0, 10, bytes.len() / 3, bytes.len() - 30, bytes.len() - 1] {
        let mut flipped = bytes.clone();
        flipped[byte] ^= 0x10;
        fs::write(&path, flipped).unwrap();
        let names_before = names(folder.path(), "x");
        for store in [open(folder.path()), open_folder(folder.path())] {
            let seen = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
            is_honest(&seen, &sound, &format!("byte {byte} of the journal"));
            assert_eq!(lost(&seen), 0);
            let both = read(&store, "x", ReadOptions::new(View::All)).await;
            assert!(both.len() > sound.len());
            drop(store);
        }
        rebuild_index(folder.path(), |_| ()).unwrap();
        let seen = read(&open(folder.path()), "x", ReadOptions::new(View::STDOUT)).await;
        is_honest(&seen, &sound, "rebuilt");
        assert_eq!(lost(&seen), 0);
        assert_eq!(names(folder.path(), "x"), names_before, "nothing is written beside it");
        let repaired = check_index(folder.path(), CheckOptions { deep: true, repair: true }, |_| ());
        repaired.unwrap();
        assert_eq!(names(folder.path(), "x"), names_before, "a repair writes nothing into it either");
    }
}

#[tokio::test]
async fn a_file_that_is_cut_or_garbage_is_a_hole_to_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    write_run(&store, "x");
    let sound = read(&store, "x", ReadOptions::new(View::STDOUT)).await;
    store.compress(&id("x")).unwrap();
    let path = of_run(folder.path(), "x", "stdout.log.zst");
    let bytes = fs::read(&path).unwrap();
    for damage in [&bytes[..bytes.len() / 2], &bytes[..100], b"", b"hello, world\n"] {
        fs::write(&path, damage).unwrap();
        for view in [View::STDOUT, View::All] {
            let seen = read(&store, "x", ReadOptions::new(view)).await;
            assert!(lost(&seen) > 0);
            if view == View::STDOUT {
                is_honest(&seen, &sound, "cut");
            }
        }
    }
    fs::remove_file(&path).unwrap();
    is_honest(&read(&store, "x", ReadOptions::new(View::STDOUT)).await, &sound, "gone");
}
