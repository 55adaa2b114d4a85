//! `POST /api/job_runs/{id}/compress`: compresses a run that is over, and answers when that is done.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;

use super::App;
use super::params::{path, run_id};
use super::problem::Refusal;
use crate::wire::Compressed;

/// How long the status of the answer waits for how it went.
const PATIENCE: Duration = Duration::from_secs(5);

/// The handler. A large run takes longer than anybody between waits for an answer: then the answer begins with blank
/// lines, one for every heartbeat, and how it went stands behind them.
pub(super) async fn run(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    let id = run_id(&path(id)?)?;
    let heartbeat = app.options().heartbeat;
    let work = {
        let app = app.clone();
        async move { app.blocking(move |store| store.compress(&id)).await }
    };
    // It goes on when the client goes.
    let mut work = tokio::spawn(work);
    let head = [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-cache")];
    if let Ok(done) = tokio::time::timeout(PATIENCE, &mut work).await {
        let done = done.map_err(|panic| Refusal::internal(&panic))??;
        return Ok((head, document(&Compressed::Done(done))).into_response());
    }
    let pieces = stream::unfold(Some(work), move |work| async move {
        let mut work = work?;
        let piece = match tokio::time::timeout(heartbeat, &mut work).await {
            Err(_) => return Some((Ok::<_, Infallible>(Bytes::from_static(b"\n")), Some(work))),
            Ok(Ok(Ok(done))) => Compressed::Done(done),
            Ok(Ok(Err(refusal))) => Compressed::Failed(refusal.problem().clone()),
            Ok(Err(panic)) => Compressed::Failed(Refusal::internal(&panic).problem().clone()),
        };
        Some((Ok(document(&piece)), None))
    });
    Ok((head, Body::from_stream(pieces)).into_response())
}

fn document(answer: &Compressed) -> Bytes {
    serde_json::to_vec(answer).unwrap_or_default().into()
}
