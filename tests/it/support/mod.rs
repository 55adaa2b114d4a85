//! What several tests need.

pub(crate) mod browser;
pub(crate) mod http;
pub(crate) mod sse;
pub(crate) mod stores;
