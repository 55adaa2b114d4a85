//! A run that is followed from any place on is the run that was followed from its beginning.

use std::fs;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::journal::JournalWriter;
use crate::layout::Layout;
use crate::logfile::AppendFile;
use crate::run::{GapReason, RunSpec};

/// A journal of marks and holes, as a writer would have made them.
fn journal(arrivals: &[(bool, u16, u32, u8)]) -> (tempfile::TempDir, RunFolder, JobRunId) {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(folder.path());
    let id: JobRunId = "r".parse().unwrap();
    let of_run = layout.run(&id);
    fs::create_dir_all(of_run.path()).unwrap();
    let run = JobMetadata::started(RunSpec::new(id.clone()), UnixMicros(1_000));
    let mut writer = JournalWriter::begin(AppendFile::create(of_run.journal()).unwrap(), &run).unwrap();
    let mut records = Vec::new();
    for &(stderr, lines, bytes, kind) in arrivals {
        let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
        let (lines, bytes) = (u64::from(lines), u64::from(bytes));
        let what = match kind {
            0 => What::Gap(GapReason::DiskFull),
            _ if lines > 0 => What::Mark { unterminated: bytes / 3 },
            _ => What::Mark { unterminated: 0 },
        };
        // A hole covers whole lines, and a mark in which no line ends has nothing in it.
        let (lines, bytes) = match what {
            What::Gap(_) => (lines + 1, bytes),
            What::Mark { .. } => (lines, if lines == 0 { 0 } else { bytes }),
        };
        let what = if bytes == 0 && kind != 0 { What::Mark { unterminated: 0 } } else { what };
        records.push(Arrival { after_micros: 1 + u64::from(kind), stream, lines, bytes, what });
    }
    writer.append_arrivals(&records, true, |_, _| ()).unwrap();
    (folder, of_run, id)
}

/// The places to go on from, and how many lines and places come before each, itself included.
fn resumes(all: &News, started_at: UnixMicros, whole: &Tracker) -> Vec<(Resume, [usize; 2])> {
    let mut found = Vec::new();
    for (index, &progress) in all.found.places.iter().enumerate() {
        // Each record has a time of its own.
        let lines = all.found.lines.partition_point(|at| at.time <= progress.time);
        let mut next_offset = [Checkpointer::EVERY_BYTES; 2];
        for line in &all.found.lines[..lines] {
            next_offset[line.stream.index()] = line.offset + Checkpointer::EVERY_BYTES;
        }
        let before = |at: &&GapAt| at.gap.after.0 + at.gap.lines <= progress.of(at.gap.stream).lines;
        let gaps = all.gaps.iter().filter(before).copied().collect();
        let checkpointer = Checkpointer::behind_a_place(next_offset);
        let cuts = Cuts::default();
        found.push((Resume { started_at, progress, checkpointer, gaps, cuts }, [lines, index + 1]));
    }
    assert!(whole.progress.journal > 0);
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn going_on_from_a_place_finds_what_reading_all_finds(
        arrivals in vec((any::<bool>(), 0..40u16, 0..9_000u32, 0..20u8), 2_000..5_000),
    ) {
        let (_folder, folder, id) = journal(&arrivals);
        let (mut whole, run, _) = Tracker::open(&folder, &id, None).unwrap();
        let mut all = News { indexed: true, ..News::default() };
        whole.catch_up(&folder, &run, &mut all).unwrap();
        let places = resumes(&all, run.started_at, &whole);
        prop_assert_eq!(places.len(), arrivals.len() / 1024);
        for (resume, [lines, found]) in places {
            let began = resume.progress.journal;
            let (mut resumed, _, mut gaps) = Tracker::open(&folder, &id, Some(resume)).unwrap();
            prop_assert_eq!(resumed.progress.journal, began, "nothing before it is read");
            let mut rest = News { indexed: true, ..News::default() };
            resumed.catch_up(&folder, &run, &mut rest).unwrap();
            gaps.append(&mut rest.gaps);
            prop_assert_eq!(&gaps, &all.gaps);
            prop_assert_eq!(resumed.progress, whole.progress);
            prop_assert_eq!(resumed.checkpointer, whole.checkpointer);
            prop_assert_eq!(&rest.found.lines, &all.found.lines[lines..]);
            prop_assert_eq!(&rest.found.places, &all.found.places[found..]);
        }
    }
}

#[test]
fn a_place_that_the_journal_does_not_bear_out_is_not_used() {
    let (_folder, folder, id) = journal(&[(false, 2, 10, 1); 1_100]);
    let (mut whole, run, _) = Tracker::open(&folder, &id, None).unwrap();
    let mut all = News { indexed: true, ..News::default() };
    whole.catch_up(&folder, &run, &mut all).unwrap();
    let (resume, _) = resumes(&all, run.started_at, &whole).remove(0);
    let opened = |resume| Tracker::open(&folder, &id, Some(resume)).unwrap().0.progress;
    assert_eq!(opened(resume.clone()), resume.progress);
    let start = Tracker::open(&folder, &id, None).unwrap().0.progress;
    for shift in [1, 1_000_000] {
        let mut moved = resume.clone();
        moved.progress.journal += shift;
        assert_eq!(opened(moved), start);
    }
    assert_eq!(opened(Resume { started_at: UnixMicros(2), ..resume }), start, "of another run");
}
