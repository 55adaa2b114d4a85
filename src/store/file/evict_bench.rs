//! What `benches/evict.rs` needs to measure what an eviction costs by the number of runs: an index of many runs,
//! without the millions of files that they would have.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::progress::Cuts;
use crate::index::{Changes, Index};
use crate::layout::Layout;
use crate::line::{Stream, UnixMicros};
use crate::retention::GcRequest;
use crate::run::{JobMetadata, JobRunId, RunSpec, RunState};
use crate::store::file::FileStoreOptions;
use crate::store::file::shared::Shared;
use crate::store::file::writer::OwnRun;
use crate::store::{Outcome, RunEnd};

/// Runs that are written with one commit.
const AT_ONCE: u64 = 50_000;

/// An index of many runs, of which only the one that is to be evicted next has a folder.
pub struct EvictionBench {
    shared: Arc<Shared>,
    folder: Layout,
    oldest: u64,
    runs: u64,
}

impl EvictionBench {
    /// Fills the index of a new log folder with so many runs that are over.
    ///
    /// # Errors
    ///
    /// What the disk or the index said.
    pub fn new(folder: &Path, runs: u64) -> Result<Self, LogError> {
        let layout = Layout::new(folder);
        layout.create()?;
        let index = Index::open(layout.index())?;
        for first in (1..=runs).step_by(AT_ONCE as usize) {
            let rows = first..=runs.min(first + AT_ONCE - 1);
            let runs = rows.map(|number| (number, record(number))).collect();
            index.commit(&Changes { runs, ..Changes::default() })?;
        }
        let options = FileStoreOptions::default();
        let shared = Arc::new(Shared::new(layout.clone(), options, Some(Arc::new(index)), runs));
        shared.discovery.set_done();
        Ok(Self { shared, folder: layout, oldest: 1, runs })
    }

    /// How long it takes to say which run is oldest, and what all of them take up.
    ///
    /// # Errors
    ///
    /// What the index said.
    pub fn plan(&self) -> Result<Duration, LogError> {
        let begun = Instant::now();
        let report = self.shared.gc(&GcRequest { dry_run: true, ..self.one() })?;
        assert!(report.evicted.len() + report.kept.len() == 1, "one run is planned");
        Ok(begun.elapsed())
    }

    /// How long it takes to evict the oldest run: its folder, its rows, the tombstone, the commit.
    ///
    /// # Errors
    ///
    /// What the disk or the index said.
    pub fn evict(&mut self) -> Result<Duration, LogError> {
        let id = id_of(self.oldest);
        let own = OwnRun::create(&self.folder, RunSpec::new(id.clone()), None, &self.shared.options)?;
        own.append(Stream::Stdout, &[b'\n'; 16_384])?;
        own.finish(RunEnd::now(Outcome::Lost))?;
        // It is the one that the index tells of.
        own.run.folder.write_metadata(&record(self.oldest).run, false)?;
        assert!(own.run.folder.disk_bytes() > 16_384, "there is something to remove");
        let begun = Instant::now();
        let report = self.shared.gc(&self.one())?;
        let took = begun.elapsed();
        assert!(report.evicted.len() == 1 && report.evicted[0].id == id, "the oldest is evicted");
        self.oldest += 1;
        Ok(took)
    }

    fn one(&self) -> GcRequest {
        GcRequest { max_bytes: Some(1), keep_last: Some(self.runs - self.oldest), ..GcRequest::default() }
    }
}

fn id_of(number: u64) -> JobRunId {
    format!("run-{number:09}").parse().expect("letters and digits are an id")
}

fn record(number: u64) -> RunRecord {
    let mut spec = RunSpec::new(id_of(number)).command(["make", "-j4", "all"]);
    spec.building_partitions.push(format!("data/{}", number % 1_000));
    let started = UnixMicros(1_700_000_000_000_000 + number * 1_000_000);
    let mut run = JobMetadata::started(spec, started);
    run.state = RunState::Succeeded { ended: UnixMicros(started.0 + 500_000) };
    RunRecord {
        run,
        gaps: Vec::new(),
        cuts: Cuts::default(),
        has_journal: true,
        disk_bytes: 20_480,
        compressed: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_after_the_other_is_planned_and_evicted() {
        let folder = tempfile::tempdir().unwrap();
        let mut bench = EvictionBench::new(folder.path(), 20).unwrap();
        for _ in 0..3 {
            bench.plan().unwrap();
            bench.evict().unwrap();
        }
    }
}
