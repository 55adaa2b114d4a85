//! `databuild runs`.

use databuild_logs::{JobMetadata, Outcome, RunEnd, RunSpec, StateKind};

use crate::support::cli::{errors_on_terminal, on_terminal};

use super::{Setup, exited, run_id};

fn partitioned(setup: &Setup, id: &str, partition: &str, outcome: Outcome) {
    let mut spec = RunSpec::new(run_id(id)).command(["make", id]);
    spec.building_partitions = vec![partition.to_owned()];
    setup.store.start(spec).unwrap().finish(RunEnd::now(outcome)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_a_table_newest_first() {
    let setup = Setup::new().await;
    setup.databuild.run(&["runs"]).code(0).says("no runs");
    partitioned(&setup, "one", "data/alpha", exited(0));
    partitioned(&setup, "two", "data/beta", exited(3));
    let done = setup.databuild.run(&["runs"]).code(0);
    let rows: Vec<Vec<&str>> = done.text().lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["RUN", "STATE", "EXIT", "STARTED", "TOOK", "LINES", "SIZE", "COMMAND"]);
    assert_eq!(rows[1][..3], ["two", "failed", "3"]);
    assert!(rows[1].ends_with(&["make", "two"]));
    assert_eq!(rows[2][..3], ["one", "succeeded", "0"]);
    assert_eq!((rows.len(), done.stderr.as_str()), (3, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_chosen_by_state_and_partition() {
    let setup = Setup::new().await;
    partitioned(&setup, "one", "data/alpha", exited(0));
    partitioned(&setup, "two", "data/beta", exited(3));
    partitioned(&setup, "three", "data/beta", exited(0));
    let ids = |args: &[&str]| -> Vec<String> {
        let done = setup.databuild.run(&[&["runs", "-o", "json"], args].concat()).code(0);
        let run = |line| serde_json::from_str::<JobMetadata>(line).unwrap().id().to_string();
        done.text().lines().map(run).collect()
    };
    assert_eq!(ids(&[]), ["three", "two", "one"]);
    assert_eq!(ids(&["--state", "failed"]), ["two"]);
    assert_eq!(ids(&["--partition", "data/beta"]), ["three", "two"]);
    assert_eq!(ids(&["--partition", "data/beta", "--state", "succeeded"]), ["three"]);
    assert_eq!(ids(&["--limit", "2"]), ["three", "two"]);
    assert_eq!(ids(&["--state", "lost"]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_above_a_page_takes_several() {
    let setup = Setup::new().await;
    for n in 0..1005 {
        setup.start(&format!("r{n}"));
    }
    let listed =
        |limit| setup.databuild.run(&["runs", "-o", "json", "--limit", limit]).code(0).text().lines().count();
    assert_eq!(listed("1003"), 1003);
    assert_eq!(listed("5000"), 1005);
}

#[tokio::test(flavor = "multi_thread")]
async fn that_older_runs_are_not_shown_is_said_to_who_watches() {
    let setup = Setup::new().await;
    for n in 0..101 {
        setup.start(&format!("r{n}"));
    }
    let hint = "the newest 100 are shown; older runs: --limit N\n";
    assert_eq!(errors_on_terminal(setup.databuild.command(&["runs"]), 200), hint);
    assert_eq!(errors_on_terminal(setup.databuild.command(&["runs", "--limit", "101"]), 200), "");
    let done = setup.databuild.run(&["runs"]).code(0);
    assert_eq!((done.text().lines().count(), done.stderr.as_str()), (101, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn states_are_coloured_on_demand() {
    let setup = Setup::new().await;
    setup.start("r");
    assert!(setup.databuild.run(&["runs", "--color", "always"]).text().contains("\x1b[36mrunning\x1b[0m"));
    assert!(!setup.databuild.run(&["runs"]).text().contains('\x1b'));
    assert_eq!(setup.store.run(&run_id("r")).unwrap().state.kind(), StateKind::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_fits_the_terminal() {
    let setup = Setup::new().await;
    partitioned(&setup, "a-rather-long-target-name-for-a-narrow-terminal", "p", exited(0));
    let table = |columns| on_terminal(setup.databuild.command(&["runs", "--color", "never"]), columns);
    let width = |table: String| table.lines().map(|line| line.chars().count()).max().unwrap();
    assert_eq!(width(table(130)), 130);
    assert!(width(table(300)) > 130);
}
