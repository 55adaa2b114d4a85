//! Lines are found wherever chunks, holes and ends of files cut them.

use super::*;
use crate::line::LineNumber;
use crate::run::GapReason;

fn reader(text: &[u8], chunk: usize) -> (tempfile::TempDir, LineReader) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stdout.log");
    std::fs::write(&path, text).unwrap();
    let file = ReadFile::open_when_there(&path).unwrap();
    (folder, LineReader::new(Stream::Stdout, file, (0, 0), chunk))
}

fn all(reader: &mut LineReader, reach: Reach<'_>) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    while let Taken::Lines(batch) = reader.next(reach, Io::MayBlock).unwrap() {
        for line in batch.lines() {
            found.push((line.number.0, line.text.to_vec()));
        }
    }
    found
}

#[test]
fn every_chunk_size_and_every_skip_give_the_same_lines() {
    let text = b"one\n\nthree is longer\nx\n\n\nseven";
    let lines: Vec<Vec<u8>> = text.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    for chunk in 1..text.len() + 2 {
        for skip in 0..=lines.len() + 1 {
            let (_folder, mut reader) = reader(text, chunk);
            reader.skip_to(skip as u64);
            let reach = Reach { lines: u64::MAX, end: text.len() as u64, ended: true, gaps: &[] };
            let expected: Vec<_> =
                lines.iter().enumerate().skip(skip).map(|(i, line)| (i as u64 + 1, line.clone())).collect();
            assert_eq!(all(&mut reader, reach), expected, "chunk {chunk} skip {skip}");
        }
    }
}

#[test]
fn an_unterminated_line_waits_for_its_end() {
    let (_folder, mut reader) = reader(b"a\nbc", 64);
    let reach = Reach { lines: u64::MAX, end: 4, ended: false, gaps: &[] };
    assert_eq!(all(&mut reader, reach), [(1, b"a".to_vec())]);
    assert_eq!(all(&mut reader, Reach { ended: true, ..reach }), [(2, b"bc".to_vec())]);
}

#[test]
fn a_gap_stands_where_it_is_and_shifts_no_number() {
    let gap =
        Gap { stream: Stream::Stdout, after: LineNumber(2), lines: 3, bytes: 9, reason: GapReason::DiskFull };
    let gaps = [GapAt { gap, offset: 4 }];
    let reach = Reach { lines: u64::MAX, end: 8, ended: true, gaps: &gaps };
    for (skip, gap_seen, rest) in
        [(0, true, vec![6, 7]), (4, true, vec![6, 7]), (5, false, vec![6, 7]), (6, false, vec![7])]
    {
        let (_folder, mut reader) = reader(b"a\nb\nf\ng\n", 64);
        reader.skip_to(skip);
        let mut seen = false;
        let mut numbers = Vec::new();
        loop {
            match reader.next(reach, Io::MayBlock).unwrap() {
                Taken::Lines(batch) => numbers.extend(batch.lines().map(|line| line.number.0)),
                Taken::Gap(found) => {
                    assert_eq!(found, gap);
                    seen = true;
                }
                _ => break,
            }
        }
        numbers.retain(|&n| n > 2);
        assert_eq!((seen, numbers), (gap_seen, rest), "skip {skip}");
    }
}

#[test]
fn a_beginning_that_was_cut_off_by_a_hole_is_not_taken_for_what_stands_behind_it() {
    let (folder, mut reader) = reader(b"a\nbcd", 64);
    let reach = |end, gaps| Reach { lines: u64::MAX, end, ended: false, gaps };
    assert_eq!(all(&mut reader, reach(5, &[])), [(1, b"a".to_vec())]);
    let gap =
        Gap { stream: Stream::Stdout, after: LineNumber(1), lines: 1, bytes: 4, reason: GapReason::DiskFull };
    std::fs::write(folder.path().join("stdout.log"), b"a\nx\ny\nz\n").unwrap();
    let gaps = [GapAt { gap, offset: 2 }];
    assert!(matches!(reader.next(reach(8, &gaps), Io::MayBlock), Ok(Taken::Gap(_))));
    let behind = [(3, b"x".to_vec()), (4, b"y".to_vec()), (5, b"z".to_vec())];
    assert_eq!(all(&mut reader, reach(8, &gaps)), behind);
}

#[test]
fn a_line_too_long_is_cut_and_its_neighbours_are_not() {
    let mut text = b"before\n".to_vec();
    text.resize(text.len() + Batch::MAX_LINE_BYTES + 5, b'x');
    text.extend_from_slice(b"\nafter\n");
    let (_folder, mut reader) = reader(&text, 64 * 1024);
    let reach = Reach { lines: u64::MAX, end: text.len() as u64, ended: true, gaps: &[] };
    let mut batches = Vec::new();
    while let Taken::Lines(batch) = reader.next(reach, Io::MayBlock).unwrap() {
        batches.push(batch);
    }
    let cut =
        batches.iter().find_map(|batch| batch.cut.map(|cut| (batch.first_line.0, batch.bytes.len(), cut)));
    let full_bytes = Batch::MAX_LINE_BYTES as u64 + 5;
    assert_eq!(cut, Some((2, Batch::MAX_LINE_BYTES, CutLine { full_bytes })));
    assert_eq!(batches.last().unwrap().bytes, "after\n");
    assert_eq!(batches.last().unwrap().first_line.0, 3);
}

#[test]
fn a_file_shorter_than_promised_is_missing_and_not_empty() {
    let (_folder, mut reader) = reader(b"a\nb\n", 64);
    let reach = Reach { lines: u64::MAX, end: 10, ended: true, gaps: &[] };
    assert!(matches!(reader.next(reach, Io::MayBlock), Ok(Taken::Lines(_))));
    assert!(matches!(reader.next(reach, Io::MayBlock), Ok(Taken::Missing)));
}
