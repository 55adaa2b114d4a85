//! `databuild runs compress`: compresses a run that is over.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use databuild_logs::{Compression, FileStoreOptions, JobRunId, LogError};

use crate::args::{CompressArgs, RunsFormat};
use crate::failure::Failure;
use crate::locate::{Located, RunName, locate};
use crate::printing::byte_count;
use crate::settings::{Settings, runtime};
use crate::source::Source;
use crate::stop;
use crate::store::{blocking, open_for_service};

/// Asks the service that has the run; without one, takes the folder for as long as it lasts.
pub(crate) fn run(args: &CompressArgs, settings: &Settings) -> Result<ExitCode, Failure> {
    let name = RunName::parse(&args.run)?;
    let (id, done) = runtime()?.block_on(async {
        stop::on_interrupt()?;
        let Located { source, id, .. } = locate(settings, &name, false).await?;
        let done = match source {
            Source::Service(client) => client.compress(&id).await?,
            Source::Folder { dir, .. } => {
                let (id, options) = (id.clone(), settings.environment.store_options()?);
                blocking(move || in_folder(&dir, options, &id)).await?
            }
        };
        Ok::<_, Failure>((id, done))
    })?;
    print(&id, done, args.output)?;
    Ok(ExitCode::SUCCESS)
}

fn in_folder(dir: &Path, options: FileStoreOptions, id: &JobRunId) -> Result<Compression, LogError> {
    // Nothing else is to be compressed meanwhile.
    let store = open_for_service(dir, FileStoreOptions { compress_after: None, ..options })?;
    let done = store.compress(id)?;
    store.close()?;
    Ok(done)
}

fn print(id: &JobRunId, done: Compression, format: RunsFormat) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match format {
        RunsFormat::Json => {
            let (before, after) = (done.bytes_before, done.bytes_after);
            writeln!(
                out,
                "{}",
                serde_json::json!({"job_run_id": id, "bytes_before": before, "bytes_after": after})
            )
        }
        RunsFormat::Text => {
            writeln!(
                out,
                "{id}: {} on disk, {} before",
                byte_count(done.bytes_after),
                byte_count(done.bytes_before)
            )
        }
    }
}
