//! The global flags and the environment, asked for when a verb needs them.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use databuild_logs::{Client, ClientError, Environment, FileStoreOptions, Origin, Setting};

use crate::args::{ColorWhen, Globals};
use crate::failure::{Code, Failure};
use crate::source::Source;
use crate::store;

/// What holds for every verb.
#[derive(Debug)]
pub(crate) struct Settings {
    globals: Globals,
    pub(crate) environment: Environment,
}

impl Settings {
    pub(crate) fn new(globals: Globals) -> Self {
        Self { globals, environment: Environment::of_process() }
    }

    /// The folder that holds the logs.
    pub(crate) fn log_dir(&self) -> Result<Setting<PathBuf>, Failure> {
        Ok(self.environment.log_dir(self.globals.log_dir.as_deref())?)
    }

    /// The folder in which a run is recorded, and how its disk is treated.
    pub(crate) fn recording(&self) -> Result<(PathBuf, FileStoreOptions), Failure> {
        Ok((self.log_dir()?.value, self.environment.store_options()?))
    }

    /// Whether the folder was given by hand, and no service was: then it comes first.
    pub(crate) fn folder_comes_first(&self) -> bool {
        let by_hand = matches!(self.log_dir(), Ok(Setting { origin: Origin::Flag(_), .. }));
        by_hand && matches!(self.client(), Ok((_, false)))
    }

    /// A client of the service, and whether somebody said where that is.
    pub(crate) fn client(&self) -> Result<(Client, bool), Failure> {
        let server = self.environment.server(self.globals.server.as_deref())?;
        let client = Client::new(&server.value, self.environment.token()?);
        match client {
            Ok(client) => Ok((client, server.origin != Origin::Default)),
            Err(ClientError::BadAddress { given, reason }) => {
                Err(Failure::new(Code::Usage, format_args!("{} is {given:?}: {reason}", server.origin)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The folder that was given by hand, if one was.
    pub(crate) async fn given_folder(&self) -> Result<Option<Source>, Failure> {
        if self.globals.log_dir.is_some() { self.folder().await } else { Ok(None) }
    }

    /// The folder as a source of logs; `None` if there is no such folder. One that was given by hand has to be there.
    pub(crate) async fn folder(&self) -> Result<Option<Source>, Failure> {
        let dir = self.log_dir()?;
        match std::fs::metadata(&dir.value) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                let what = format_args!("{} is {}: it is not a folder", dir.origin, dir.value.display());
                return Err(Failure::new(Code::General, what));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !matches!(dir.origin, Origin::Flag(_)) {
                    return Ok(None);
                }
                let what = format_args!("{} is {}: there is no such folder", dir.origin, dir.value.display());
                return Err(Failure::new(Code::General, what));
            }
            Err(error) => {
                let what = format_args!("reading the log folder {}: {error}", dir.value.display());
                return Err(Failure::new(Code::General, what));
            }
        }
        let path = dir.value.clone();
        let options = self.environment.store_options()?;
        let store = store::blocking(move || store::open_folder(&path, options)).await?;
        Ok(Some(Source::Folder { store, dir: dir.value }))
    }

    /// Whether to colour what goes to this output.
    pub(crate) fn color(&self, output: &impl IsTerminal) -> Result<bool, Failure> {
        Ok(match self.globals.color {
            ColorWhen::Always => true,
            ColorWhen::Never => false,
            ColorWhen::Auto => {
                output.is_terminal()
                    && self.environment.text("NO_COLOR")?.is_none()
                    && self.environment.text("TERM")? != Some("dumb")
            }
        })
    }
}

/// The runtime of a verb: this thread, which may wait for the reader of its output, and one for the network.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::General, format_args!("starting: {error}")))
}
