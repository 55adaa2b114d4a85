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
mod tests {
    use super::*;

    fn environment<const N: usize>(pairs: [(&str, &str); N]) -> Environment {
        Environment { system_folder: "/nonexistent/databuild".into(), ..pairs.into_iter().collect() }
    }

    #[test]
    fn the_flag_beats_the_variable_and_the_variable_the_default() {
        let env = environment([("DATABUILD_LOG_DIR", "/from/env"), ("HOME", "/home/x")]);
        let flag = env.log_dir(Some(Path::new("/from/flag"))).unwrap();
        assert_eq!((flag.value, flag.origin), ("/from/flag".into(), Origin::Flag("--log-dir")));
        let variable = env.log_dir(None).unwrap();
        assert_eq!(
            (variable.value, variable.origin),
            ("/from/env".into(), Origin::Variable("DATABUILD_LOG_DIR"))
        );
        assert!(env.log_dir(Some(Path::new(""))).is_err());
        let env = environment([("DATABUILD_LOG_SERVER", "http://a")]);
        assert_eq!(env.server(Some("http://b")).unwrap().value, "http://b");
        assert_eq!(env.server(None).unwrap().value, "http://a");
        assert_eq!(environment([]).server(None).unwrap().value, "http://127.0.0.1:7780");
    }

    #[test]
    fn without_the_systems_folder_logs_go_to_the_users_state() {
        let dir = |env: Environment| env.log_dir(None).map(|dir| dir.value);
        let both = [("XDG_STATE_HOME", "/state"), ("HOME", "/home/x")];
        assert_eq!(dir(environment(both)).unwrap(), Path::new("/state/databuild"));
        let relative = [("XDG_STATE_HOME", "state"), ("HOME", "/home/x")];
        assert_eq!(dir(environment(relative)).unwrap(), Path::new("/home/x/.local/state/databuild"));
        let empty = [("DATABUILD_LOG_DIR", ""), ("HOME", "/home/x")];
        assert_eq!(dir(environment(empty)).unwrap(), Path::new("/home/x/.local/state/databuild"));
        assert!(matches!(dir(environment([])), Err(ConfigError::NoLogFolder { .. })));
    }

    #[test]
    fn the_systems_folder_is_taken_when_it_can_be_written_or_created() {
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("databuild");
        let env = Environment { system_folder: folder.clone(), ..environment([("HOME", "/home/x")]) };
        assert_eq!(env.log_dir(None).unwrap().value, folder);
        assert!(!folder.exists(), "asking creates nothing");
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(env.log_dir(None).unwrap().value, folder);
        std::fs::remove_dir(&folder).unwrap();
        std::fs::write(&folder, "a file").unwrap();
        assert_eq!(env.log_dir(None).unwrap().value, Path::new("/home/x/.local/state/databuild"));
    }

