//! The parameters of a request, each either right or refused by name.
//!
//! Parameters that are not known are ignored: URLs gain parameters, and an older service still answers them.

use std::str::FromStr;

use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;

use super::problem::Refusal;
use crate::run::JobRunId;

/// The query of a request.
#[derive(Debug)]
pub(super) struct Params(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(pairs)) => Ok(Self(pairs)),
            Err(error) => Err(Refusal::bad_request(format!("the query can't be read: {error}"))),
        }
    }
}

impl Params {
    /// The text of a parameter, `None` if it is not there.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, Refusal> {
        let mut given = self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let first = given.next();
        if given.next().is_some() {
            return Err(Refusal::bad_parameter(name, format!("{name} is given more than once")));
        }
        Ok(first)
    }

    /// A parameter that is read by its type; `expected` says what would be right.
    pub(super) fn parsed<T: FromStr>(&self, name: &str, expected: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| wrong(name, text, expected))
    }

    /// A whole number, digits only.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let expected = "expected a whole number of lines, 0 or more";
        match self.text(name)? {
            // A number's parser would take a sign too.
            Some(text) if !text.bytes().all(|b| b.is_ascii_digit()) => Err(wrong(name, text, expected)),
            _ => self.parsed(name, expected),
        }
    }

    /// `true` or `false`, also as 1 or 0; false if it is not there.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        match self.text(name)? {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(text) => Err(wrong(name, text, "expected true or false")),
        }
    }
}

/// The refusal of a value, by the name of its parameter.
pub(super) fn wrong(name: &str, given: &str, expected: &str) -> Refusal {
    let given: String = given.chars().take(100).collect();
    Refusal::bad_parameter(name, format!("{name} is {given:?}: {expected}"))
}

/// The run id of a path.
pub(super) fn run_id(given: &str) -> Result<JobRunId, Refusal> {
    Ok(given.parse()?)
}

/// The two varying parts of a log's path.
pub(super) type LogPath = Result<Path<(String, String)>, PathRejection>;

/// The parts of a path, or why it can't be read.
pub(super) fn path<T>(path: Result<Path<T>, PathRejection>) -> Result<T, Refusal> {
    match path {
        Ok(Path(parts)) => Ok(parts),
        Err(error) => Err(Refusal::bad_parameter("job_run_id", error.body_text())),
    }
}
