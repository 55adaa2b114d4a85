//! The executable, as people and scripts use it.

mod away;
mod client;
mod errors;
mod folder;
mod follow;
mod holes;
mod logs;
mod metadata;
mod runs;
mod serve;

use std::sync::Arc;

use databuild_logs::{Exit, JobRunId, LogStore, Outcome, RunEnd, RunSpec, Stream};

use crate::support::cli::Databuild;
use crate::support::http::Server;
use crate::support::stores::Reopened;

/// A store, a server of it, and the executable asking that.
struct Setup {
    store: Arc<dyn LogStore>,
    server: Server,
    databuild: Databuild,
}

impl Setup {
    async fn new() -> Self {
        let store = Reopened::new();
        let server = Server::start(store.clone()).await;
        let databuild = Databuild::asking(format!("http://{}", server.address));
        Self { store: Arc::new(store), server, databuild }
    }

    fn start(&self, id: &str) {
        // The run goes on without its writer: it is written and finished through the store.
        std::mem::forget(self.store.start(RunSpec::new(run_id(id))).unwrap());
    }

    fn out(&self, id: &str, text: impl AsRef<[u8]>) {
        self.store.append(&run_id(id), Stream::Stdout, text.as_ref()).unwrap();
    }

    fn err(&self, id: &str, text: impl AsRef<[u8]>) {
        self.store.append(&run_id(id), Stream::Stderr, text.as_ref()).unwrap();
    }

    fn finish(&self, id: &str, outcome: Outcome) {
        self.store.finish(&run_id(id), RunEnd::now(outcome)).unwrap();
    }

    /// A run that has printed this and succeeded.
    fn finished(&self, id: &str, out: impl AsRef<[u8]>) {
        self.out(id, out);
        self.finish(id, exited(0));
    }
}

fn run_id(id: &str) -> JobRunId {
    id.parse().unwrap()
}

const fn exited(code: i32) -> Outcome {
    Outcome::Exited(Exit::Code(code))
}

/// `1` to `last`, a line each.
fn numbers(last: u64) -> String {
    (1..=last).map(|n| format!("{n}\n")).collect()
}
