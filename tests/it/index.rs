//! The index as a derived thing: taken away, damaged, outdated or made anew, the answers stay right.

mod check;
mod damage;
mod faults;
mod fuzz;
mod kills;
mod rebuild;

use std::fs;
use std::path::Path;

use databuild_logs::{
    Exit, FileLogStore, FileStoreOptions, JobRunId, LineNumber, LogError, LogStore, Outcome, ReadEvent,
    ReadOptions, RunEnd, RunSpec, Start, Stream, View, dump_index,
};
use futures_util::StreamExt;
use serde_json::Value;

fn open(folder: &Path) -> FileLogStore {
    FileLogStore::open(folder, FileStoreOptions::default()).unwrap()
}

fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

/// A finished run of so many lines, each of which says its number; 80 bytes a line.
fn numbered(store: &dyn LogStore, run: &str, lines: u64) {
    let mut writer = store.start(RunSpec::new(id(run))).unwrap();
    let text: String = (1..=lines).map(|n| format!("{n:079}\n")).collect();
    for piece in text.as_bytes().chunks(9_999) {
        writer.append(Stream::Stdout, piece).unwrap();
    }
    writer.finish(success()).unwrap();
}

/// A folder by another tool, which has no journal.
fn plain(folder: &Path, run: &str, lines: u64) {
    let text: String = (1..=lines).map(|n| format!("{n:079}\n")).collect();
    plain_of(folder, run, &[("stdout.log", text.as_bytes())]);
}

/// The same with these logs. It appears all at once.
fn plain_of(folder: &Path, run: &str, logs: &[(&str, &[u8])]) {
    let prepared = folder.join("prepared-elsewhere");
    fs::create_dir_all(&prepared).unwrap();
    fs::create_dir_all(folder.join("job_runs")).unwrap();
    for (name, text) in logs {
        fs::write(prepared.join(name), text).unwrap();
    }
    let json = format!(r#"{{"job_run_id":"{run}","exit_code":0,"finished_at":"2026-01-01T00:00:00Z"}}"#);
    fs::write(prepared.join("metadata.json"), json).unwrap();
    fs::rename(prepared, folder.join("job_runs").join(run)).unwrap();
}

/// The lines of standard output behind `after`, at most `limit`; or what went wrong.
async fn lines(store: &dyn LogStore, run: &str, after: u64, limit: u64) -> Result<Vec<String>, LogError> {
    let start = Start::After(LineNumber(after));
    let options = ReadOptions { start, limit: Some(limit), ..ReadOptions::new(View::STDOUT) };
    let mut events = store.read(&id(run), options)?;
    let mut lines = Vec::new();
    while let Some(event) = events.next().await {
        if let ReadEvent::Lines(batch) = event? {
            lines.extend(batch.lines().map(|line| String::from_utf8_lossy(line.text).into_owned()));
        }
    }
    Ok(lines)
}

/// Checks that a run made by [`numbered`] is read right from several places.
async fn assert_numbered(store: &dyn LogStore, run: &str, count: u64) {
    for after in [0, 1, count / 3, count / 2, count - 2] {
        let found = lines(store, run, after, 3).await.unwrap();
        let expected: Vec<_> = (after + 1..=(after + 3).min(count)).map(|n| format!("{n:079}")).collect();
        assert_eq!(found, expected, "{run} behind line {after}");
    }
}

/// All rows of the index of a folder that no store has open.
fn dump(folder: &Path) -> Vec<Value> {
    let mut rows = Vec::new();
    dump_index(folder, |row| {
        rows.push(row);
        Ok(())
    })
    .unwrap();
    rows
}

fn index_file(folder: &Path) -> std::path::PathBuf {
    folder.join("index.redb")
}

/// Files that an index was moved aside to.
fn quarantined(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    entries.filter(|name| name.to_str().unwrap().starts_with("index.redb.corrupt-")).count()
}
