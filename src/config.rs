//! The environment and the flags, turned into what each part is opened with. Every error names the variable or the
//! flag that is to blame.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access};

use crate::retention::RetentionPolicy;
use crate::store::{Durability, FileStoreOptions};

/// The environment that settings are read from. A variable that is empty counts as not set.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<OsString, OsString>,
    system_folder: PathBuf,
}

/// Where a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This flag of the command line.
    Flag(&'static str),
    /// This variable of the environment.
    Variable(&'static str),
    /// Nobody gave one.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) | Self::Variable(name) => f.write_str(name),
            Self::Default => f.write_str("the default"),
        }
    }
}

/// A value and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

/// A setting that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text does not parse.
    #[error("{origin} is {given:?}: {expected}")]
    Invalid {
        /// The flag or variable.
        origin: Origin,
        /// What was given.
        given: String,
        /// What would be right.
        expected: String,
    },
    /// The variable's bytes are not text.
    #[error("{name} is not valid UTF-8")]
    NotText {
        /// The variable.
        name: &'static str,
    },
    /// There is no place for logs.
    #[error(
        "no folder for logs: {} can't be written, and neither XDG_STATE_HOME nor HOME is an absolute path; \
         give --log-dir or DATABUILD_LOG_DIR", system_folder.display()
    )]
    NoLogFolder {
        /// The folder of the system.
        system_folder: PathBuf,
    },
    /// The service would be open to everybody.
    #[error(
        "{origin} is {listen}, which other machines can reach: that needs a token in DATABUILD_LOG_TOKEN, \
         or an address of loopback such as 127.0.0.1:{}", listen.port()
    )]
    TokenNeeded {
        /// The flag or variable.
        origin: Origin,
        /// The address.
        listen: SocketAddr,
    },
}

impl Environment {
    /// The folder for logs of a machine's own services.
    pub const SYSTEM_FOLDER: &str = "/var/log/databuild";
    /// Where a service listens, and where its clients look for it.
    pub const DEFAULT_LISTEN: &str = "127.0.0.1:7780";

