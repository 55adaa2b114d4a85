//! `databuild runs`: lists runs, newest first.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use databuild_logs::{JobMetadata, RunQuery, UnixMicros};

use crate::args::{RunsArgs, RunsCommand, RunsFormat};
use crate::compress;
use crate::failure::Failure;
use crate::printing::{Table, note, terminal_width};
use crate::settings::{Settings, runtime};
use crate::source::{Source, SourceError};
use crate::stop;

/// The most runs that are asked for at once.
const PAGE: usize = 1000;

/// Lists runs, of the service if one answers, else of the folder; or does something with one.
pub(crate) fn run(args: RunsArgs, settings: &Settings) -> Result<ExitCode, Failure> {
    if let Some(RunsCommand::Compress(args)) = args.command {
        return compress::run(&args, settings);
    }
    let format = args.output;
    let runs = runtime()?.block_on(async {
        stop::on_interrupt()?;
        list(args, settings).await
    })?;
    print(&runs, format, settings.color(&io::stdout())?)?;
    Ok(ExitCode::SUCCESS)
}

async fn list(args: RunsArgs, settings: &Settings) -> Result<Vec<JobMetadata>, Failure> {
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let query = RunQuery { state: args.state, partition: args.partition, ..RunQuery::default() };
    if settings.folder_comes_first()
        && let Some(folder) = settings.folder().await?
    {
        return Ok(pages(&folder, &query, limit).await?);
    }
    let (client, chosen) = settings.client()?;
    let silence = match pages(&Source::Service(client), &query, limit).await {
        Err(error) if error.none_answers() => Failure::from(error),
        answer => return Ok(answer?),
    };
    match settings.folder().await? {
        Some(folder) => Ok(pages(&folder, &query, limit).await?),
        None if chosen => Err(silence),
        None => {
            let dir = settings.log_dir()?.value;
            Err(silence.line(format_args!("the log folder {} does not exist", dir.display())))
        }
    }
}

async fn pages(source: &Source, query: &RunQuery, limit: usize) -> Result<Vec<JobMetadata>, SourceError> {
    let mut runs = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let query = RunQuery { limit: Some((limit - runs.len()).min(PAGE)), ..query.clone() };
        let page = source.runs(&query, cursor.as_deref()).await?;
        runs.extend(page.runs);
        cursor = page.next;
        if cursor.is_none() || runs.len() >= limit {
            return Ok(runs);
        }
    }
}

fn print(runs: &[JobMetadata], format: RunsFormat, color: bool) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match format {
        RunsFormat::Json => {
            for run in runs {
                serde_json::to_writer(&mut out, run)?;
                out.write_all(b"\n")?;
            }
        }
        RunsFormat::Text if runs.is_empty() => note("no runs"),
        RunsFormat::Text => Table::new(runs, UnixMicros::now()).write(&mut out, terminal_width(), color)?,
    }
    out.flush()
}
