//! Runs whose files have anything in them.

use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::support::mutate::{fuzz, mutated, rounds};

/// The runs of the fixture, and `packed`: one of them that is compressed.
fn runs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1/job_runs");
    copy_folder(&fixture, &folder.path().join("job_runs"));
    copy_folder(&fixture.join("ok"), &folder.path().join("job_runs/packed"));
    let store = service(folder.path());
    store.compress(&id("packed")).unwrap();
    store.close().unwrap();
    folder
}

/// A file of a run, and what stands in it instead.
fn damage(runs: &Path) -> impl Strategy<Value = (&'static str, &'static str, Vec<u8>)> + use<> {
    let file = |run: &'static str, name: &'static str, words: &[&str]| {
        let sample = fs::read(runs.join("job_runs").join(run).join(name)).unwrap();
        mutated(vec![sample], words).prop_map(move |bytes| (run, name, bytes)).boxed()
    };
    let words =
        ["18446744073709551615", "-1", "null", "\"lost\"", "\"running\"", "\"finished_at\":", "[", "{"];
    let totals = r#"{"job_run_id":"plain","exit_code":0,"stdout":{"bytes":8,"lines":2},"stderr":{"bytes":4,"lines":1}}"#;
    let metadata_of_plain = mutated(vec![totals.as_bytes().to_vec()], &words);
    prop_oneof![
        file("failed", "journal", &[]),
        file("lost", "journal", &[]),
        file("ok", "journal", &[]),
        file("ok", "metadata.json", &words),
        file("plain", "metadata.json", &words),
        metadata_of_plain.prop_map(|bytes| ("plain", "metadata.json", bytes)),
        file("plain", "stdout.log", &["\n", "\r", "\0"]),
        file("failed", "stderr.log", &["\n", "\r", "\0"]),
        file("packed", "stdout.log.zst", &[]),
        file("packed", "stderr.log.zst", &[]),
        file("packed", "journal.zst", &[]),
    ]
}

/// Whatever is in a run's files, its reads end, and every line has the number behind that of the one before it.
async fn reads_end(store: &dyn LogStore, run: &str, view: View, times: bool) {
    // Without a journal and without a `metadata.json` that can be read, somebody may still be writing it.
    let follow = run != "plain";
    let options = ReadOptions { times, follow, batch_bytes: 256, ..ReadOptions::new(view) };
    let mut events = store.read(&id(run), options).unwrap();
    let (mut at, mut numbers) = (0, [0; 2]);
    while let Some(event) = in_time(events.next()).await {
        match event.unwrap() {
            ReadEvent::Lines(batch) => {
                for line in batch.lines() {
                    at += 1;
                    assert_eq!(line.position.0, at, "{view}");
                    let number: &mut u64 = &mut numbers[batch.stream.index()];
                    *number += 1;
                    assert_eq!(line.number.0, *number, "{view}");
                }
            }
            ReadEvent::Gap { gap, next } => {
                assert!(next.0 >= at, "{view}: {gap:?}");
                at = next.0;
                numbers[gap.stream.index()] = gap.after.0.saturating_add(gap.lines);
            }
            ReadEvent::End(ReadEnd::Complete(_)) => return,
            ReadEvent::End(ReadEnd::Running { next }) if !follow => return assert_eq!(next.0, at),
            ReadEvent::End(end) => panic!("{end:?} of {view}"),
        }
    }
    panic!("no end of {view}");
}

#[test]
fn whatever_is_in_a_runs_files_its_reads_end_and_number_every_line() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let runs = runs();
    let inputs = (damage(runs.path()), select(vec![false, false, false, true]));
    fuzz(rounds() / 20, inputs, |((run, name, bytes), as_service)| {
        let folder = tempfile::tempdir().unwrap();
        let of_run = folder.path().join("job_runs").join(run);
        copy_folder(&runs.path().join("job_runs").join(run), &of_run);
        fs::write(of_run.join(name), bytes).unwrap();
        let store = if as_service { service(folder.path()) } else { other_process(folder.path()) };
        runtime.block_on(async {
            for view in VIEWS {
                for times in [false, true] {
                    reads_end(&store, run, view, times).await;
                }
            }
        });
        let listed = store.runs(&RunQuery::default()).unwrap().runs;
        assert_eq!(listed.iter().map(JobMetadata::id).collect::<Vec<_>>(), [&id(run)]);
        assert_eq!(store.run(&id(run)).unwrap().id(), &id(run));
        store.close().unwrap();
    });
}