    #[test]
    fn errors_name_the_flag_or_the_variable() {
        let env = environment([("DATABUILD_LOG_LISTEN", "7780")]);
        let error = env.listen(None).unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_LISTEN is \"7780\": expected"), "{error}");
        let error = env.listen(Some("nowhere")).unwrap_err().to_string();
        assert!(error.starts_with("--listen is \"nowhere\": expected"), "{error}");
        let error = environment([("DATABUILD_LOG_TOKEN", "top secret")]).token().unwrap_err().to_string();
        assert!(error.contains("DATABUILD_LOG_TOKEN") && !error.contains("secret\""), "{error}");
    }

    #[test]
    fn how_the_disk_is_treated_is_set_by_two_variables() {
        let options = |floor, durability| {
            let pairs = [("DATABUILD_LOG_MIN_FREE_MB", floor), ("DATABUILD_LOG_DURABILITY", durability)];
            environment(pairs).store_options()
        };
        assert_eq!(options("", "").unwrap(), FileStoreOptions::default());
        let set = options("3", "5").unwrap();
        assert_eq!(set.min_free_bytes, 3 * 1024 * 1024);
        assert_eq!(set.durability, Durability::Periodic(Duration::from_secs(5)));
        let off = options("0", "none").unwrap();
        assert_eq!((off.min_free_bytes, off.durability), (0, Durability::None));
        assert_eq!(options("", "on-finish").unwrap().durability, Durability::OnFinish);
        for bad in ["-1", "1.5", "much", "99999999999999999"] {
            let error = options(bad, "").unwrap_err().to_string();
            assert!(error.starts_with("DATABUILD_LOG_MIN_FREE_MB is"), "{error}");
        }
        for bad in ["0", "-1", "0.5", "always"] {
            let error = options("", bad).unwrap_err().to_string();
            assert!(error.starts_with("DATABUILD_LOG_DURABILITY is"), "{error}");
        }
    }

    #[test]
    fn the_most_that_a_run_keeps_takes_fractions_and_nonsense_is_refused_by_name() {
        let name = "DATABUILD_LOG_MAX_RUN_SIZE_MB";
        let most = |given| environment([(name, given)]).store_options().map(|options| options.max_run_bytes);
        let good = [("", 0), ("0", 0), ("100", 100_000_000), ("0.5", 500_000), (".25", 250_000)];
        for (given, bytes) in good {
            assert_eq!(most(given).unwrap(), bytes, "{given:?}");
        }
        for bad in ["-1", "+1", "1e3", "10MB", "nan", "inf", ".", "1.2.3", "99999999999999999999"] {
            let error = most(bad).unwrap_err().to_string();
            assert!(
                error.starts_with("DATABUILD_LOG_MAX_RUN_SIZE_MB is") && error.contains(" MB"),
                "{error}"
            );
        }
    }

    #[test]
    #[cfg(feature = "compression")]
    fn hours_until_a_run_is_compressed_are_a_number_or_off() {
        let after = |given| {
            let options = environment([("DATABUILD_LOG_COMPRESS_AFTER_HOURS", given)]).store_options();
            options.map(|options| options.compress_after)
        };
        for (given, seconds) in [("24", Some(86_400)), ("0.5", Some(1_800)), ("0", Some(0)), ("off", None)] {
            assert_eq!(after(given).unwrap(), seconds.map(Duration::from_secs), "{given}");
        }
        assert_eq!(after("").unwrap(), None);
        for bad in ["-1", "never", "24h", "NaN", "inf", "1e300", "on"] {
            let error = after(bad).unwrap_err().to_string();
            assert!(error.starts_with("DATABUILD_LOG_COMPRESS_AFTER_HOURS is"), "{error}");
            assert!(error.contains("off, or a number of hours"), "{error}");
        }
    }

    #[test]
    fn what_is_kept_is_set_by_three_variables_and_nonsense_is_refused_by_name() {
        let policy = |days, gb, runs| {
            let names = ["DATABUILD_LOG_TTL_DAYS", "DATABUILD_LOG_MAX_SIZE_GB", "DATABUILD_LOG_KEEP_LAST"];
            environment([(names[0], days), (names[1], gb), (names[2], runs)]).retention()
        };
        assert_eq!(policy("", "", "").unwrap(), RetentionPolicy::OF_SERVICE);
        assert_eq!(policy("0", "0", "0").unwrap(), RetentionPolicy::OFF);
        let some = policy("0.5", "2.25", "30").unwrap();
        assert_eq!(some.max_age, Some(Duration::from_secs(12 * 3600)));
        assert_eq!((some.max_bytes, some.keep_last), (Some(2_250_000_000), 30));
        for bad in ["-1", "+1", "a week", "7d", "1e3", "nan", "inf", ".", "99999999999999999999"] {
            let error = policy(bad, "", "").unwrap_err().to_string();
            assert!(error.starts_with("DATABUILD_LOG_TTL_DAYS is") && error.contains("days"), "{error}");
            let error = policy("", bad, "").unwrap_err().to_string();
            assert!(error.starts_with("DATABUILD_LOG_MAX_SIZE_GB is") && error.contains("GB"), "{error}");
        }
        for bad in ["-1", "+1", "1.5", "all", "99999999999999999999"] {
            let error = policy("", "", bad).unwrap_err().to_string();
            assert!(error.starts_with("DATABUILD_LOG_KEEP_LAST is"), "{error}");
        }
    }

    #[test]
    fn an_address_that_others_reach_needs_a_token() {
        let open = environment([]);
        for safe in ["127.0.0.1:1", "[::1]:1", "localhost:1", "127.8.8.8:0"] {
            assert!(open.listen(Some(safe)).is_ok(), "{safe}");
        }
        for reachable in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
            assert!(
                matches!(open.listen(Some(reachable)), Err(ConfigError::TokenNeeded { .. })),
                "{reachable}"
            );
            assert!(
                environment([("DATABUILD_LOG_TOKEN", "x")]).listen(Some(reachable)).is_ok(),
                "{reachable}"
            );
        }
        let error = open.listen(Some("0.0.0.0:99")).unwrap_err().to_string();
        assert!(error.contains("DATABUILD_LOG_TOKEN") && error.contains("127.0.0.1:99"), "{error}");
    }
}
