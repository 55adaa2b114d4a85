//! The runs as JSON: a page of them, and one.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::App;
use super::params::{Params, path, run_id, wrong};
use super::problem::Refusal;
use crate::run::StateKind;
use crate::store::{RunCursor, RunQuery};
use crate::wire::RunList;

/// The most runs in one page.
const MAX_PAGE: usize = 1000;

/// `GET /api/job_runs`
pub(super) async fn list(State(app): State<App>, params: Params) -> Result<Response, Refusal> {
    let query = query(&params)?;
    let page = app.blocking(move |store| store.runs(&query)).await?;
    let next = page.next.map(|cursor| cursor.0.to_string());
    Ok(json(&RunList { runs: page.runs, next, pinned: page.pinned }))
}

/// `GET /api/job_runs/{id}`
pub(super) async fn one(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    let id = run_id(&path(id)?)?;
    Ok(json(&app.blocking(move |store| store.run(&id)).await?))
}

fn query(params: &Params) -> Result<RunQuery, Refusal> {
    let page_size = "expected a number of runs from 1 to 1000";
    let limit = params.parsed::<usize>("limit", page_size)?;
    if let Some(limit) = limit.filter(|limit| !(1..=MAX_PAGE).contains(limit)) {
        return Err(wrong("limit", &limit.to_string(), page_size));
    }
    Ok(RunQuery {
        limit,
        cursor: params.parsed("cursor", "expected the `next` of the page before")?.map(RunCursor),
        state: params
            .parsed::<StateKind>("state", "expected running, succeeded, failed, cancelled or lost")?,
        partition: params.text("partition")?.map(str::to_owned),
        id_prefix: params.text("id_prefix")?.map(str::to_owned),
    })
}

pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => ([(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-cache")], body).into_response(),
        Err(error) => Refusal::internal(&error).into_response(),
    }
}
