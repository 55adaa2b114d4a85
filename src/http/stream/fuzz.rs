//! Requests for a log that are almost right.

use axum::extract::FromRequestParts;
use axum::http::{HeaderValue, Request as HttpRequest};
use futures_util::FutureExt;
use proptest::sample::select;

use super::*;
use crate::fuzz::{fuzz, mutated, rounds};

/// The query as a request has it; `None` if no request can have it.
fn params(query: &str) -> Option<Params> {
    let uri = format!("/api/job_runs/r/logs/stdout?{query}");
    let (mut parts, ()) = HttpRequest::get(uri).body(()).ok()?.into_parts();
    Params::from_request_parts(&mut parts, &()).now_or_never().unwrap().ok()
}

fn with_last_event_id(id: &[u8]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert("Last-Event-ID", HeaderValue::from_bytes(id).ok()?);
    Some(headers)
}

#[test]
fn a_last_event_id_is_a_cursor_or_refused() {
    let ids = ["0", "7", "18446744073709551615", "42!", "007"].map(|id| id.as_bytes().to_vec()).into();
    let queries = select(vec!["", "follow=true", "since=5&lines=9", "lines=3", "since=9"]);
    fuzz(
        rounds(),
        (mutated(ids, &["!", "-", "+", " ", "18446744073709551616", "0"]), queries),
        |(id, query)| {
            let Some(headers) = with_last_event_id(&id) else { return };
            let given = request(View::STDOUT, &params(query).unwrap(), &headers);
            let cursor = std::str::from_utf8(&id).ok().and_then(|text| text.parse::<Cursor>().ok());
            let Some(cursor) = cursor else {
                if id.is_empty() {
                    assert!(given.unwrap().is_some(), "an empty one says nothing");
                } else {
                    let refused = given.unwrap_err();
                    let problem = refused.problem();
                    assert_eq!((problem.status, problem.parameter.as_deref()), (400, Some("Last-Event-ID")));
                    assert!(problem.detail.len() < 1_000);
                }
                return;
            };
            // It means the same as the cursor that it is, written again.
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
            let again = with_last_event_id(cursor.to_string().as_bytes()).unwrap();
            let given = given.unwrap();
            assert_eq!(given, request(View::STDOUT, &params(query).unwrap(), &again).unwrap());
            match (cursor, given) {
                (Cursor::Ended(_), None) => {}
                (Cursor::After(line), Some(given)) => assert_eq!(given.read.start, Start::After(line)),
                (cursor, given) => panic!("{cursor:?} gives {given:?}"),
            }
        },
    );
}

/// A request as the query that asks for it.
fn query_of(request: &Request) -> String {
    let Request { read, format, window: _ } = request;
    let mut query =
        format!("follow={}&format={}", read.follow, if *format == Format::Json { "json" } else { "text" });
    match read.start {
        Start::After(line) => query += &format!("&since={line}"),
        Start::LastLines { count, after } if read.follow => query += &format!("&lines={count}&since={after}"),
        Start::LastLines { count, .. } => query += &format!("&lines={count}"),
        Start::Since(time) => query += &format!("&since_time={time}"),
    }
    if let Some(limit) = read.limit {
        query += &format!("&lines={limit}");
    }
    query
}

#[test]
fn a_query_is_understood_or_refused_by_the_name_of_its_parameter() {
    let samples = [
        "follow=true&since=5&format=json",
        "lines=100",
        "since=18446744073709551615&lines=7",
        "since_time=2026-01-31T10:42:00.000001Z&lines=1",
        "follow=1&lines=0&since=3",
        "format=text&follow=false&unknown=%F0%9F%8C%8D",
    ];
    let samples = samples.map(|query| query.as_bytes().to_vec()).into();
    let words =
        ["&", "=", "%", "%00", "+", "-1", "since", "lines=", "follow", "18446744073709551616", "true", "é"];
    let known = ["follow", "since", "lines", "since_time", "format"];
    fuzz(rounds(), mutated(samples, &words), |query| {
        let Some(params) = std::str::from_utf8(&query).ok().and_then(params) else { return };
        match request(View::STDOUT, &params, &HeaderMap::new()) {
            Ok(request_of) => {
                let asked = request_of.expect("only a cursor says that there is nothing to give");
                let again = params_again(&asked);
                assert_eq!(again, Some(asked));
            }
            Err(refused) => {
                let problem = refused.problem();
                assert_eq!(problem.status, 400);
                assert!(
                    problem.parameter.as_deref().is_some_and(|name| known.contains(&name)),
                    "{problem:?}"
                );
            }
        }
    });
}

fn params_again(asked: &Request) -> Option<Request> {
    request(View::STDOUT, &params(&query_of(asked))?, &HeaderMap::new()).unwrap()
}
