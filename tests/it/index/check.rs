//! Planted damage is found, named and mended.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use databuild_logs::{
    CheckOptions, CheckReport, FileLogStore, FileStoreOptions, FindingKind, LogStore, Repair, RunSpec,
    Stream, check_index,
};

use super::{assert_numbered, id, index_file, numbered, open, plain, success};
use crate::support::cli::Databuild;

fn check(folder: &Path, deep: bool, repair: bool) -> CheckReport {
    check_index(folder, CheckOptions { deep, repair }, |_| ()).unwrap()
}

/// A folder with a few runs, and no service.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    numbered(&store, "big", 5_000);
    numbered(&store, "small", 3);
    plain(folder.path(), "by-hand", 2_000);
    store.close().unwrap();
    let store = open(folder.path());
    store.runs(&databuild_logs::RunQuery::default()).unwrap();
    store.close().unwrap();
    assert_eq!(check(folder.path(), true, false), CheckReport { runs: 3, ..CheckReport::default() });
    folder
}

fn of_run(folder: &Path, run: &str, file: &str) -> PathBuf {
    folder.join("job_runs").join(run).join(file)
}

fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

fn kinds(report: &CheckReport) -> Vec<FindingKind> {
    report.findings.iter().map(|finding| finding.kind).collect()
}

/// Plants damage, and checks that it is found, that looking changes nothing, and that it is mended.
#[track_caller]
fn found_and_mended(deep: bool, expected: &[FindingKind], plant: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = folder();
    plant(folder.path());
    let index = fs::read(index_file(folder.path())).ok();
    let report = check(folder.path(), deep, false);
    assert_eq!(kinds(&report), expected, "{report:#?}");
    assert!(index == fs::read(index_file(folder.path())).ok(), "looking changes no byte of the index");
    assert!(!report.is_clean() && report.findings.iter().all(|f| f.repair == Repair::NotAsked));
    assert_eq!(check(folder.path(), deep, false), report, "looking changes nothing");
    let mended = check(folder.path(), deep, true);
    assert_eq!(kinds(&mended), expected);
    assert!(mended.is_clean(), "{mended:#?}");
    let after = check(folder.path(), true, false);
    assert_eq!(after.findings, [], "clean after");
    folder
}

/// Damage that is told and can't be undone.
#[track_caller]
fn found_and_told(deep: bool, expected: &[FindingKind], plant: impl FnOnce(&Path)) {
    let folder = folder();
    plant(folder.path());
    let report = check(folder.path(), deep, true);
    assert_eq!(kinds(&report), expected, "{report:#?}");
    assert!(matches!(report.findings[0].repair, Repair::Impossible { .. }), "{report:#?}");
    assert!(!report.is_clean());
}

#[tokio::test]
async fn no_index() {
    let folder =
        found_and_mended(false, &[FindingKind::IndexMissing], |at| fs::remove_file(index_file(at)).unwrap());
    assert_numbered(&open(folder.path()), "big", 5_000).await;
}

#[test]
fn an_index_that_is_none() {
    for content in [&b""[..], b"nonsense", &[0; 40_000]] {
        found_and_mended(false, &[FindingKind::IndexDamaged], |at| {
            fs::write(index_file(at), content).unwrap()
        });
    }
}

#[test]
fn a_flipped_page_of_the_index() {
    found_and_mended(true, &[FindingKind::IndexDamaged], |at| {
        let mut bytes = fs::read(index_file(at)).unwrap();
        // The name of a run stands in its row, and in pages that are not in use any more.
        let places: Vec<_> = (0..bytes.len() - 7).filter(|&at| bytes[at..].starts_with(b"by-hand")).collect();
        places.into_iter().for_each(|at| bytes[at] ^= 1);
        fs::write(index_file(at), bytes).unwrap();
    });
}

#[test]
fn a_folder_that_is_gone() {
    found_and_mended(false, &[FindingKind::Ghost], |at| {
        fs::remove_dir_all(of_run(at, "small", "")).unwrap();
    });
}

#[test]
fn a_folder_that_is_not_known() {
    found_and_mended(false, &[FindingKind::Orphan], |at| plain(at, "new", 3));
}

