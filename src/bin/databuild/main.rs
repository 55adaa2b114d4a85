//! `databuild`: runs jobs, serves their logs, and shows them.

mod args;
mod compress;
mod diagnostics;
mod failure;
mod gc;
mod index;
mod locate;
mod logs;
mod printing;
mod run;
mod runs;
mod serve;
mod settings;
mod source;
mod stop;
mod store;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use failure::{Code, Failure};
use settings::Settings;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error),
    };
    let settings = Settings::new(cli.globals);
    // What `run` shows is its command's.
    let told = match &cli.command {
        Command::Run(_) => Ok(()),
        Command::Serve(_) => diagnostics::start(&settings, "info"),
        _ => diagnostics::start(&settings, "warn"),
    };
    let done = told.and_then(|()| match cli.command {
        Command::Run(args) => match settings.recording() {
            Ok((dir, options)) => Ok(run::run(args, &dir, options)),
            Err(failure) => Err(failure.with(Code::NotRecorded)),
        },
        Command::Serve(args) => serve::run(args, &settings),
        Command::Logs(args) => logs::run(args, &settings),
        Command::Runs(args) => runs::run(args, &settings),
        Command::Gc(args) => gc::run(&args, &settings),
        Command::Index(command) => index::run(&command, &settings),
    });
    done.unwrap_or_else(Failure::report)
}

/// Says what is wrong with the arguments, or the help that was asked for. A 2 of `run` could be the job's own.
fn not_understood(error: &clap::Error) -> ExitCode {
    // Nobody is there to be told, or somebody is.
    let _ = error.print();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return ExitCode::SUCCESS;
    }
    let words = Cli::command().ignore_errors(true).try_get_matches();
    let is_run = words.is_ok_and(|words| words.subcommand_name() == Some("run"));
    ExitCode::from(if is_run { Code::NotRecorded } else { Code::Usage } as u8)
}
