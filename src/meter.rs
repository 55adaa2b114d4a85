//! What is counted for whoever watches: the names of all metrics, and nothing else. Without a recorder (see
//! `record_metrics`) counting does nothing.

use std::time::Duration;

use metrics::{Counter, counter, gauge, histogram};
#[cfg(feature = "server")]
use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

const RUNS: &str = "databuild_log_runs";
const BYTES: &str = "databuild_log_bytes";
const FREE: &str = "databuild_log_disk_free_bytes";
const APPENDED_BYTES: &str = "databuild_log_appended_bytes_total";
const APPENDED_LINES: &str = "databuild_log_appended_lines_total";
const DROPPED_BYTES: &str = "databuild_log_dropped_bytes_total";
const EVICTED_RUNS: &str = "databuild_log_evicted_runs_total";
const EVICTED_BYTES: &str = "databuild_log_evicted_bytes_total";
const COMPRESSED_RUNS: &str = "databuild_log_compressed_runs_total";
const SAVED_BYTES: &str = "databuild_log_compression_saved_bytes_total";
const FAILED_COMPRESSIONS: &str = "databuild_log_compression_failures_total";
const COMMITS: &str = "databuild_log_index_commits_total";
const FAILED_COMMITS: &str = "databuild_log_index_commit_failures_total";
#[cfg(feature = "server")]
const FOLLOWERS: &str = "databuild_log_followers";
/// The name of the one histogram.
pub(crate) const GC_SECONDS: &str = "databuild_log_gc_duration_seconds";

/// Says what each metric is, in the words of the README.
#[cfg(feature = "server")]
pub(crate) fn describe() {
    describe_gauge!(RUNS, "Runs that are known, by state: live or finished");
    describe_gauge!(BYTES, Unit::Bytes, "What everything under the log folder takes up on disk");
    describe_gauge!(FREE, Unit::Bytes, "What the log folder's file system has left");
    describe_counter!(APPENDED_BYTES, Unit::Bytes, "Output that was kept");
    describe_counter!(APPENDED_LINES, "Lines that were kept or counted as lost");
    describe_counter!(DROPPED_BYTES, Unit::Bytes, "Output that could not be kept");
    describe_counter!(EVICTED_RUNS, "Runs that were evicted, by reason");
    describe_counter!(EVICTED_BYTES, Unit::Bytes, "What evicted runs took up on disk, by reason");
    describe_counter!(COMPRESSED_RUNS, "Runs that were compressed");
    describe_counter!(SAVED_BYTES, Unit::Bytes, "What compressed runs take up less than before");
    describe_counter!(FAILED_COMPRESSIONS, "Runs that could not be compressed; they are tried again");
    describe_counter!(COMMITS, "Commits to the index");
    describe_counter!(FAILED_COMMITS, "Commits to the index that failed; they are tried again");
    describe_gauge!(FOLLOWERS, "Connections that follow a log");
    describe_histogram!(GC_SECONDS, Unit::Seconds, "How long it took to evict what was to be evicted");
}

/// Counts the output of one run. Made once a run: to look a counter up costs more than to count.
pub(crate) struct Appends {
    bytes: Counter,
    lines: Counter,
    dropped_bytes: Counter,
}

impl std::fmt::Debug for Appends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Appends").finish_non_exhaustive()
    }
}

impl Appends {
    pub(crate) fn new() -> Self {
        Self {
            bytes: counter!(APPENDED_BYTES),
            lines: counter!(APPENDED_LINES),
            dropped_bytes: counter!(DROPPED_BYTES),
        }
    }

    /// Output came in: so many bytes that were kept, lines, and bytes that were not kept.
    pub(crate) fn count(&self, bytes: u64, lines: u64, dropped_bytes: u64) {
        self.bytes.increment(bytes);
        self.lines.increment(lines);
        self.dropped_bytes.increment(dropped_bytes);
    }
}

/// Runs were evicted.
pub(crate) fn evicted(reason: &'static str, runs: u64, bytes: u64) {
    counter!(EVICTED_RUNS, "reason" => reason).increment(runs);
    counter!(EVICTED_BYTES, "reason" => reason).increment(bytes);
}

/// A run was compressed, which saved so many bytes.
pub(crate) fn compressed(saved_bytes: u64) {
    counter!(COMPRESSED_RUNS).increment(1);
    counter!(SAVED_BYTES).increment(saved_bytes);
}

/// A run could not be compressed.
pub(crate) fn compression_failed() {
    counter!(FAILED_COMPRESSIONS).increment(1);
}

/// Evicting is over, whether anything was evicted or not.
pub(crate) fn gc_took(time: Duration) {
    histogram!(GC_SECONDS).record(time.as_secs_f64());
}

/// The index was committed to, or could not be.
pub(crate) fn committed(well: bool) {
    counter!(if well { COMMITS } else { FAILED_COMMITS }).increment(1);
}

/// How things stand.
#[expect(clippy::cast_precision_loss, reason = "a gauge is a float; 2^53 bytes are exact")]
pub(crate) fn stands(live: u64, finished: u64, bytes: u64, free: u64) {
    gauge!(RUNS, "state" => "live").set(live as f64);
    gauge!(RUNS, "state" => "finished").set(finished as f64);
    gauge!(BYTES).set(bytes as f64);
    gauge!(FREE).set(free as f64);
}

/// A connection that follows a log, for as long as it lives.
#[cfg(feature = "server")]
#[derive(Debug)]
pub(crate) struct Follower(());

#[cfg(feature = "server")]
impl Follower {
    pub(crate) fn new() -> Self {
        gauge!(FOLLOWERS).increment(1.0);
        Self(())
    }
}

#[cfg(feature = "server")]
impl Drop for Follower {
    fn drop(&mut self) {
        gauge!(FOLLOWERS).decrement(1.0);
    }
}
