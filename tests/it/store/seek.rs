//! Where a read begins.

use super::*;

/// Wherever a line is between two places that the index keeps, and whatever lies there: blank lines, long ones.
#[tokio::test]
async fn a_read_begins_with_the_line_that_it_is_to_begin_with() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("r"))).unwrap();
    let line = |n: u64| match n % 17 {
        0 => String::new(),
        5 if n.is_multiple_of(11) => format!("{n} {}", "x".repeat(40_000)),
        _ => format!("{n} {}", "x".repeat((n * 7 % 180) as usize)),
    };
    for n in 1..=6000 {
        writer.append(Stream::Stdout, format!("{}\n", line(n)).as_bytes()).unwrap();
    }
    writer.finish(success()).unwrap();
    store.close().unwrap();
    drop(store);
    let (indexed, plain) = (open(folder.path()), other_process(folder.path()));
    for after in (0..6000).step_by(23).chain(5990..6000) {
        for store in [&indexed, &plain] {
            let options = ReadOptions {
                start: Start::After(LineNumber(after)),
                limit: Some(3),
                ..ReadOptions::new(View::STDOUT)
            };
            let (lines, _) = read(store, &id("r"), options).await;
            let texts: Vec<_> = lines.into_iter().map(|(_, text)| text).collect();
            let expected: Vec<_> = (after + 1..=6000).take(3).map(line).collect();
            assert_eq!(texts, expected, "after {after}");
        }
    }
}
