//! What is to be executed, and the process that comes of it.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::Access;
use rustix::io::Errno;

use crate::run::RunSpec;
use crate::runner::{RunnerError, Tee};

/// A job: the run that it is recorded as, and what to execute.
#[derive(Debug)]
pub struct JobCommand {
    /// The run. Its [`command`](RunSpec::command) is what is recorded, not what is executed.
    pub spec: RunSpec,
    /// The command: a name that is looked up in `PATH`, or a path. A relative path is one from `cwd`.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// The folder to run it in; `None` for the present one.
    pub cwd: Option<PathBuf>,
    /// Variables that its environment has beside those of this process.
    pub env: Vec<(OsString, OsString)>,
    /// What it reads from.
    pub input: JobInput,
    /// Where its output is copied to beside the log.
    pub tee: Option<Tee>,
}

/// What a job's standard input is.
///
/// A job runs in a process group of its own, so that all of it can be signalled. To a terminal that is a
/// background group, and reading would stop it (`SIGTTIN`): a job never gets the terminal as its input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobInput {
    /// Nothing: `/dev/null`.
    #[default]
    Empty,
    /// This process's own standard input. Only for one that is no terminal.
    Inherit,
}

impl JobCommand {
    /// Executes `command`, its first word with the others as arguments, recorded as `spec`.
    #[must_use]
    pub fn new<S: Into<OsString>>(spec: RunSpec, command: impl IntoIterator<Item = S>) -> Self {
        let mut words = command.into_iter().map(Into::into);
        let program = words.next().unwrap_or_default();
        let args: Vec<OsString> = words.collect();
        let all = std::iter::once(&program).chain(&args);
        let recorded: Vec<_> = all.map(|word| word.to_string_lossy().into_owned()).collect();
        Self {
            spec: spec.command(recorded),
            program,
            args,
            cwd: None,
            env: Vec::new(),
            input: JobInput::default(),
            tee: None,
        }
    }

    /// Starts the process, in a group of its own, with pipes for its output.
    pub(super) fn spawn(&self) -> Result<Child, RunnerError> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(match self.input {
            JobInput::Empty => Stdio::null(),
            JobInput::Inherit => Stdio::inherit(),
        });
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        if let Some(cwd) = &self.cwd {
            command.current_dir(cwd);
        }
        command.spawn().map_err(|source| self.meaning_of(source))
    }

    /// What a failed `spawn` means. The system gives the same codes for the command and for the folder.
    fn meaning_of(&self, source: io::Error) -> RunnerError {
        if let Some((path, source)) = self.cwd.as_deref().and_then(|cwd| Some((cwd, cannot_enter(cwd)?))) {
            return RunnerError::WorkingFolder { path: path.to_owned(), source };
        }
        let program = self.program.to_string_lossy().into_owned();
        match Errno::from_io_error(&source) {
            Some(Errno::NOENT) => RunnerError::NotFound { program },
            Some(
                Errno::ACCESS
                | Errno::PERM
                | Errno::NOEXEC
                | Errno::ISDIR
                | Errno::NOTDIR
                | Errno::TXTBSY
                | Errno::TOOBIG
                | Errno::LIBBAD
                | Errno::LOOP
                | Errno::NAMETOOLONG,
            ) => RunnerError::NotExecutable { program, source },
            _ => RunnerError::Other { doing: "starting the command", source },
        }
    }
}

fn cannot_enter(folder: &Path) -> Option<io::Error> {
    let entered = rustix::fs::access(folder.join("."), Access::EXEC_OK);
    entered.err().map(io::Error::from)
}
