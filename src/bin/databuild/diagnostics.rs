//! What the store and the service tell of themselves, on standard error.

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::failure::{Code, Failure};
use crate::settings::Settings;

const NAME: &str = "DATABUILD_LOG_LEVEL";

/// Shows what is at least as grave as `usual`, or what the environment asks for.
pub(crate) fn start(settings: &Settings, usual: &str) -> Result<(), Failure> {
    let given = settings.environment.text(NAME)?;
    let filter = filter(given.unwrap_or(usual))?;
    let color = settings.color(&io::stderr())?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(color).with_writer(io::stderr);
    lines.init();
    Ok(())
}

/// A word that is no level would be taken for the name of a part of the program, and silence all others.
fn filter(given: &str) -> Result<EnvFilter, Failure> {
    let refused = |why: &dyn std::fmt::Display| {
        let levels = "error, warn, info, debug, trace or off, or a filter such as databuild_logs=debug";
        Failure::new(Code::Usage, format_args!("{NAME} is {given:?}: expected {levels} ({why})"))
    };
    for part in given.split(',').map(str::trim) {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            return Err(refused(&format_args!("{part:?} has no level")));
        }
    }
    EnvFilter::builder().parse(given).map_err(|error| refused(&error))
}
