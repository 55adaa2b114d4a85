//! Connections that come to nothing. Their errors have no types that could be asked for, only texts.

use std::error::Error;

use reqwest::{RequestBuilder, Response};

/// How the errors begin that a connection gives when the other side does not speak HTTP.
const NO_HTTP: [&str; 3] = ["invalid HTTP", "message head is too large", "received unexpected message"];
/// How the error begins that says that the other side closed a connection, or spoke on it, before the request was sent.
const NOT_SENT: [&str; 1] = ["operation was canceled"];
/// How often a request is sent at most whose connections come to such an end: what speaks before it is asked can only
/// be told from what does not answer if it is asked in time.
const MOST_SENT: u32 = 8;

/// Sends a request, and again if nothing of it was sent.
pub(super) async fn send(request: RequestBuilder) -> reqwest::Result<Response> {
    for _ in 1..MOST_SENT {
        let Some(again) = request.try_clone() else { break };
        match again.send().await {
            Err(error) if cause(&error, &NOT_SENT).is_some() => {}
            answer => return answer,
        }
    }
    request.send().await
}

/// What the other side said in place of HTTP, if that is what went wrong.
pub(super) fn no_http(error: &reqwest::Error) -> Option<String> {
    cause(error, &NO_HTTP)
}

/// The cause of an error whose text begins so.
fn cause(error: &reqwest::Error, beginnings: &[&str]) -> Option<String> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if beginnings.iter().any(|beginning| text.starts_with(beginning)) {
            return Some(text);
        }
        cause = error.source();
    }
    None
}
