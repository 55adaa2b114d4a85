//! A power cut at any moment of a run's life. What the executable asks of the system is recorded, and replayed on a model
//! of a disk that keeps what was synced, and of all else what it likes. Needs root, to mount, and `strace`.

mod disk;
mod trace;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use databuild_logs::{CheckOptions, FindingKind, JobMetadata, LogError, RunQuery, check_index};

use super::*;
use crate::crash::Random;
use crate::support::disk::SmallDisk;
use disk::{Disk, Image};
use trace::Call;

/// What the job prints on its standard output, in pieces with a moment between them: enough for some sectors.
const LINES: u64 = 800;
/// Cuts of each recorded run; `DATABUILD_TEST_POWER_CUTS=5000` for a night.
const CUTS: u64 = 120;

fn cuts() -> u64 {
    std::env::var("DATABUILD_TEST_POWER_CUTS").map_or(CUTS, |count| count.parse().unwrap())
}

/// A run, as the calls that recorded it and what it was in the end.
struct Recorded {
    logs: PathBuf,
    calls: Vec<Call>,
    end: JobMetadata,
}

fn record(durability: &str) -> (Databuild, Recorded) {
    let databuild = databuild().with("DATABUILD_LOG_DURABILITY", durability);
    let logs = databuild.home.path().join("logs");
    fs::create_dir(logs.join("job_runs")).unwrap();
    let script = format!(
        "for n in 0 1 2 3 4 5 6 7; do seq -f 'this is line number %g of the job' $((n*{0}+1)) $((n*{0}+{0})); \
         sleep 0.02; printf 'a line of some sectors: %01700d\n' $n; echo oops $n >&2; sleep 0.2; done; exit 7",
        LINES / 8
    );
    let trace = databuild.home.path().join("trace");
    let args = ["run", "--quiet", "--id", "r", "--", "sh", "-c", &script];
    databuild.start_traced(&trace, &trace::OPTIONS, &args).done().code(7);
    let calls = trace::read(&fs::read_to_string(trace).unwrap(), &logs);
    let end = metadata(&logs.join("job_runs/r"));
    (databuild, Recorded { logs, calls, end })
}

