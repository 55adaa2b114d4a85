//! Bytes in, the same bytes out, whatever they are and however they were cut into appends.

use std::sync::Arc;

use futures_util::StreamExt;

use super::{after, all_bytes, append, drain, finish, finished, open, read_from, show, split, start};
use crate::line::{ByteOffset, Stream, View};
use crate::store::{Batch, LogStore, ReadOptions, StreamOptions};

/// What was appended is what is read: as bytes at any offset, as numbered lines, as strings.
pub async fn bytes_come_back_exactly(store: Arc<dyn LogStore>) {
    let text: String = (1..=200).map(|n| format!("line {n} {}\n", "x".repeat(n % 7))).collect();
    let id = finished(&*store, text.as_bytes());
    for length in [1, 7, 4096, usize::MAX >> 1] {
        let got = all_bytes(&*store, &id, Stream::Stdout, length);
        assert!(got == text.as_bytes(), "bytes read {length} at a time differ from those appended");
    }
    let middle = store.read_bytes(&id, Stream::Stdout, ByteOffset(10), 20).expect("bytes can be read");
    assert_eq!(middle, text.as_bytes()[10..30], "a part of the bytes");
    let got = read_from(&*store, &id, View::STDOUT, after(0)).await;
    assert_eq!(show(&got.texts()), show(&split(text.as_bytes())));
    for (index, line) in got.lines.iter().enumerate() {
        assert_eq!((line.number, line.position), (index as u64 + 1, index as u64 + 1), "lines count from 1");
        assert!(line.cut.is_none(), "a short line must not be cut");
    }
    let strings: Vec<String> = store
        .stream_stdout(id.as_str(), StreamOptions::default())
        .map(|line| line.expect("a line of a whole run"))
        .collect()
        .await;
    assert_eq!(strings, text.lines().collect::<Vec<_>>());
}

/// Blank lines, CR, NUL, and bytes that are no UTF-8 are neither changed nor taken for ends of lines.
pub async fn odd_bytes_stay_as_they_are(store: Arc<dyn LogStore>) {
    let text = b"\n\n\r\nwindows\r\nprogress 1\rprogress 2\r\n\0\n\0\0nul\0\n\xff\xfe\xc3(\n\xe2\x82\n\n \t \n\xf0\x9f\x92\xa9\n\x1b[31m\n\x0b\x0c\x85\n\n";
    let id = finished(&*store, text);
    assert_eq!(all_bytes(&*store, &id, Stream::Stdout, 5), text);
    let got = read_from(&*store, &id, View::STDOUT, after(0)).await;
    assert_eq!(show(&got.texts()), show(&split(text)));
}

/// A stream of strings has U+FFFD in place of bytes that are no UTF-8, and one string for every line.
pub async fn strings_replace_what_is_not_utf8(store: Arc<dyn LogStore>) {
    let id = finished(&*store, b"a\xffb\n\nc\r\nd");
    let strings: Vec<String> = store
        .stream_stdout(id.as_str(), StreamOptions::default())
        .map(|line| line.expect("a line of a whole run"))
        .collect()
        .await;
    assert_eq!(strings, ["a\u{fffd}b", "", "c\r", "d"]);
}

/// The last line is given only when its end has come or the run is over; its bytes are there at once.
pub async fn an_unterminated_line_waits_for_the_end(store: Arc<dyn LogStore>) {
    let (id, mut writer) = start(&*store);
    append(&mut *writer, Stream::Stdout, "one\ntwo");
    let before = read_from(&*store, &id, View::STDOUT, after(0)).await;
    assert_eq!(
        show(&before.texts()),
        ["one"],
        "a line without its end must not be given while the run goes on"
    );
    assert_eq!(before.running(), 1);
    assert_eq!(all_bytes(&*store, &id, Stream::Stdout, 100), b"one\ntwo", "but its bytes are there");
    append(&mut *writer, Stream::Stdout, " three\nfour");
    let between = read_from(&*store, &id, View::STDOUT, after(0)).await;
    assert_eq!(show(&between.texts()), ["one", "two three"]);
    finish(writer);
    let end = read_from(&*store, &id, View::STDOUT, after(0)).await;
    assert_eq!(show(&end.texts()), ["one", "two three", "four"], "the end of the run ends its last line");
    assert_eq!(all_bytes(&*store, &id, Stream::Stdout, 100), b"one\ntwo three\nfour", "nothing is added");
    assert_eq!(end.completed().stdout.lines, 3);
}

