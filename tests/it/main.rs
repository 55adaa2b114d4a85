//! The integration tests, one binary: link time is felt every day.
#![allow(clippy::unwrap_used, reason = "a test that unwraps an error has failed")]

mod buffered;
mod cli;
mod composite;
mod conformance;
mod format;
mod http;
mod index;
mod layers;
mod runner;
mod store;
mod support;
mod web;
