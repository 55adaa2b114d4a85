//! Folders written by earlier releases are read by this one.

use std::fs;
use std::path::Path;

use databuild_logs::{
    Exit, FileLogStore, FileStoreOptions, LineNumber, LogStore, ReadEvent, ReadOptions, RunQuery, Start,
    StateKind, View,
};
use futures_util::StreamExt;

use crate::support::cli::until;
use crate::support::copy_folder;

/// A copy of a fixture that the test may write to.
fn copy_of(version: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(version), folder.path());
    folder
}

async fn lines(store: &dyn LogStore, run: &str, view: View, after: u64) -> Vec<Vec<u8>> {
    let options = ReadOptions { start: Start::After(LineNumber(after)), ..ReadOptions::new(view) };
    let mut events = store.read(&run.parse().unwrap(), options).unwrap();
    let mut lines = Vec::new();
    while let Some(event) = events.next().await {
        if let ReadEvent::Lines(batch) = event.unwrap() {
            lines.extend(batch.lines().map(|line| line.text.to_vec()));
        }
    }
    lines
}

async fn check_v1(store: &dyn LogStore) {
    let run = |id: &str| store.run(&id.parse().unwrap()).unwrap();
    let ok = run("ok");
    assert_eq!(ok.spec.building_partitions, ["data/alpha", "data/beta"]);
    assert_eq!((ok.spec.labels["branch"].as_str(), ok.spec.host.as_str()), ("main", "builder"));
    assert_eq!((ok.stdout.bytes, ok.stdout.lines, ok.stderr.lines), (88_921, 3_002, 1));
    assert_eq!(run("failed").state.exit(), Some(Exit::Code(3)));
    // Its folder has just been copied, and more might come.
    until(|| run("lost").state.kind() == StateKind::Lost, || "what was copied is never lost".to_owned());
    assert_eq!(run("plain").other["tool"], "by hand");

    let stdout = lines(store, "ok", View::STDOUT, 0).await;
    assert_eq!((stdout.len(), stdout[0].as_slice()), (3_002, &b"compiling"[..]));
    assert_eq!(lines(store, "ok", View::STDOUT, 2_900).await, stdout[2_900..], "behind a checkpoint");
    assert_eq!(stdout[3_001], b"bad byte \xff and no end");
    let all = lines(store, "ok", View::All, 0).await;
    assert_eq!(all.len(), 3_003);
    let warning = all.iter().position(|line| line == b"warning: unused").unwrap();
    assert!(
        (1..3_000).contains(&warning),
        "among the lines between which it arrived, not behind them: {warning}"
    );
    assert_eq!(lines(store, "lost", View::All, 0).await, [&b"last words"[..], b"torn"]);
    assert_eq!(lines(store, "plain", View::All, 0).await, [&b"one"[..], b"two", b"err"]);
}

#[tokio::test]
async fn v1_with_its_index() {
    let folder = copy_of("v1");
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), 4);
    check_v1(&store).await;
    let beside = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(beside, 3, "the index was taken as it was; a lock stands beside it and the runs");
}

#[tokio::test]
async fn v1_without_its_index() {
    let folder = copy_of("v1");
    fs::remove_file(folder.path().join("index.redb")).unwrap();
    let store = FileLogStore::open(folder.path(), FileStoreOptions::default()).unwrap();
    assert_eq!(store.runs(&RunQuery::default()).unwrap().runs.len(), 4);
    check_v1(&store).await;
}

#[tokio::test]
async fn v1_read_as_folders() {
    let folder = copy_of("v1");
    let store = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    check_v1(&store).await;
}
