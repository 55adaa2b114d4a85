//! Lists of runs.

use std::sync::Arc;

use super::{append, finish, start, success};
use crate::line::Stream;
use crate::run::{Exit, JobRunId, RunSpec, StateKind};
use crate::store::{LogStore, Outcome, RunEnd, RunQuery};

/// The ids of all runs that match, gathered page by page.
fn listed(store: &dyn LogStore, query: &RunQuery) -> Vec<JobRunId> {
    let mut ids = Vec::new();
    let mut query = query.clone();
    loop {
        let page = store.runs(&query).expect("runs can be listed");
        let limit = query.limit.unwrap_or(RunQuery::DEFAULT_LIMIT);
        assert!(page.runs.len() <= limit, "{} runs in a page of {limit}", page.runs.len());
        assert!(page.next.is_none() || !page.runs.is_empty(), "an empty page must be the last");
        ids.extend(page.runs.iter().map(|run| run.id().clone()));
        assert!(ids.len() < 10_000, "paging does not end");
        match page.next {
            Some(cursor) => query.cursor = Some(cursor),
            None => return ids,
        }
    }
}

/// The run that was started last is listed first, whatever its id and whether it goes on; and as `run` tells it.
pub async fn runs_are_listed_newest_first(store: Arc<dyn LogStore>) {
    assert_eq!(listed(&*store, &RunQuery::default()), [], "the checks need a store that is empty");
    let mut expected = Vec::new();
    let mut live = Vec::new();
    for (n, name) in ["m", "z", "a", "Q", "b.1"].into_iter().enumerate() {
        let id: JobRunId = name.parse().expect("a valid id");
        let mut writer = store.start(RunSpec::new(id.clone())).expect("a run with a new id can be started");
        append(&mut *writer, Stream::Stdout, "one\n");
        if n % 2 == 0 {
            finish(writer);
        } else {
            live.push(writer);
        }
        expected.insert(0, id);
    }
    let page = store.runs(&RunQuery::default()).expect("runs can be listed");
    let ids: Vec<JobRunId> = page.runs.iter().map(|run| run.id().clone()).collect();
    assert_eq!(ids, expected);
    assert!(page.next.is_none(), "all runs are on one page");
    for run in page.runs {
        assert_eq!(store.run(run.id()).expect("a listed run is known"), run);
        assert_eq!(run.stdout.lines, 1);
    }
}

/// Pages of any size cover every run once; a run that starts between two pages moves none from its place.
pub async fn pages_cover_every_run_once(store: Arc<dyn LogStore>) {
    let mut expected: Vec<JobRunId> = Vec::new();
    for _ in 0..23 {
        let (id, writer) = start(&*store);
        finish(writer);
        expected.insert(0, id);
    }
    for limit in [1, 2, 7, 22, 23, 24, 500] {
        let query = RunQuery { limit: Some(limit), ..RunQuery::default() };
        assert_eq!(listed(&*store, &query), expected, "in pages of {limit}");
    }
    assert_eq!(listed(&*store, &RunQuery::default()), expected);
    let mut query = RunQuery { limit: Some(10), ..RunQuery::default() };
    let first = store.runs(&query).expect("runs can be listed");
    finish(start(&*store).1);
    query.cursor = first.next;
    let second = store.runs(&query).expect("runs can be listed");
    let ids: Vec<_> = first.runs.iter().chain(&second.runs).map(|run| run.id().clone()).collect();
    assert_eq!(ids, expected[..20], "a new run must not shift the pages");
}

/// Each filter keeps what it names; together they keep what all of them name.
pub async fn runs_are_filtered(store: Arc<dyn LogStore>) {
    let mut live = Vec::new();
    let mut all = Vec::new();
    let outcomes = [
        None,
        Some(Outcome::Exited(Exit::Code(0))),
        Some(Outcome::Exited(Exit::Code(1))),
        Some(Outcome::Cancelled(Exit::Signal(15))),
        Some(Outcome::Lost),
    ];
    for n in 0..20 {
        let prefix = if n % 4 == 0 { "night-" } else { "day-" };
        let mut spec = RunSpec::new(format!("{prefix}{n}").parse().expect("a valid id"));
        spec.building_partitions = vec![format!("data/{}", n % 3), "data/every".into()];
        let id = spec.id.clone();
        let writer = store.start(spec).expect("a run with a new id can be started");
        let outcome = outcomes[n % outcomes.len()];
        match outcome {
            Some(outcome) => drop(writer.finish(RunEnd::now(outcome)).expect("a live run can be finished")),
            None => live.push(writer),
        }
        let state = outcome.map_or(StateKind::Running, |outcome| RunEnd::now(outcome).state().kind());
        all.insert(0, (id, state, n));
    }
    let states = StateKind::ALL.into_iter().map(Some).chain([None]);
    for state in states {
        for partition in [None, Some("data/0"), Some("data/2"), Some("data/every"), Some("data"), Some("")] {
            for id_prefix in [None, Some("night-"), Some("day-1"), Some("ight"), Some("")] {
                for limit in [2, 100] {
                    let query = RunQuery {
                        limit: Some(limit),
                        cursor: None,
                        state,
                        partition: partition.map(str::to_owned),
                        id_prefix: id_prefix.map(str::to_owned),
                    };
                    let builds = |n: usize| {
                        partition.is_none_or(|name| name == "data/every" || name == format!("data/{}", n % 3))
                    };
                    let expected: Vec<JobRunId> = all
                        .iter()
                        .filter(|(id, kind, n)| {
                            state.is_none_or(|state| state == *kind)
                                && builds(*n)
                                && id_prefix.is_none_or(|prefix| id.as_str().starts_with(prefix))
                        })
                        .map(|(id, ..)| id.clone())
                        .collect();
                    assert_eq!(listed(&*store, &query), expected, "{query:?}");
                }
            }
        }
    }
    for writer in live {
        writer.finish(success()).expect("a live run can be finished");
    }
    let running = RunQuery { state: Some(StateKind::Running), ..RunQuery::default() };
    assert_eq!(listed(&*store, &running), [], "a run that ended is not running any more");
}
