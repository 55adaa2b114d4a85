//! `databuild gc`: evicts runs that are over.

use std::error::Error;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::sync::Arc;

use databuild_logs::{
    Client, ClientError, FileStoreOptions, GcReport, GcRequest, LogError, LogStore, RetentionPolicy,
    UnixMicros,
};

use crate::args::{GcArgs, RunsFormat};
use crate::failure::{Code, Failure, chain, shown};
use crate::printing::{byte_count, duration, note};
use crate::settings::{Settings, runtime};
use crate::source::SourceError;
use crate::stop;
use crate::store::{blocking, open_for_service};

/// Asks the service if one answers, else does it alone in the folder.
pub(crate) fn run(args: &GcArgs, settings: &Settings) -> Result<ExitCode, Failure> {
    let request = GcRequest {
        dry_run: args.dry_run,
        older_than: args.older_than,
        max_bytes: args.max_size,
        keep_last: args.keep_last,
    };
    let report = runtime()?.block_on(async {
        stop::on_interrupt()?;
        evict(&request, settings).await
    })?;
    let printed = print(args.output, &report);
    for run in &report.kept {
        note(format_args!("databuild: run {} stays: {}", run.id, run.why));
    }
    if let Some(why) = &report.unfinished {
        note(format_args!("databuild: {why}"));
    }
    shown(report.unfinished.is_none(), printed)
}

async fn evict(request: &GcRequest, settings: &Settings) -> Result<GcReport, Failure> {
    let silence = if settings.folder_comes_first() {
        None
    } else {
        let (client, chosen) = settings.client()?;
        match of_service(&client, request).await.map_err(SourceError::from) {
            Err(error) if error.none_answers() && !chosen => Some(error),
            answer => return Ok(answer?),
        }
    };
    let dir = settings.log_dir()?.value;
    if !dir.is_dir() {
        let what = format_args!("the log folder {} does not exist", dir.display());
        return Err(match silence {
            Some(error) => Failure::from(error).line(what),
            None => Failure::new(Code::General, what),
        });
    }
    let environment = &settings.environment;
    let options = FileStoreOptions { retention: environment.retention()?, ..environment.store_options()? };
    let request = *request;
    let alone = blocking(move || {
        // The request says everything: a store with a policy of its own would keep that too, a dry run or not.
        let request = with_policy(request, options.retention);
        let store = open_for_service(&dir, FileStoreOptions { retention: RetentionPolicy::OFF, ..options })?;
        let report = of_store(&store, &request);
        let closed = store.close();
        let mut report = report?;
        match closed {
            // What is gone is told.
            Err(error) if !report.evicted.is_empty() => {
                report.unfinished.get_or_insert_with(|| error.to_string());
            }
            closed => closed?,
        }
        Ok(report)
    });
    alone.await.map_err(|error| {
        let in_use = matches!(error, LogError::InUse { .. });
        let failure = Failure::from(error);
        if in_use {
            failure.hint(
                "a service has the folder and can do it: --server or DATABUILD_LOG_SERVER says where it is",
            )
        } else {
            failure
        }
    })
}

/// The request, with the policy where it has no limits of its own.
fn with_policy(request: GcRequest, policy: RetentionPolicy) -> GcRequest {
    let policy = request.over(policy);
    GcRequest {
        older_than: policy.max_age,
        max_bytes: policy.max_bytes,
        keep_last: Some(policy.keep_last),
        ..request
    }
}

async fn of_service(client: &Client, request: &GcRequest) -> Result<GcReport, ClientError> {
    let mut all = client.gc(request).await?;
    while all.more && !all.dry_run {
        add(&mut all, client.gc(request).await);
    }
    Ok(all)
}

fn of_store(store: &Arc<dyn LogStore>, request: &GcRequest) -> Result<GcReport, LogError> {
    let mut all = store.gc(request)?;
    while all.more && !all.dry_run {
        add(&mut all, store.gc(request));
    }
    Ok(all)
}

/// Adds what another call did. When that fails, what was evicted before it is told all the same.
fn add<E: Error + 'static>(all: &mut GcReport, more: Result<GcReport, E>) {
    let more = match more {
        Ok(more) => more,
        Err(error) => {
            (all.more, all.unfinished) =
                (false, Some(format!("there may be more to evict: {}", chain(&error))));
            return;
        }
    };
    all.evicted.extend(more.evicted);
    for kept in more.kept {
        if all.kept.iter().all(|known| known.id != kept.id) {
            all.kept.push(kept);
        }
    }
    (all.more, all.bytes_after, all.unfinished) = (more.more, more.bytes_after, more.unfinished);
}

fn print(format: RunsFormat, report: &GcReport) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match format {
        RunsFormat::Json => {
            serde_json::to_writer(&mut out, report)?;
            out.write_all(b"\n")?;
        }
        RunsFormat::Text => print_text(&mut out, report)?,
    }
    out.flush()
}

fn print_text(out: &mut impl Write, report: &GcReport) -> io::Result<()> {
    let now = UnixMicros::now();
    let widest = report.evicted.iter().map(|run| run.id.as_str().len()).max().unwrap_or(0);
    for run in &report.evicted {
        let age = duration(now.millis_since(run.ended_at));
        writeln!(out, "{:widest$}  {:>7}  ended {age} ago  {}", run.id, byte_count(run.bytes), run.why)?;
    }
    let count = report.evicted.len();
    let runs = if count == 1 { "1 run".to_owned() } else { format!("{count} runs") };
    let (done, at_least) = match (report.dry_run, report.more) {
        (true, true) => ("would be evicted", "at least "),
        (true, false) => ("would be evicted", ""),
        (false, _) => ("evicted", ""),
    };
    let (freed, left) = (byte_count(report.bytes()), byte_count(report.bytes_after));
    writeln!(out, "{at_least}{runs} {done}, {freed}; {left} stay")
}
