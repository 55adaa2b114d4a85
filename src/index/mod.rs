//! The index: where lines are, what runs there are, which one is oldest. Derived from the run folders, and never
//! trusted beyond what they bear out.
//!
//! Every call opens a transaction of its own and drops it before it returns: a reader that holds one would make
//! the file grow. A commit syncs the disk, so only threads that may wait commit: the [`Committer`]'s, the opening of a
//! store, and whoever evicts or pins a run.

mod building;
mod checkpoints;
pub(crate) mod codec;
mod commit;
mod committer;
mod database;
mod failure;
mod handle;
mod looking;
mod lookup;
pub(crate) mod progress;
mod retention;
mod schema;

pub(crate) use building::NewIndex;
pub(crate) use commit::Changes;
pub(crate) use committer::{Committed, Committer, Urgency};
pub(crate) use database::quarantine;
pub(crate) use handle::Index;
pub(crate) use lookup::{Known, LineFloor};
pub(crate) use schema::RunNumber;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::codec::RunRecord;
    use super::progress::{Cuts, LineCheckpoint, Progress};
    use super::*;
    use crate::error::LogError;
    use crate::journal::Place;
    use crate::line::{Stream, UnixMicros};
    use crate::run::{JobMetadata, RunSpec, RunState, Tombstone};

    fn record(id: &str, partition: &str, ended: Option<u64>) -> RunRecord {
        let mut spec = RunSpec::new(id.parse().unwrap());
        spec.building_partitions.push(partition.into());
        let mut run = JobMetadata::started(spec, UnixMicros(1));
        if let Some(ended) = ended {
            run.state = RunState::Succeeded { ended: UnixMicros(ended) };
        }
        RunRecord {
            run,
            gaps: Vec::new(),
            cuts: Cuts::default(),
            has_journal: true,
            disk_bytes: 10,
            compressed: false,
        }
    }

    fn ids(found: &[(RunNumber, RunRecord)]) -> Vec<&str> {
        found.iter().map(|(_, record)| record.run.id().as_str()).collect()
    }

    fn index() -> (tempfile::TempDir, Index) {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(folder.path().join("index.redb")).unwrap();
        (folder, index)
    }

    #[test]
    fn runs_are_found_by_id_prefix_partition_and_age() {
        let (_folder, index) = index();
        let runs = vec![
            (1, record("aa", "p", Some(5))),
            (2, record("ab", "q", None)),
            (3, record("b", "p", Some(4))),
        ];
        index.commit(&Changes { runs, ..Changes::default() }).unwrap();
        assert!(matches!(index.find(&"ab".parse().unwrap()), Ok(Some(Known::Run(2, _)))));
        assert!(index.find(&"zz".parse().unwrap()).unwrap().is_none());
        let mut found = Vec::new();
        index.with_prefix("a", |number, record| found.push((number, record))).unwrap();
        assert_eq!(ids(&found), ["aa", "ab"]);
        assert_eq!(ids(&index.live_runs().unwrap()), ["ab"]);
        assert_eq!(index.last_number().unwrap(), 3);
        let mut newest = Vec::new();
        index
            .newest_of_partition("p", u64::MAX, |number, _| {
                newest.push(number);
                true
            })
            .unwrap();
        assert_eq!(newest, [3, 1]);
        let stone = Tombstone {
            id: "b".parse().unwrap(),
            evicted_at: UnixMicros(9),
            reason: "older than 7 days".into(),
            lines: 1,
            bytes: 2,
        };
        let changes =
            Changes { forgotten: vec![1, 3], tombstones: vec![stone.clone()], ..Changes::default() };
        index.commit(&changes).unwrap();
        assert!(index.find(&"aa".parse().unwrap()).unwrap().is_none());
        assert!(matches!(index.find(&stone.id), Ok(Some(Known::Evicted(found))) if found == stone));
    }

    #[test]
    fn places_are_found_by_line_time_and_position() {
        let (_folder, index) = index();
        let lines = (1..=100)
            .map(|i| LineCheckpoint {
                stream: Stream::Stdout,
                line: i * 600,
                offset: i * 65_536,
                time: UnixMicros(i),
            })
            .map(|at| (7, at))
            .collect();
        let progress = (1..=50u64)
            .map(|i| {
                let mut progress = Progress::start(UnixMicros(1_000_000 + i * i), i * 10);
                progress.streams[0].lines = i * 100;
                (7, progress)
            })
            .collect();
        index.commit(&Changes { lines, progress, ..Changes::default() }).unwrap();
        assert_eq!(index.line_floor(7, Stream::Stdout, 599).unwrap(), None);
        let place = |lines, offset| Place { lines, offset };
        let floor = LineFloor { place: place(1200, 131_072), next: Some(place(1800, 196_608)) };
        assert_eq!(index.line_floor(7, Stream::Stdout, 1799).unwrap(), Some(floor));
        assert_eq!(index.line_floor(8, Stream::Stdout, 1799).unwrap(), None);
        assert_eq!(index.line_floor(7, Stream::Stderr, 1799).unwrap(), None);
        let at = |time| index.progress_while(7, |p| p.time.0 < time).unwrap().map(|p| p.lines());
        assert_eq!((at(1_000_001), at(1_000_002), at(u64::MAX)), (None, Some(100), Some(5000)));
        for position in [0, 99, 100, 101, 2549, 2550, 5000, 9000] {
            let found = index.progress_while(7, |p| p.lines() <= position).unwrap().map_or(0, |p| p.lines());
            assert_eq!(found, (position / 100 * 100).min(5000), "{position}");
        }
        assert!(index.progress_while(8, |_| true).unwrap().is_none());
    }

    #[test]
    fn a_second_opener_is_told_so_and_damage_is_moved_aside() {
        let (folder, index) = index();
        let path = folder.path().join("index.redb");
        assert!(matches!(Index::open(path.clone()), Err(LogError::InUse { .. })));
        index.close().unwrap();
        assert!(matches!(index.last_number(), Err(LogError::Closed)));
        for damage in [&b""[..], b"not a database", &[0; 8192]] {
            fs::write(&path, damage).unwrap();
            let index = Index::open(path.clone()).unwrap();
            assert_eq!(index.last_number().unwrap(), 0);
            index.close().unwrap();
        }
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            5,
            "three of them, the last one and the lock"
        );
    }
}
