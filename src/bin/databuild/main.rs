//! The `databuild` executable.

mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Keeps, indexes and streams the logs of job runs
#[derive(Parser)]
struct Cli {
    /// The folder that the logs are in
    #[arg(long, env = "DATABUILD_LOG_DIR", default_value = "/var/log/databuild")]
    log_dir: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Run(run::RunArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.verb {
        Verb::Run(args) => run::run(args, &cli.log_dir),
    }
}
