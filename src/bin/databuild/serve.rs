//! `databuild serve`: serves the logs in a folder over HTTP.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use databuild_logs::{FileStoreOptions, LogError, ServerOptions, listen, record_metrics, serve, stop_signal};
use tokio::net::TcpListener;

use crate::args::ServeArgs;
use crate::failure::{Code, Failure};
use crate::printing::note;
use crate::settings::{Settings, runtime};
use crate::store::{blocking, open_for_service, survive_file_size_limit};

/// Serves until TERM or Ctrl-C.
pub(crate) fn run(args: ServeArgs, settings: &Settings) -> Result<ExitCode, Failure> {
    let request = Request::check(&args, settings)?;
    runtime()?.block_on(request.serve())?;
    Ok(ExitCode::SUCCESS)
}

/// What is asked for, checked.
struct Request {
    address: SocketAddr,
    dir: PathBuf,
    store_options: FileStoreOptions,
    options: ServerOptions,
}

impl Request {
    fn check(args: &ServeArgs, settings: &Settings) -> Result<Self, Failure> {
        let environment = &settings.environment;
        let token = environment.token()?.map(str::to_owned);
        Ok(Self {
            address: environment.listen(args.listen.as_deref())?.value,
            dir: settings.log_dir()?.value,
            store_options: FileStoreOptions {
                retention: environment.retention()?,
                ..environment.store_options()?
            },
            options: ServerOptions { token, ..ServerOptions::default() },
        })
    }

    async fn serve(self) -> Result<(), Failure> {
        let cannot_catch =
            |error| Failure::new(Code::General, format_args!("listening for signals: {error}"));
        let stop = stop_signal().map_err(cannot_catch)?;
        survive_file_size_limit().map_err(cannot_catch)?;
        record_metrics();
        let listener = bind(self.address)?;
        let dir = self.dir.clone();
        let options = self.store_options.clone();
        let store = blocking(move || open_for_service(&dir, options))
            .await
            .map_err(|error| cannot_open(&self.dir, error))?;
        let address = listener.local_addr().unwrap_or(self.address);
        note(format_args!("listening on http://{address}, logs in {}", self.dir.display()));
        serve(listener, store, self.options, stop)
            .await
            .map_err(|error| Failure::new(Code::General, format_args!("serving on {address}: {error}")))
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    listen(address).map_err(|error| {
        let failure = Failure::new(Code::General, format_args!("cannot listen on {address}: {error}"));
        match error.kind() {
            io::ErrorKind::AddrInUse => failure.hint(
                "another service may be running there already, which `databuild runs` would ask; \
                 --listen takes another address",
            ),
            io::ErrorKind::PermissionDenied => {
                failure.hint("--listen takes an address with a port above 1023")
            }
            io::ErrorKind::AddrNotAvailable => failure.hint("--listen takes an address of this machine"),
            _ => failure,
        }
    })
}

fn cannot_open(dir: &Path, error: LogError) -> Failure {
    let in_use = matches!(error, LogError::InUse { .. });
    let failure = Failure::because(Code::General, &error);
    if in_use {
        failure.hint("one service holds a log folder: stop the other, or give --log-dir another folder")
    } else {
        failure.line(format_args!("the log folder is {}: --log-dir takes another", dir.display()))
    }
}
