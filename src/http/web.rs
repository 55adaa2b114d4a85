//! The page's files. They are part of the executable, so they always fit the service they talk to.

use axum::extract::Path;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};

use super::problem::Refusal;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

const INDEX: &str = include_str!("web/index.html");

/// What is at `/assets`: name, type, content.
const ASSETS: [(&str, &str, &str); 8] = [
    ("style.css", CSS, include_str!("web/style.css")),
    ("icon.svg", SVG, include_str!("web/icon.svg")),
    ("app.js", JS, include_str!("web/app.js")),
    ("ansi.js", JS, include_str!("web/ansi.js")),
    ("format.js", JS, include_str!("web/format.js")),
    ("lines.js", JS, include_str!("web/lines.js")),
    ("log.js", JS, include_str!("web/log.js")),
    ("runs.js", JS, include_str!("web/runs.js")),
];

/// `GET /`
pub(super) async fn index(headers: HeaderMap) -> Response {
    file(&headers, HTML, INDEX)
}

/// `GET /assets/{name}`
pub(super) async fn asset(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, Refusal> {
    let Some((_, kind, content)) = ASSETS.into_iter().find(|(known, _, _)| *known == name) else {
        return Err(Refusal::not_found(format!("the page has no file {name:?}")));
    };
    Ok(file(&headers, kind, content))
}

/// A browser asks each time whether its copy is still right: after an update the old page must not stay.
fn file(headers: &HeaderMap, kind: &'static str, content: &'static str) -> Response {
    let tag = format!("\"{:08x}\"", crc32fast::hash(content.as_bytes()));
    let known = headers.get(IF_NONE_MATCH).is_some_and(|given| given.as_bytes() == tag.as_bytes());
    let caching = [(CACHE_CONTROL, "no-cache".to_owned()), (ETAG, tag)];
    if known {
        (StatusCode::NOT_MODIFIED, caching).into_response()
    } else {
        (caching, [(CONTENT_TYPE, kind)], content).into_response()
    }
}