#[test]
fn an_outdated_index() {
    found_and_mended(false, &[FindingKind::RecordDiffers, FindingKind::PlacesDiffer], |at| {
        let other = FileLogStore::open_folder(at, FileStoreOptions::default()).unwrap();
        let mut writer = other.start(RunSpec::new(id("later"))).unwrap();
        let store = open(at);
        store.run(&id("later")).unwrap();
        store.close().unwrap();
        writer.append(Stream::Stdout, &[b'\n'; 100_000]).unwrap();
        writer.finish(success()).unwrap();
    });
}

#[test]
fn a_writer_that_is_gone() {
    let folder = found_and_mended(false, &[FindingKind::Orphan], |at| plain(at, "new", 3));
    // A copy of a folder has no writer.
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    let mut writer = other.start(RunSpec::new(id("cut-off"))).unwrap();
    writer.append(Stream::Stdout, b"one\ntwo").unwrap();
    writer.flush().unwrap();
    let copy = of_run(folder.path(), "copied", "");
    fs::create_dir(&copy).unwrap();
    for file in ["journal", "stdout.log", "stderr.log"] {
        fs::copy(of_run(folder.path(), "cut-off", file), copy.join(file)).unwrap();
    }
    writer.finish(success()).unwrap();
    fs::remove_dir_all(of_run(folder.path(), "cut-off", "")).unwrap();
    fs::rename(&copy, of_run(folder.path(), "cut-off", "")).unwrap();
    append(&of_run(folder.path(), "cut-off", "journal"), b"\x40torn");
    let report = check(folder.path(), false, false);
    assert_eq!(kinds(&report), [FindingKind::Abandoned, FindingKind::JournalTorn]);
    assert!(check(folder.path(), false, true).is_clean());
    assert_eq!(check(folder.path(), true, false).findings, []);
    let run = open(folder.path()).run(&id("cut-off")).unwrap();
    assert_eq!((run.state.kind(), run.stdout.lines), (databuild_logs::StateKind::Lost, 2));
}

#[test]
fn a_run_that_may_be_being_copied_is_not_ended_yet_and_that_is_said() {
    let (folder, elsewhere) = (folder(), tempfile::tempdir().unwrap());
    let other = FileLogStore::open_folder(elsewhere.path(), FileStoreOptions::default()).unwrap();
    let mut writer = other.start(RunSpec::new(id("cut-off"))).unwrap();
    writer.append(Stream::Stdout, b"one\n").unwrap();
    writer.flush().unwrap();
    // A journal that was made this much later than its run started is a copy.
    std::thread::sleep(Duration::from_millis(600));
    let copy = of_run(folder.path(), "cut-off", "");
    fs::create_dir(&copy).unwrap();
    for file in ["journal", "stdout.log", "stderr.log"] {
        fs::copy(of_run(elsewhere.path(), "cut-off", file), copy.join(file)).unwrap();
    }
    let report = check(folder.path(), false, true);
    let why = report.findings.iter().find_map(|finding| match &finding.repair {
        Repair::Impossible { why } => Some(why.as_str()),
        _ => None,
    });
    let expected = "its folder changed a moment ago, and it may be being copied: try again in some seconds";
    assert_eq!(why, Some(expected), "{report:?}");
}

#[test]
fn bytes_behind_the_end_of_a_journal() {
    found_and_mended(false, &[FindingKind::JournalTorn], |at| {
        append(&of_run(at, "small", "journal"), b"\x07")
    });
}

#[tokio::test]
async fn a_journal_that_is_damaged_within() {
    // Its lines are all there, so nothing that the index says of them changes.
    let plant = |at: &Path| {
        let path = of_run(at, "big", "journal");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        fs::write(path, bytes).unwrap();
    };
    let folder = folder();
    plant(folder.path());
    let report = check(folder.path(), false, false);
    assert_eq!(report.findings[0].kind, FindingKind::JournalDamaged);
    let mended = check(folder.path(), false, true);
    assert!(mended.is_clean(), "{mended:#?}");
    assert_eq!(check(folder.path(), true, false).findings, []);
    let store = open(folder.path());
    assert_numbered(&store, "big", 5_000).await;
    assert!(store.run(&id("big")).unwrap().state.exit().is_some(), "it is not lost");
}

