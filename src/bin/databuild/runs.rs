//! `databuild runs`: lists runs, newest first.

use std::collections::HashSet;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use databuild_logs::{JobMetadata, JobRunId, RunQuery, UnixMicros};

use crate::args::{ListArgs, RunsArgs, RunsCommand, RunsFormat};
use crate::compress;
use crate::failure::Failure;
use crate::locate::{Located, RunName, locate};
use crate::printing::{Table, note, status, terminal_width};
use crate::settings::{Settings, runtime};
use crate::source::{Source, SourceError};
use crate::stop;

/// The most runs that are asked for at once.
const PAGE: usize = 1000;

/// Lists runs, of the service if one answers, else of the folder; or does something with one.
pub(crate) fn run(args: RunsArgs, settings: &Settings) -> Result<ExitCode, Failure> {
    match args.command {
        None => {}
        Some(RunsCommand::Pin(pin)) => return set_pinned(&pin.run, true, settings),
        Some(RunsCommand::Unpin(pin)) => return set_pinned(&pin.run, false, settings),
        Some(RunsCommand::Compress(args)) => return compress::run(&args, settings),
    }
    let format = args.list.output;
    let runs = runtime()?.block_on(async {
        stop::on_interrupt()?;
        list(args.list, settings).await
    })?;
    print(&runs, format, settings.color(&io::stdout())?)?;
    Ok(ExitCode::SUCCESS)
}

fn set_pinned(run: &str, pinned: bool, settings: &Settings) -> Result<ExitCode, Failure> {
    let name = RunName::parse(run)?;
    let id = runtime()?.block_on(async {
        stop::on_interrupt()?;
        let Located { source, id, .. } = locate(settings, &name, false).await?;
        source.set_pinned(&id, pinned).await?;
        Ok::<_, Failure>(id)
    })?;
    let done = if pinned { "pinned" } else { "not pinned any more" };
    note(format_args!("run {id} is {done}"));
    Ok(ExitCode::SUCCESS)
}

/// Runs, newest first, which of them are pinned, and whether there are more behind the limit.
struct Listed {
    runs: Vec<JobMetadata>,
    pinned: HashSet<JobRunId>,
    more: bool,
}

async fn list(args: ListArgs, settings: &Settings) -> Result<Listed, Failure> {
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let query = RunQuery { state: args.state, partition: args.partition, ..RunQuery::default() };
    if let Some(folder) = settings.given_folder().await?
        && settings.folder_comes_first()
    {
        return Ok(pages(&folder, &query, limit).await?);
    }
    let (client, chosen) = settings.client()?;
    let service = Source::Service(client);
    let silence = match pages(&service, &query, limit).await {
        Err(error) if error.none_answers() => Failure::from(error),
        answer => return Ok(answer?),
    };
    match settings.folder().await? {
        Some(folder) => {
            if chosen {
                note(format_args!("{service} can't answer: listing {folder}"));
            }
            Ok(pages(&folder, &query, limit).await?)
        }
        None => {
            let dir = settings.log_dir()?.value;
            Err(silence.line(format_args!("the log folder {} does not exist", dir.display())))
        }
    }
}

async fn pages(source: &Source, query: &RunQuery, limit: usize) -> Result<Listed, SourceError> {
    let (mut runs, mut pinned) = (Vec::new(), HashSet::new());
    let mut cursor: Option<String> = None;
    loop {
        let query = RunQuery { limit: Some((limit - runs.len()).min(PAGE)), ..query.clone() };
        let page = source.runs(&query, cursor.as_deref()).await?;
        runs.extend(page.runs);
        pinned.extend(page.pinned);
        cursor = page.next;
        if cursor.is_none() || runs.len() >= limit {
            return Ok(Listed { runs, pinned, more: cursor.is_some() });
        }
    }
}

fn print(Listed { runs, pinned, more }: &Listed, format: RunsFormat, color: bool) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match format {
        RunsFormat::Json => {
            for run in runs {
                let mut object = serde_json::to_value(run)?;
                if pinned.contains(run.id()) {
                    object["pinned"] = true.into();
                }
                serde_json::to_writer(&mut out, &object)?;
                out.write_all(b"\n")?;
            }
        }
        RunsFormat::Text if runs.is_empty() => note("no runs"),
        RunsFormat::Text => {
            Table::new(runs, pinned, UnixMicros::now()).write(&mut out, terminal_width(), color)?
        }
    }
    out.flush()?;
    if *more {
        status(format_args!("the newest {} are shown; older runs: --limit N", runs.len()));
    }
    Ok(())
}
