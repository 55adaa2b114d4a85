//! Why a verb failed, as one line on stderr and as an exit code.

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use databuild_logs::{ClientError, ConfigError, InvalidId, LogError};

use crate::printing::note;

/// A failure: what is said and what is returned.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    message: String,
    details: Vec<String>,
    hints: Vec<String>,
}

/// The exit codes, beside 0 and those of runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// Whoever read the output has gone: nothing failed.
    Quiet = 0,
    General = 1,
    Usage = 2,
    NotFound = 3,
    /// Of `databuild index check`: whether anything is wrong is not known.
    NotChecked = 4,
    Unreachable = 5,
    /// Of `databuild run`, whose lower codes are the command's.
    NotRecorded = 125,
    Interrupted = 130,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Display) -> Self {
        Self { code, message: message.to_string(), details: Vec::new(), hints: Vec::new() }
    }

    /// An error with all its causes.
    pub(crate) fn because(code: Code, error: &(dyn Error + 'static)) -> Self {
        Self::new(code, chain(error))
    }

    /// The same with a line that says what to do.
    pub(crate) fn hint(mut self, hint: impl Display) -> Self {
        self.hints.push(hint.to_string());
        self
    }

    /// The same with a line of details.
    pub(crate) fn line(mut self, line: impl Display) -> Self {
        self.details.push(line.to_string());
        self
    }

    /// The same with another code.
    pub(crate) fn with(self, code: Code) -> Self {
        Self { code, ..self }
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Says what there is to say, and gives the code to exit with.
    pub(crate) fn report(self) -> ExitCode {
        if self.code != Code::Quiet {
            note(format_args!("databuild: {}", self.message));
            self.details.iter().for_each(|line| note(format_args!("  {line}")));
            self.hints.iter().for_each(|hint| note(format_args!("hint: {hint}")));
        }
        ExitCode::from(self.code as u8)
    }
}

/// The code of a verb that has shown what came of it: 0 if all of that is well, else 1. Whoever read it may have gone,
/// which makes no success of what is none.
///
/// # Errors
///
/// Why it could not be shown.
pub(crate) fn shown(is_well: bool, printed: io::Result<()>) -> Result<ExitCode, Failure> {
    match printed {
        Err(error) if is_well || error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ if is_well => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::FAILURE),
    }
}

/// An error and its causes in one line. A cause that the error has repeated already is left out.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text.replace(['\n', '\r'], " ")
}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        let code = match &error {
            LogError::NotFound { .. } | LogError::Evicted(_) => Code::NotFound,
            LogError::InvalidId(_) | LogError::InvalidParameter { .. } => Code::Usage,
            _ => Code::General,
        };
        Self::because(code, &error)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let failure = |code| Self::because(code, &error);
        match &error {
            ClientError::BadAddress { .. } | ClientError::BadToken | ClientError::BadParameter { .. } => {
                failure(Code::Usage)
            }
            ClientError::NotFound { .. } | ClientError::Evicted(_) => failure(Code::NotFound),
            ClientError::Unreachable { .. } => {
                failure(Code::Unreachable).hint("is the service running? `databuild serve` starts one")
            }
            ClientError::NotOurs { .. } => {
                failure(Code::Unreachable).hint("--server or DATABUILD_LOG_SERVER says where the service is")
            }
            ClientError::Unavailable { .. } => failure(Code::Unreachable),
            ClientError::Refused { .. } | ClientError::Failed { .. } => failure(Code::General),
            ClientError::Unauthorized { .. } => {
                failure(Code::General).hint("give the service's token in DATABUILD_LOG_TOKEN")
            }
            ClientError::Protocol { .. } => {
                failure(Code::General).hint("are both of the same version? `databuild --version`")
            }
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::because(Code::Usage, &error)
    }
}

impl From<InvalidId> for Failure {
    fn from(error: InvalidId) -> Self {
        Self::because(Code::Usage, &error)
    }
}

impl From<io::Error> for Failure {
    /// Of writing to stdout: whoever reads it may go at any time.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::new(Code::Quiet, ""),
            _ => Self::new(Code::General, format_args!("writing to standard output: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once_and_on_one_line() {
        let source = io::Error::other("no\nroom");
        let error = LogError::Io { doing: "creating", path: "/x".into(), source };
        assert_eq!(chain(&error), "creating /x: no room");
        let source = Box::new(io::Error::other("refused"));
        let error = ClientError::Unreachable { url: "http://x".to_owned(), source };
        assert_eq!(chain(&error), "no service answers at http://x: refused");
    }
}