#[tokio::test]
async fn a_damaged_journal_does_not_make_a_lost_run_of_one_that_succeeded() {
    let folder = folder();
    let path = of_run(folder.path(), "big", "journal");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes).unwrap();
    let metadata = fs::read(of_run(folder.path(), "big", "metadata.json")).unwrap();
    fs::remove_file(index_file(folder.path())).unwrap();
    let store = open(folder.path());
    assert_numbered(&store, "big", 5_000).await;
    let run = store.run(&id("big")).unwrap();
    assert_eq!(run.state.kind(), databuild_logs::StateKind::Succeeded);
    assert_eq!(fs::read(of_run(folder.path(), "big", "metadata.json")).unwrap(), metadata);
}

#[test]
fn a_journal_without_a_beginning() {
    let plant = |at: &Path| fs::write(of_run(at, "small", "journal"), "not ours").unwrap();
    let folder = folder();
    plant(folder.path());
    let report = check(folder.path(), false, true);
    assert_eq!(kinds(&report), [FindingKind::JournalDamaged, FindingKind::RecordDiffers]);
    assert!(matches!(report.findings[0].repair, Repair::Impossible { .. }));
    assert!(matches!(report.findings[1].repair, Repair::Done { .. }));
}

#[test]
fn no_metadata() {
    found_and_mended(false, &[FindingKind::MetadataMissing], |at| {
        fs::remove_file(of_run(at, "small", "metadata.json")).unwrap();
    });
}

#[test]
fn metadata_that_is_none_and_metadata_of_another_run() {
    for text in ["{", r#"{"job_run_id":"other","exit_code":1}"#] {
        found_and_mended(false, &[FindingKind::MetadataDiffers], |at| {
            fs::write(of_run(at, "small", "metadata.json"), text).unwrap();
        });
    }
}

#[test]
fn fields_that_others_added_to_the_metadata_are_no_finding() {
    let folder = folder();
    let path = of_run(folder.path(), "small", "metadata.json");
    let text = fs::read_to_string(&path).unwrap().replacen('{', r#"{"owner":"somebody","#, 1);
    fs::write(path, text).unwrap();
    assert_eq!(check(folder.path(), true, false).findings, []);
}

#[test]
fn logs_of_another_length() {
    found_and_told(false, &[FindingKind::LogShort], |at| {
        let log = OpenOptions::new().write(true).open(of_run(at, "big", "stdout.log")).unwrap();
        log.set_len(100).unwrap();
    });
    found_and_told(false, &[FindingKind::LogLong], |at| append(&of_run(at, "big", "stdout.log"), b"x\n"));
}

#[test]
fn lines_that_were_changed_are_seen_by_counting() {
    let plant = |at: &Path| {
        let path = of_run(at, "big", "stdout.log");
        let mut bytes = fs::read(&path).unwrap();
        bytes[5] = b'\n';
        fs::write(path, bytes).unwrap();
    };
    let unseen = folder();
    plant(unseen.path());
    assert_eq!(check(unseen.path(), false, false).findings, []);
    found_and_told(true, &[FindingKind::LinesDiffer], plant);
}

#[test]
fn what_writers_left_that_died_early() {
    let leftovers = [FindingKind::Leftover; 3];
    let folder = found_and_mended(false, &leftovers, |at| {
        fs::write(at.join("index.redb.new"), "half").unwrap();
        fs::write(of_run(at, "small", ".metadata.json.77.new"), "{").unwrap();
        prepared(at, Duration::from_secs(3600));
    });
    assert!(!folder.path().join("job_runs/.early.77-0.new").exists());
    prepared(folder.path(), Duration::ZERO);
    assert_eq!(check(folder.path(), false, true).findings, [], "somebody may be preparing it");
    assert!(folder.path().join("job_runs/.early.77-0.new").exists());
}

/// The folder of a run whose writer died before it began, this long ago.
fn prepared(folder: &Path, ago: Duration) {
    let path = folder.join("job_runs/.early.77-0.new");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("journal"), "").unwrap();
    File::open(path).unwrap().set_modified(SystemTime::now() - ago).unwrap();
}

#[test]
fn a_service_removes_what_writers_left_that_died_early() {
    let folder = folder();
    prepared(folder.path(), Duration::from_secs(3600));
    let store = open(folder.path());
    store.runs(&databuild_logs::RunQuery::default()).unwrap();
    assert!(!folder.path().join("job_runs/.early.77-0.new").exists());
}