    /// The environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        std::env::vars_os().collect()
    }

    /// The text of a variable.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NotText`].
    pub fn text(&self, name: &'static str) -> Result<Option<&str>, ConfigError> {
        match self.variable(name) {
            Some(value) => value.to_str().map(Some).ok_or(ConfigError::NotText { name }),
            None => Ok(None),
        }
    }

    /// The folder that holds the logs: `--log-dir`, `DATABUILD_LOG_DIR`, else [`SYSTEM_FOLDER`](Self::SYSTEM_FOLDER)
    /// if it can be written or created, else `databuild` in the user's state folder. Nothing is created.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoLogFolder`]; [`ConfigError::Invalid`] for a flag that is empty.
    pub fn log_dir(&self, flag: Option<&Path>) -> Result<Setting<PathBuf>, ConfigError> {
        let (flag_name, variable) = ("--log-dir", "DATABUILD_LOG_DIR");
        if let Some(dir) = flag {
            let origin = Origin::Flag(flag_name);
            return match dir.as_os_str().is_empty() {
                true => Err(invalid(origin, "", "expected a folder")),
                false => Ok(Setting { value: dir.to_owned(), origin }),
            };
        }
        if let Some(dir) = self.variable(variable) {
            return Ok(Setting { value: dir.into(), origin: Origin::Variable(variable) });
        }
        let value = match can_write(&self.system_folder) {
            true => self.system_folder.clone(),
            false => self.state_folder()?,
        };
        Ok(Setting { value, origin: Origin::Default })
    }

    /// The address of the service to ask: `--server`, `DATABUILD_LOG_SERVER`, else that on this machine.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NotText`].
    pub fn server(&self, flag: Option<&str>) -> Result<Setting<String>, ConfigError> {
        let given = self.given(flag, "--server", "DATABUILD_LOG_SERVER")?;
        Ok(given.unwrap_or_else(|| Setting {
            value: format!("http://{}", Self::DEFAULT_LISTEN),
            origin: Origin::Default,
        }))
    }

    /// Where to listen: `--listen`, `DATABUILD_LOG_LISTEN`, else [`DEFAULT_LISTEN`](Self::DEFAULT_LISTEN).
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`]; [`ConfigError::TokenNeeded`] if others could reach it and there is no token.
    pub fn listen(&self, flag: Option<&str>) -> Result<Setting<SocketAddr>, ConfigError> {
        let given = self
            .given(flag, "--listen", "DATABUILD_LOG_LISTEN")?
            .unwrap_or_else(|| Setting { value: Self::DEFAULT_LISTEN.to_owned(), origin: Origin::Default });
        let address = match given.value.strip_prefix("localhost:") {
            Some(port) => format!("127.0.0.1:{port}"),
            None => given.value.clone(),
        };
        let listen: SocketAddr = address.parse().map_err(|_| {
            invalid(given.origin, &given.value, "expected an address and a port, such as 127.0.0.1:7780")
        })?;
        if !listen.ip().is_loopback() && self.token()?.is_none() {
            return Err(ConfigError::TokenNeeded { origin: given.origin, listen });
        }
        Ok(Setting { value: listen, origin: given.origin })
    }

    /// The token that a service wants and a client sends: `DATABUILD_LOG_TOKEN`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NotText`]; [`ConfigError::Invalid`], which does not repeat the token.
    pub fn token(&self) -> Result<Option<&str>, ConfigError> {
        let name = "DATABUILD_LOG_TOKEN";
        let token = self.text(name)?;
        match token {
            Some(token) if !token.bytes().all(|b| b.is_ascii_graphic()) => Err(invalid(
                Origin::Variable(name),
                "(hidden)",
                "expected visible ASCII characters, no spaces",
            )),
            token => Ok(token),
        }
    }

    /// How a store treats the disk: `DATABUILD_LOG_MIN_FREE_MB`, how many MiB logs leave free (512; 0: no such
    /// floor), `DATABUILD_LOG_MAX_RUN_SIZE_MB`, how many MB of 10⁶ bytes a run keeps at most, with fractions (0: any
    /// number), `DATABUILD_LOG_DURABILITY`, what a power cut may take: `on-finish` (the default), `none`, or a number of
    /// seconds for [`Durability::Periodic`], and `DATABUILD_LOG_COMPRESS_AFTER_HOURS`, how long after its end a run is
    /// compressed: a number of hours, or `off` (the default).
    ///
    /// # Errors
    ///
    /// [`ConfigError::NotText`] or [`ConfigError::Invalid`].
    pub fn store_options(&self) -> Result<FileStoreOptions, ConfigError> {
        let mut options = FileStoreOptions::default();
        let name = "DATABUILD_LOG_MIN_FREE_MB";
        if let Some(given) = self.text(name)? {
            let bytes = given.parse::<u64>().ok().and_then(|mib| mib.checked_mul(1024 * 1024));
            options.min_free_bytes = bytes
                .ok_or_else(|| invalid(Origin::Variable(name), given, "expected a whole number of MiB"))?;
        }
        let name = "DATABUILD_LOG_MAX_RUN_SIZE_MB";
        if let Some(given) = self.text(name)? {
            let expected = "expected a number of MB such as 100 or 0.5, or 0 for no limit";
            options.max_run_bytes =
                bytes(given, 1e6).ok_or_else(|| invalid(Origin::Variable(name), given, expected))?;
        }
        let name = "DATABUILD_LOG_DURABILITY";
        options.durability = match self.text(name)? {
            None | Some("on-finish") => Durability::OnFinish,
            Some("none") => Durability::None,
            Some(given) => match given.parse::<u32>() {
                Ok(seconds @ 1..) => Durability::Periodic(Duration::from_secs(seconds.into())),
                _ => {
                    let expected = "expected on-finish, none, or a whole number of seconds";
                    return Err(invalid(Origin::Variable(name), given, expected));
                }
            },
        };
        options.compress_after = self.compress_after()?;
        Ok(options)
    }

    fn compress_after(&self) -> Result<Option<Duration>, ConfigError> {
        let name = "DATABUILD_LOG_COMPRESS_AFTER_HOURS";
        let Some(given) = self.text(name)?.filter(|given| *given != "off") else { return Ok(None) };
        let hours = given.parse().ok().filter(|hours: &f64| hours.is_finite() && *hours >= 0.0);
        let after = hours.and_then(|hours| Duration::try_from_secs_f64(hours * 3_600.0).ok());
        let expected = "expected off, or a number of hours such as 24 or 0.5";
        let after = after.ok_or_else(|| invalid(Origin::Variable(name), given, expected))?;
        if !cfg!(feature = "compression") {
            let expected = "expected off: this program was built without the feature `compression`";
            return Err(invalid(Origin::Variable(name), given, expected));
        }
        Ok(Some(after))
    }

    /// What a service keeps: `DATABUILD_LOG_TTL_DAYS`, how many days (7), and `DATABUILD_LOG_MAX_SIZE_GB`, how many GB
    /// of 10⁹ bytes (10), both with fractions, and `DATABUILD_LOG_KEEP_LAST`, how many runs in any case (0). 0 turns a
    /// limit off.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NotText`] or [`ConfigError::Invalid`].
    pub fn retention(&self) -> Result<RetentionPolicy, ConfigError> {
        let mut policy = RetentionPolicy::OF_SERVICE;
        let days = |days: f64| Duration::try_from_secs_f64(days * 86_400.0).ok();
        let name = "DATABUILD_LOG_TTL_DAYS";
        if let Some(given) = self.text(name)? {
            let age = amount(given).and_then(days).filter(|age| u64::try_from(age.as_micros()).is_ok());
            let expected = "expected a number of days such as 7 or 0.5, or 0 for no limit";
            let age = age.ok_or_else(|| invalid(Origin::Variable(name), given, expected))?;
            policy.max_age = Some(age).filter(|age| !age.is_zero());
        }
        let name = "DATABUILD_LOG_MAX_SIZE_GB";
        if let Some(given) = self.text(name)? {
            let expected = "expected a number of GB such as 10 or 0.5, or 0 for no limit";
            let bytes = bytes(given, 1e9).ok_or_else(|| invalid(Origin::Variable(name), given, expected))?;
            policy.max_bytes = Some(bytes).filter(|&bytes| bytes > 0);
        }
        let name = "DATABUILD_LOG_KEEP_LAST";
        if let Some(given) = self.text(name)? {
            let digits = given.bytes().all(|b| b.is_ascii_digit());
            let runs = given.parse().ok().filter(|_| digits);
            let expected = "expected a whole number of runs, 0 or more";
            policy.keep_last = runs.ok_or_else(|| invalid(Origin::Variable(name), given, expected))?;
        }
        Ok(policy)
    }

    /// The flag if it is given, else the variable if it is set.
    fn given(
        &self,
        flag: Option<&str>,
        flag_name: &'static str,
        variable: &'static str,
    ) -> Result<Option<Setting<String>>, ConfigError> {
        Ok(match (flag, self.text(variable)?) {
            (Some(text), _) => Some(Setting { value: text.to_owned(), origin: Origin::Flag(flag_name) }),
            (None, Some(text)) => {
                Some(Setting { value: text.to_owned(), origin: Origin::Variable(variable) })
            }
            (None, None) => None,
        })
    }

    fn variable(&self, name: &str) -> Option<&OsString> {
        self.variables.get(OsStr::new(name)).filter(|value| !value.is_empty())
    }

    fn state_folder(&self) -> Result<PathBuf, ConfigError> {
        let absolute = |name| self.variable(name).map(Path::new).filter(|path| path.is_absolute());
        let state = match (absolute("XDG_STATE_HOME"), absolute("HOME")) {
            (Some(state), _) => state.to_owned(),
            (None, Some(home)) => home.join(".local/state"),
            (None, None) => {
                return Err(ConfigError::NoLogFolder { system_folder: self.system_folder.clone() });
            }
        };
        Ok(state.join("databuild"))
    }
}

