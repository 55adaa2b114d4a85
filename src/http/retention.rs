//! Evicting, and pinning a run: the requests that change something.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::App;
use super::params::{Params, path, run_id, wrong};
use super::problem::Refusal;
use super::runs::json;
use crate::retention::GcRequest;

/// `POST /api/gc`
pub(super) async fn gc(State(app): State<App>, params: Params) -> Result<Response, Refusal> {
    let request = request(&params)?;
    Ok(json(&app.blocking(move |store| store.gc(&request)).await?))
}

fn request(params: &Params) -> Result<GcRequest, Refusal> {
    let whole = |name: &str, expected: &str| match params.text(name)? {
        // A number's parser would take a sign too.
        Some(text) if !text.bytes().all(|b| b.is_ascii_digit()) => Err(wrong(name, text, expected)),
        _ => params.parsed::<u64>(name, expected),
    };
    let seconds = whole("older_than", "expected a whole number of seconds; 0: no such limit")?;
    Ok(GcRequest {
        dry_run: params.flag("dry_run")?,
        older_than: seconds.map(std::time::Duration::from_secs),
        max_bytes: whole("max_bytes", "expected a whole number of bytes; 0: no such limit")?,
        keep_last: whole("keep_last", "expected a whole number of runs")?,
    })
}

/// `PUT /api/job_runs/{id}/pin`
pub(super) async fn pin(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Refusal> {
    set_pinned(app, id, true).await
}

/// `DELETE /api/job_runs/{id}/pin`
pub(super) async fn unpin(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Refusal> {
    set_pinned(app, id, false).await
}

async fn set_pinned(
    app: App,
    id: Result<Path<String>, PathRejection>,
    pinned: bool,
) -> Result<StatusCode, Refusal> {
    let id = run_id(&path(id)?)?;
    app.blocking(move |store| store.set_pinned(&id, pinned)).await?;
    Ok(StatusCode::NO_CONTENT)
}
