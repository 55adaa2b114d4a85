//! `metadata.json` that is almost right.

use super::JobMetadata;
use crate::fuzz::{fixture, fuzz, in_bounded_memory, mutated, rounds};

#[test]
fn a_metadata_file_is_refused_or_says_the_same_when_it_is_written_again() {
    let mut samples: Vec<_> =
        ["ok", "failed", "plain"].map(|run| fixture(&format!("v1/job_runs/{run}/metadata.json"))).into();
    samples.push(
        br#"{"job_run_id":"r","state":"cancelled","signal":15,"missing_deps":[{"impacted":["a"],"missing":[{"ref":"b"}]}],
             "duration_ms":7,"note":"n","stdout":{"bytes":1,"lines":1},"cost":1.25,"tags":[[],{},null,true]}"#
            .to_vec(),
    );
    let words = [
        "null",
        "-1",
        "0.1",
        "1e99",
        "18446744073709551615",
        "\"lost\"",
        "\"running\"",
        "\"2026-01-01T00:00:00Z\"",
        "[",
        "{",
        "\"\\u0000\"",
        "\"state\":",
        "\"signal\":9,",
        "\"exit_code\":0,",
        "\"other\":",
    ];
    fuzz(rounds(), mutated(samples, &words), |text| {
        let read = |text: &[u8]| serde_json::from_slice::<JobMetadata>(text);
        let Ok(run) = in_bounded_memory(&text, read) else { return };
        let written = serde_json::to_vec(&run).unwrap();
        assert_eq!(read(&written).unwrap(), run, "{}", String::from_utf8_lossy(&written));
        assert_eq!(run.stdout.plus(run.stderr), run.stderr.plus(run.stdout));
        let completion = run.completion();
        assert_eq!(completion.state, run.state.kind());
        assert_eq!(run.state.is_over(), completion.duration_ms.is_some());
    });
}
