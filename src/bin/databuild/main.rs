//! `databuild`: runs jobs, serves their logs, and shows them.

mod args;
mod compress;
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

use clap::Parser;

use args::{Cli, Command};
use failure::{Code, Failure};
use settings::Settings;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let settings = Settings::new(cli.globals);
    let done = match cli.command {
        Command::Run(args) => match settings.recording() {
            Ok((dir, options)) => Ok(run::run(args, &dir, options)),
            Err(failure) => Err(failure.with(Code::NotRecorded)),
        },
        Command::Serve(args) => serve::run(args, &settings),
        Command::Logs(args) => logs::run(args, &settings),
        Command::Runs(args) => runs::run(args, &settings),
        Command::Gc(args) => gc::run(&args, &settings),
        Command::Index(command) => index::run(&command, &settings),
    };
    done.unwrap_or_else(Failure::report)
}
