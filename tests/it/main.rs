//! The integration tests, one binary: link time is felt every day.
#![allow(clippy::unwrap_used, reason = "a test that unwraps an error has failed")]

mod buffered;
mod cap;
mod cli;
mod clock;
mod composite;
mod compress;
mod conformance;
mod copied;
mod crash;
mod damage;
mod format;
mod fulldisk;
mod http;
mod index;
mod laws;
mod layers;
mod model;
mod power;
mod retention;
mod runner;
mod store;
mod support;
mod web;
