//! Who is let in: the token, and the `Host` that a request must name on loopback.

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::problem::Refusal;

/// Refuses a request without the token, if there is one.
pub(super) async fn require_token(State(app): State<App>, request: Request, next: Next) -> Response {
    if let Some(token) = &app.options().token {
        let given = request.headers().get(AUTHORIZATION).map_or(&[][..], |value| value.as_bytes());
        if !bearer(given).is_some_and(|given| same(given, token.as_bytes())) {
            return Refusal::unauthorized().into_response();
        }
    }
    next.run(request).await
}

/// The token of an `Authorization` header; the scheme's case does not matter.
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Compares without telling by the time it takes where the difference is.
fn same(given: &[u8], token: &[u8]) -> bool {
    let difference = given.iter().zip(token).fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
    given.len() == token.len() && difference == 0
}

/// Refuses a request that names another host than loopback, when that is all there is to name.
///
/// A page of any site can point a name of its own at 127.0.0.1 and is then, to the browser, of the same origin as
/// this service. Its requests still carry that name. What comes without any name is no browser: probes that speak
/// HTTP/1.0 send none.
pub(super) async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    if app.options().loopback_hosts_only {
        let named = match request.uri().authority() {
            Some(authority) => Some(authority.as_str()),
            None => request.headers().get(HOST).map(|host| host.to_str().unwrap_or_default()),
        };
        if let Some(foreign) = named.filter(|name| !is_loopback(name)) {
            return Refusal::foreign_host(foreign).into_response();
        }
    }
    next.run(request).await
}

/// Refuses a request to change something that a browser makes for a page of another site. Such a request says where
/// the page is from, whatever the page wants.
pub(super) async fn check_origin(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let is_ours = match (text("sec-fetch-site"), text(ORIGIN.as_str())) {
        (Some(site), _) => matches!(site, "same-origin" | "none"),
        (None, Some(origin)) => {
            origin.split_once("://").is_some_and(|(_, host)| Some(host) == text(HOST.as_str()))
        }
        // No browser.
        (None, None) => true,
    };
    if !request.method().is_safe() && !is_ours {
        return Refusal::foreign_origin().into_response();
    }
    next.run(request).await
}

fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name.eq_ignore_ascii_case("localhost") || name == "127.0.0.1" || name == "[::1]"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_loopback_pass_with_any_port() {
        for good in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:1"] {
            assert!(is_loopback(good), "{good}");
        }
        for bad in
            ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "::1", "10.0.0.1"]
        {
            assert!(!is_loopback(bad), "{bad}");
        }
    }

    #[test]
    fn tokens_are_the_same_only_when_whole() {
        assert!(same(b"secret", b"secret"));
        for bad in [&b""[..], b"secre", b"secrets", b"Secret"] {
            assert!(!same(bad, b"secret"));
        }
        assert_eq!(bearer(b"bEaReR  x "), Some(&b"x"[..]));
        assert_eq!(bearer(b"Basic x"), None);
        assert_eq!(bearer(b"Bearer"), None);
    }
}
