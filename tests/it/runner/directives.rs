//! Lines by which a job speaks to its caller.

use super::*;

#[test]
fn directives_reach_the_caller_and_stay_in_the_log() {
    let bench = Bench::new();
    let text = "before\n\
        DATABUILD_MISSING_DEPS_JSON:{\"version\":\"1\",\"missing_deps\":[{\"impacted\":[{\"ref\":\"a\"}],\"missing\":[{\"ref\":\"b\"}]}]}\n\
        DATABUILD_COST_JSON:{\"eur\":1}\n\
        DATABUILD_MISSING_DEPS_JSON:{oops\n\
        after\n";
    fs::write(bench.path("text"), text).unwrap();
    let mut running = bench.sh("cat text; exit 1");
    let found = events(&mut running);
    let [
        JobEvent::MissingDeps(deps),
        JobEvent::Directive { name, json },
        JobEvent::Malformed { name: bad, .. },
    ] = &found[..]
    else {
        panic!("{found:?}")
    };
    assert_eq!((deps[0].impacted[0].name.as_str(), deps[0].missing[0].name.as_str()), ("a", "b"));
    assert_eq!((name.as_str(), json.as_str(), bad.as_str()), ("COST", "{\"eur\":1}", "MISSING_DEPS"));
    assert_eq!(bench.stdout(&running), text);
    let run = bench.store.run(running.job_run_id()).unwrap();
    assert_eq!(run.missing_deps, *deps);
    assert_eq!(run.state.exit(), Some(Exit::Code(1)));
}

#[test]
fn a_directive_that_is_split_over_reads_is_one() {
    let bench = Bench::new();
    for gate in ["gate-1", "gate-2", "gate-3"] {
        bench.gate(gate);
    }
    let script = "printf 'x\nDATA'; read _ <gate-1; printf BUILD_A_; read _ <gate-2; printf 'JSON:[1'; read _ <gate-3; printf ',2]'";
    let mut running = bench.sh(script);
    for (seen, gate) in
        [("x\nDATA", "gate-1"), ("x\nDATABUILD_A_", "gate-2"), ("x\nDATABUILD_A_JSON:[1", "gate-3")]
    {
        bench.until_stdout(&running, seen);
        bench.open_gate(gate);
    }
    let found = events(&mut running);
    assert!(
        matches!(&found[..], [JobEvent::Directive { name, json }] if name == "A" && json == "[1,2]"),
        "{found:?}"
    );
}

#[test]
fn a_directive_over_a_mebibyte_is_text() {
    let bench = Bench::new();
    let line = format!("DATABUILD_MISSING_DEPS_JSON:\"{}\"\n", "x".repeat(1024 * 1024));
    fs::write(bench.path("text"), line.clone() + "DATABUILD_NEXT_JSON:1\n").unwrap();
    let mut running = bench.sh("cat text");
    let found = events(&mut running);
    assert!(
        matches!(&found[..], [JobEvent::Malformed { .. }, JobEvent::Directive { name, .. }] if name == "NEXT"),
        "{found:?}"
    );
    assert!(bench.stdout(&running).starts_with(&line));
    assert!(bench.store.run(running.job_run_id()).unwrap().missing_deps.is_empty());
}

#[test]
fn missing_deps_without_end_are_bounded_and_the_run_says_how_many_were_left_out() {
    let bench = Bench::new();
    let name = "x".repeat(100_000);
    let line = format!("DATABUILD_MISSING_DEPS_JSON:{{\"impacted\":[\"{name}\"],\"missing\":[]}}\n");
    fs::write(bench.path("text"), line.repeat(30)).unwrap();
    let mut running = bench.sh("cat text");
    let end = end(&running);
    let kept = recorded(&end).missing_deps.len();
    assert_eq!(kept, 10);
    assert_eq!(end.note.as_deref(), Some("20 lines of missing deps are only in the log"));
    let found = events(&mut running);
    let Some(JobEvent::NotKept { directives }) = found.last() else { panic!("{} events", found.len()) };
    assert_eq!(found.len() - 1 + usize::try_from(*directives).unwrap(), 30);
}
