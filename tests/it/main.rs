//! The integration tests, one binary: link time is felt every day.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod http;
mod support;
mod web;