/// Whatever a disk keeps of what was not synced: a run that has its `metadata.json` is whole, every other is lost, tells
/// what is missing, and has all that was synced.
#[tokio::test]
async fn a_power_cut_at_any_call_leaves_a_run_that_is_whole_or_lost_and_never_a_wrong_line() {
    let home = tempfile::tempdir().unwrap();
    let _in_memory = SmallDisk::at(home.path().to_owned(), 256);
    // A journal that is made later than its run began is one that somebody copied.
    let places: Vec<_> = (0..2 * cuts()).map(|cut| home.path().join(cut.to_string())).collect();
    for place in &places {
        fs::create_dir_all(place.join("job_runs/r")).unwrap();
        fs::write(place.join("job_runs/r/journal"), "").unwrap();
    }
    let recorded = thread::scope(|scope| {
        let recorded = ["on-finish", "1"].map(|durability| scope.spawn(|| record(durability)));
        recorded.map(|recorded| recorded.join().unwrap())
    });
    let mut random = Random::new();
    let mut found = BTreeMap::new();
    for (number, place) in places.iter().enumerate() {
        let (_, run) = &recorded[number % 2];
        // At the end of a run, much depends on each call.
        let from = if number % 4 < 2 { 0 } else { run.calls.len().saturating_sub(24) };
        let calls = from + random.below((run.calls.len() - from + 1) as u64) as usize;
        let mut disk = Disk::default();
        run.calls[..calls].iter().for_each(|call| disk.apply(call));
        let image = disk.after_a_power_cut(&mut random);
        image.write(place);
        let what = format!("cut {number}, behind {calls} calls: {:?}", run.calls[..calls].last());
        let outcome = check(place, &image, &disk, run, &what).await;
        *found.entry(outcome).or_insert(0) += 1;
        fs::remove_dir_all(place).unwrap();
    }
    println!("{found:?}");
    for outcome in [Found::Nothing, Found::Lost { gaps: false }, Found::Lost { gaps: true }, Found::Whole] {
        assert!(found.contains_key(&outcome), "no {outcome:?} among {found:?}");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    Nothing,
    Lost { gaps: bool },
    Whole,
}

/// Opens a store on what a power cut left, and holds what it says against what was written and what was synced.
async fn check(root: &Path, image: &Image, disk: &Disk, run: &Recorded, what: &str) -> Found {
    let id: JobRunId = "r".parse().unwrap();
    let options =
        FileStoreOptions { durability: Durability::None, min_free_bytes: 0, ..FileStoreOptions::default() };
    let store = FileLogStore::open(root, options).unwrap();
    // By then all folders are known.
    store.runs(&RunQuery::default()).unwrap();
    let found = match store.run(&id) {
        Err(LogError::NotFound { .. }) => {
            assert!(!image.has("job_runs/r"), "{what}: a run is not found");
            Found::Nothing
        }
        Err(error) => panic!("{what}: {error}"),
        Ok(told) if told.state.kind() == StateKind::Lost => {
            assert!(!image.has("job_runs/r/metadata.json"), "{what}: what had ended is lost");
            let mut gaps = false;
            for stream in Stream::BOTH {
                let name = format!("job_runs/r/{stream}.log");
                let synced = disk.synced(&name).iter().filter(|&&byte| byte == b'\n').count() as u64;
                let (given, missing) = read(&store, stream, run, what).await;
                let totals = told.totals_of(stream);
                assert!(given >= synced, "{what}: {synced} lines of {stream} were synced, {given} are there");
                assert_eq!(totals, (given + missing, missing), "{what}: {stream}");
                gaps |= missing > 0;
            }
            if image.has("job_runs/r/journal") {
                assert_eq!(metadata(&root.join("job_runs/r")), told, "{what}");
            }
            Found::Lost { gaps }
        }
        Ok(told) => {
            assert_eq!(told, run.end, "{what}");
            for stream in Stream::BOTH {
                let (given, missing) = read(&store, stream, run, what).await;
                assert_eq!((given, missing), (told.totals_of(stream).0, 0), "{what}: {stream}");
            }
            assert_eq!(metadata(&root.join("job_runs/r")), told, "{what}");
            Found::Whole
        }
    };
    if disk.has_synced("job_runs/r/metadata.json") {
        assert_eq!(found, Found::Whole, "{what}");
    }
    store.close().unwrap();
    drop(store);
    let report = check_index(root, CheckOptions { deep: true, repair: false }, |_| {}).unwrap();
    let is_known =
        |kind: &FindingKind| matches!(kind, FindingKind::LogShort) && found == Found::Lost { gaps: true };
    assert!(report.findings.iter().all(|finding| is_known(&finding.kind)), "{what}: {report:#?}");
    found
}

trait TotalsOf {
    /// Lines of a stream, and how many of them are missing.
    fn totals_of(&self, stream: Stream) -> (u64, u64);
}

impl TotalsOf for JobMetadata {
    fn totals_of(&self, stream: Stream) -> (u64, u64) {
        let totals = match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        };
        (totals.lines, totals.dropped_lines)
    }
}

/// Reads a stream to its end; gives how many lines came and how many are said to be missing. A line that came is the one
/// that was written under its number, or the beginning of one that was cut, if it is the last.
async fn read(store: &FileLogStore, stream: Stream, run: &Recorded, what: &str) -> (u64, u64) {
    let written = fs::read_to_string(run.logs.join(format!("job_runs/r/{stream}.log"))).unwrap();
    let written: Vec<_> = written.lines().collect();
    let options = ReadOptions { follow: true, ..ReadOptions::new(View::One(stream)) };
    let mut events = store.read(&"r".parse().unwrap(), options).unwrap();
    let (mut at, mut given, mut missing, mut is_torn) = (0, 0, 0, false);
    loop {
        match events.next().await.unwrap().unwrap() {
            ReadEvent::Lines(batch) => {
                let is_whole = batch.bytes.ends_with(b"\n");
                for line in batch.lines() {
                    assert!(!is_torn, "{what}: a line behind one without an end");
                    (at, given) = (at + 1, given + 1);
                    assert_eq!(line.number.0, at, "{what}");
                    let expected = written[at as usize - 1].as_bytes();
                    is_torn = line.text != expected;
                    assert!(
                        expected.starts_with(line.text) && (!is_torn || !is_whole),
                        "{what}: line {at} of {stream} is {:?}",
                        String::from_utf8_lossy(line.text)
                    );
                }
            }
            ReadEvent::Gap { gap, .. } => {
                assert_eq!((gap.after.0, gap.reason), (at, GapReason::Corrupt), "{what}");
                at += gap.lines;
                missing += gap.lines;
            }
            ReadEvent::End(ReadEnd::Complete(_)) => return (given, missing),
            ReadEvent::End(end) => panic!("{what}: {end:?}"),
        }
    }
}
