//! An index file in which anything stands anywhere.

use std::fs;
use std::path::Path;
use std::time::Duration;

use databuild_logs::{CheckOptions, FileLogStore, FileStoreOptions, LogError, LogStore, check_index};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::{id, index_file, lines, numbered, open};
use crate::support::mutate::{fuzz, rounds};

const LINES: u64 = 2_000;
const RUNS: [&str; 3] = ["a", "b", "c"];

/// Bytes that take the place of others: random ones, or those of another page.
#[derive(Clone, Debug)]
enum Piece {
    Bytes(Vec<u8>),
    Page(Index),
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        vec(any::<u8>(), 1..64).prop_map(Piece::Bytes),
        (any::<u8>(), select(vec![1, 8, 512, 4096]))
            .prop_map(|(byte, count)| Piece::Bytes(vec![byte; count])),
        any::<Index>().prop_map(Piece::Page),
    ]
}

/// Overwrites what is in use: most of a young database's file is not.
fn overwrite(sound: &[u8], pieces: &[(Index, Piece)]) -> Vec<u8> {
    let used: Vec<_> = (0..sound.len()).filter(|&at| sound[at] != 0).collect();
    let mut bytes = sound.to_vec();
    for (at, piece) in pieces {
        let mut at = used[at.index(used.len())];
        let with = match piece {
            Piece::Bytes(with) => with.clone(),
            Piece::Page(page) => {
                at -= at % 4096;
                let from = 4096 * page.index(sound.len() / 4096);
                sound[from..from + 4096].to_vec()
            }
        };
        let end = bytes.len().min(at + with.len());
        bytes[at..end].copy_from_slice(&with[..end - at]);
    }
    bytes
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    RUNS.iter().for_each(|run| numbered(&store, run, LINES));
    store.close().unwrap();
    folder
}

/// Every answer is right, or an error that names the index.
async fn no_answer_is_wrong(folder: &Path) {
    let options =
        FileStoreOptions { liveness_interval: Duration::from_millis(1), ..FileStoreOptions::default() };
    let store = match FileLogStore::open(folder, options) {
        Ok(store) => store,
        Err(LogError::Index { path, .. } | LogError::Io { path, .. }) if path == index_file(folder) => return,
        Err(error) => panic!("{error:?}"),
    };
    for run in RUNS {
        for after in [0, 1_000, LINES - 1] {
            match lines(&store, run, after, 1).await {
                Ok(found) => assert_eq!(found, [format!("{:079}", after + 1)], "{run} after {after}"),
                Err(LogError::Index { path, .. }) => assert_eq!(path, index_file(folder)),
                Err(error) => panic!("{error:?}"),
            }
        }
        assert_eq!(store.run(&id(run)).unwrap().stdout.lines, LINES, "{run}");
    }
    numbered(&store, "new", 10);
    assert_eq!(lines(&store, "new", 8, 9).await.unwrap(), [9, 10].map(|n| format!("{n:079}")));
    drop(store.close());
}

#[test]
fn an_index_with_anything_anywhere_costs_no_line_and_is_mended() {
    let folder = folder();
    let sound = fs::read(index_file(folder.path())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    fuzz(rounds() / 100, vec((any::<Index>(), piece()), 1..6), |pieces| {
        for entry in fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
            if entry.file_name().to_str().unwrap().starts_with("index.redb") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        drop(fs::remove_dir_all(folder.path().join("job_runs/new")));
        fs::write(index_file(folder.path()), overwrite(&sound, &pieces)).unwrap();
        runtime.block_on(no_answer_is_wrong(folder.path()));
        let check = |repair| check_index(folder.path(), CheckOptions { deep: true, repair }, |_| ()).unwrap();
        let mended = check(true);
        assert!(mended.is_clean(), "{mended:#?}");
        assert_eq!(check(false).findings, []);
    });
}