#[test]
fn a_service_lets_go_of_rows_whose_folder_is_gone() {
    let folder = folder();
    fs::remove_dir_all(of_run(folder.path(), "small", "")).unwrap();
    let store = open(folder.path());
    assert!(store.runs(&databuild_logs::RunQuery::default()).unwrap().runs.len() >= 2);
    store.close().unwrap();
    assert_eq!(check(folder.path(), false, false).findings, []);
}

#[test]
fn runs_that_are_being_written_are_no_finding() {
    let folder = folder();
    let other = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    let mut writer = other.start(RunSpec::new(id("live"))).unwrap();
    writer.append(Stream::Stdout, b"a\nb").unwrap();
    let report = check(folder.path(), true, true);
    assert_eq!((report.runs, report.live, report.findings.len()), (4, 1, 0));
    writer.append(Stream::Stdout, b"c\n").unwrap();
    assert_eq!(writer.finish(success()).unwrap().stdout.lines, 2);
}

#[test]
fn the_command_line_says_what_it_found() {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    numbered(&store, "r1", 3);
    store.close().unwrap();
    let done = databuild.run(&["index", "check", "--deep"]).code(0);
    assert_eq!(done.text(), "1 runs looked at: everything agrees\n");
    fs::remove_file(of_run(&logs, "r1", "metadata.json")).unwrap();
    let done = databuild.run(&["index", "check"]).code(1);
    assert!(done.text().starts_with("no metadata.json of run r1: "), "{done:?}");
    let done = databuild.run(&["index", "check", "-o", "json"]).code(1);
    let report: serde_json::Value = serde_json::from_str(done.text()).unwrap();
    assert_eq!(report["findings"][0]["kind"], "metadata_missing");
    assert_eq!(report["findings"][0]["repair"]["state"], "not_asked");
    let done = databuild.run(&["index", "check", "--repair"]).code(0);
    assert!(done.text().contains("; mended: written as the journal says"), "{done:?}");
    databuild.run(&["index", "check"]).code(0);
}

/// An index that was not closed, and one that the database could mend.
#[test]
fn looking_changes_no_byte_of_an_index_whatever_is_wrong_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    numbered(&store, "r", 5_000);
    store.runs(&databuild_logs::RunQuery::default()).unwrap();
    let path = index_file(folder.path());
    let not_closed = fs::read(&path).unwrap();
    store.close().unwrap();
    let sound = fs::read(&path).unwrap();
    let used: Vec<usize> = (0..sound.len()).filter(|&at| sound[at] != 0).collect();
    let flipped = used.iter().step_by(used.len() / 40).map(|&at| {
        let mut flipped = sound.clone();
        flipped[at] ^= 16;
        flipped
    });
    let mut found = 0;
    for bytes in [not_closed].into_iter().chain(flipped) {
        fs::write(&path, &bytes).unwrap();
        for deep in [false, true] {
            found += check(folder.path(), deep, false).findings.len();
            assert!(fs::read(&path).unwrap() == bytes, "the index is as it was");
        }
    }
    assert!(found >= 5, "{found}");
}

#[test]
fn what_could_not_be_looked_at_is_told_apart_from_what_was_found() {
    let databuild = Databuild::new();
    let logs = databuild.home.path().join("logs");
    let store = open(&logs);
    let says = |args: &[&str], why: &str| {
        let done = databuild.run(&[&["index", "check", "-o", "json"], args].concat()).code(4).says(why);
        let told: serde_json::Value = serde_json::from_str(done.text()).unwrap();
        assert!(told["error"].as_str().is_some_and(|error| error.contains(why)), "{told}");
        assert!(told.get("findings").is_none());
        assert_eq!(databuild.run(&[&["index", "check"], args].concat()).code(4).text(), "");
        databuild.run_unread(&[&["index", "check", "-o", "json"], args].concat()).code(4).says(why);
    };
    says(&[], "another process");
    says(&["--log-dir", "/nonexistent"], "does not exist");
    store.close().unwrap();
    databuild.run(&["index", "check", "-o", "json"]).code(0);
    databuild.run_unread(&["index", "check", "-o", "json"]).code(0);
    plain(&logs, "new", 3);
    for format in ["json", "text"] {
        databuild.run(&["index", "check", "-o", format]).code(1);
        databuild.run_unread(&["index", "check", "-o", format]).code(1);
    }
}