impl<K: Into<OsString>, V: Into<OsString>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Self {
            variables: pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            system_folder: Self::SYSTEM_FOLDER.into(),
        }
    }
}

impl fmt::Debug for Environment {
    /// The variables may hold secrets: only their names are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.variables.keys()).finish()
    }
}

/// A number as people write it: digits, and a dot among them if need be.
fn amount(text: &str) -> Option<f64> {
    let is_one =
        text.bytes().any(|b| b.is_ascii_digit()) && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.parse().ok().filter(|_| is_one)
}

/// An amount of this unit in bytes.
fn bytes(text: &str, unit: f64) -> Option<u64> {
    let bytes = amount(text).map(|amount| amount * unit).filter(|&bytes| bytes < 1e19)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it was looked at just above"
    )]
    let whole = bytes as u64;
    Some(whole)
}

fn invalid(origin: Origin, given: &str, expected: &str) -> ConfigError {
    ConfigError::Invalid { origin, given: given.to_owned(), expected: expected.to_owned() }
}

/// Whether this folder can be written, or be created in the one above it.
fn can_write(dir: &Path) -> bool {
    let rights = Access::WRITE_OK | Access::EXEC_OK;
    match std::fs::metadata(dir) {
        Ok(found) => found.is_dir() && access(dir, rights).is_ok(),
        Err(error) => {
            error.kind() == std::io::ErrorKind::NotFound
                && dir.parent().is_some_and(|above| access(above, rights).is_ok())
        }
    }
}

#[cfg(test)]
mod tests;
