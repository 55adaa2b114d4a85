//! `GET /metrics`: what is counted, as Prometheus reads it.

use std::sync::{Mutex, OnceLock, PoisonError};

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::problem::Refusal;
use crate::meter;

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Begins to count for `GET /metrics`, for this process and as long as it lives. Done before a store is opened: runs
/// that began earlier are not counted. Doing it again changes nothing.
///
/// Gives false if the process has a recorder for the `metrics` crate already: that one is told everything, and
/// `GET /metrics` has nothing to say.
pub fn record_metrics() -> bool {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if RECORDER.get().is_some() {
        return true;
    }
    let buckets = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0];
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(meter::GC_SECONDS.to_owned()), &buckets)
        .unwrap_or_default();
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    if metrics::set_global_recorder(recorder).is_err() {
        return false;
    }
    meter::describe();
    RECORDER.set(handle).is_ok()
}

/// The handler.
pub(super) async fn metrics() -> Result<Response, Refusal> {
    let Some(recorder) = RECORDER.get() else {
        return Err(Refusal::not_found("this service does not count for itself"));
    };
    recorder.run_upkeep();
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], recorder.render()).into_response())
}
