//! The integration tests, one binary: link time is felt every day.
mod http;
mod support;
mod web;
