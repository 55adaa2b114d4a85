//! The integration tests, one binary: link time is felt every day.
mod cli;
mod http;
mod support;
