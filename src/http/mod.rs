//! The HTTP service: runs as JSON, logs as Server-Sent Events and as bytes, and a page to read them on.
//!
//! A request becomes a call of [`LogStore`]; the store knows nothing of HTTP. Where a call may wait for a disk it
//! is made on a thread for blocking work.

mod auth;
mod compress;
mod json;
mod metrics;
mod params;
mod problem;
mod raw;
mod retention;
mod runs;
mod serve;
mod sse;
mod stream;
mod web;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{OriginalUri, State};
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};

use crate::error::LogError;
use crate::store::{LogStore, RunQuery};

pub use metrics::record_metrics;
use problem::Refusal;
pub use serve::{listen, serve, stop_signal};

/// What the service does beside the defaults.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// After how long without an event a comment is sent, so that nobody between takes the connection for dead; 15 s.
    pub heartbeat: Duration,
    /// What a client that lost its connection is told to wait before it reconnects; 1 s.
    pub retry: Duration,
    /// How long connections may go on after the shutdown; 5 s.
    pub drain: Duration,
    /// What has to be given as `Authorization: Bearer` on everything under `/api`, and on `/metrics`; `None` lets everybody in, which
    /// [`serve`] allows on loopback only.
    pub token: Option<String>,
    /// Whether a request is refused whose `Host` is not a name of this machine's loopback. [`serve`] turns it on
    /// when it listens on loopback: it is what keeps a page of another site from reading logs through a name that
    /// it points here.
    pub loopback_hosts_only: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(15),
            retry: Duration::from_secs(1),
            drain: Duration::from_secs(5),
            token: None,
            loopback_hosts_only: false,
        }
    }
}

impl std::fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerOptions")
            .field("heartbeat", &self.heartbeat)
            .field("retry", &self.retry)
            .field("drain", &self.drain)
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("loopback_hosts_only", &self.loopback_hosts_only)
            .finish()
    }
}

/// The service as a router, for those who have a server already.
///
/// [`serve`] adds what only a server can do: the end of open streams at the shutdown, and deadlines.
pub fn router(store: Arc<dyn LogStore>, options: ServerOptions) -> Router {
    App::new(store, options).router()
}

/// What every handler has at hand.
#[derive(Clone)]
struct App {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn LogStore>,
    options: ServerOptions,
    closing: AtomicBool,
}

impl App {
    fn new(store: Arc<dyn LogStore>, options: ServerOptions) -> Self {
        Self { shared: Arc::new(Shared { store, options, closing: AtomicBool::new(false) }) }
    }

    fn options(&self) -> &ServerOptions {
        &self.shared.options
    }

    fn router(&self) -> Router {
        let api = Router::new()
            .route("/job_runs", get(runs::list))
            .route("/job_runs/{id}", get(runs::one))
            .route("/job_runs/{id}/compress", post(compress::run))
            .route("/job_runs/{id}/pin", put(retention::pin).delete(retention::unpin))
            .route("/gc", post(retention::gc))
            .route("/job_runs/{id}/logs/{view}", get(stream::events))
            .route("/job_runs/{id}/logs/{stream}/raw", get(raw::bytes))
            .fallback(unknown_path)
            .layer(middleware::from_fn_with_state(self.clone(), auth::require_token));
        let metrics = Router::new()
            .route("/metrics", get(metrics::metrics))
            .layer(middleware::from_fn_with_state(self.clone(), auth::require_token));
        Router::new()
            .nest("/api", api)
            .merge(metrics)
            .route("/", get(web::index))
            .route("/assets/{name}", get(web::asset))
            .route("/healthz", get(async || "ok"))
            .route("/readyz", get(ready))
            .fallback(unknown_path)
            .method_not_allowed_fallback(async || Refusal::method())
            .layer(middleware::from_fn(auth::check_origin))
            .layer(middleware::from_fn_with_state(self.clone(), auth::check_host))
            .layer(middleware::map_response(secured))
            .with_state(self.clone())
    }

    /// Runs a call of the store that may wait for a disk.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn LogStore) -> Result<T, LogError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let store = Arc::clone(&self.shared.store);
        match tokio::task::spawn_blocking(move || call(&*store)).await {
            Ok(answer) => answer.map_err(Refusal::from),
            Err(panic) => Err(Refusal::internal(&panic)),
        }
    }
}

/// Ready is who is not shutting down and has a store that answers.
async fn ready(State(app): State<App>) -> Result<&'static str, Refusal> {
    if app.shared.closing.load(Ordering::Relaxed) {
        return Err(Refusal::from(LogError::Closed));
    }
    let query = RunQuery { limit: Some(1), ..RunQuery::default() };
    match app.blocking(move |store| store.runs(&query)).await {
        Ok(_) => Ok("ok"),
        Err(refusal) => Err(refusal.unavailable()),
    }
}

/// The address is the one that was asked for: what is nested sees only the end of it.
async fn unknown_path(OriginalUri(asked): OriginalUri) -> Refusal {
    Refusal::not_found(format!("nothing is at {}", asked.path()))
}

/// The headers of every response: nothing is loaded from elsewhere, nothing is guessed, nothing is told to others.
async fn secured(response: Response) -> impl IntoResponse {
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                          img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'";
    const HEADERS: [(HeaderName, HeaderValue); 3] = [
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    (HEADERS, response)
}