/// A line longer than [`Batch::MAX_LINE_BYTES`] is given cut, with its full length; one of just that length whole.
/// Numbers and neighbours are as if it were short.
pub async fn a_long_line_is_cut_and_its_neighbours_are_not(store: Arc<dyn LogStore>) {
    const MAX: usize = Batch::MAX_LINE_BYTES;
    let lengths = [3, MAX, 5, MAX + 1, 0, 2 * MAX + 77, MAX + 5, 9];
    let mut text = Vec::new();
    for (index, length) in lengths.into_iter().enumerate() {
        text.extend(std::iter::repeat_n(b'a' + index as u8, length));
        text.push(b'\n');
    }
    text.extend(std::iter::repeat_n(b'z', MAX + 9));
    let (id, mut writer) = start(&*store);
    for part in text.chunks(100_003) {
        append(&mut *writer, Stream::Stdout, part);
    }
    finish(writer);
    for first in 0..=lengths.len() {
        let got = read_from(&*store, &id, View::STDOUT, after(first as u64)).await;
        let expected = lengths.iter().copied().chain([MAX + 9]).enumerate().skip(first);
        assert_eq!(got.lines.len(), lengths.len() + 1 - first, "lines after {first}");
        for (line, (index, length)) in got.lines.iter().zip(expected) {
            let letter = if index == lengths.len() { b'z' } else { b'a' + index as u8 };
            assert_eq!(line.number, index as u64 + 1);
            assert_eq!(line.text.len(), length.min(MAX), "bytes given of line {}", line.number);
            assert!(line.text.iter().all(|&byte| byte == letter), "line {} has other bytes", line.number);
            let full = line.cut.map(|cut| cut.full_bytes);
            assert_eq!(full, (length > MAX).then_some(length as u64), "line {}", line.number);
        }
    }
    let rest = all_bytes(&*store, &id, Stream::Stdout, 1 << 20);
    assert!(rest == text, "the bytes of long lines must all be kept");
}

/// However appends are cut, the lines are the same.
pub async fn appends_may_be_split_at_every_byte(store: Arc<dyn LogStore>) {
    let text = b"first\n\nthird\r\n\xc3\xa9t\xc3\xa9\nlast";
    let parts = |cuts: &[usize]| -> Vec<Vec<u8>> {
        let ends = cuts.iter().copied().chain([text.len()]);
        ends.scan(0, |from, to| Some(text[std::mem::replace(from, to)..to].to_vec())).collect()
    };
    let mut ways: Vec<Vec<Vec<u8>>> = (0..=text.len()).map(|cut| parts(&[cut])).collect();
    ways.push(text.iter().map(|&byte| vec![byte]).collect());
    for parts in ways {
        let (id, mut writer) = start(&*store);
        for part in &parts {
            append(&mut *writer, Stream::Stderr, part);
        }
        let mut follower = open(&*store, &id, super::following(View::STDERR));
        super::next_lines(&mut follower, 4).await;
        finish(writer);
        let rest = drain(follower).await;
        assert_eq!(show(&rest.texts()), ["last"], "appended in {} parts", parts.len());
        let got = read_from(&*store, &id, View::STDERR, after(0)).await;
        assert_eq!(show(&got.texts()), show(&split(text)), "appended in {} parts", parts.len());
        assert_eq!(all_bytes(&*store, &id, Stream::Stderr, 9), text);
    }
}

/// A batch holds no more text than was asked for, unless a single line is longer.
pub async fn batches_keep_to_their_size(store: Arc<dyn LogStore>) {
    let text: String = (0..300).map(|n| format!("{}\n", "y".repeat(n % 50))).collect();
    let id = finished(&*store, text.as_bytes());
    for batch_bytes in [1, 10, 64, 1000] {
        let options = ReadOptions { batch_bytes, ..ReadOptions::new(View::STDOUT) };
        let mut events = open(&*store, &id, options);
        let mut bytes = Vec::new();
        while let Some(event) = events.next().await {
            if let crate::store::ReadEvent::Lines(batch) = event.expect("a read of a whole run") {
                let fits = batch.bytes.len() <= batch_bytes || batch.lines == 1;
                assert!(fits, "{} bytes in a batch of {batch_bytes}", batch.bytes.len());
                bytes.extend_from_slice(&batch.bytes);
            }
        }
        assert!(bytes == text.as_bytes(), "batches of {batch_bytes} bytes give another text");
    }
}
