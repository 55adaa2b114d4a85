//! Where everything is on disk. No other file knows a file's name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, FallocateFlags, FlockOperation, OFlags, RenameFlags, fallocate, flock, renameat_with};
use rustix::io::Errno;

use crate::error::LogError;
use crate::line::Stream;
use crate::run::{JobMetadata, JobRunId};

const JOB_RUNS: &str = "job_runs";
const JOURNAL: &str = "journal";
const METADATA: &str = "metadata.json";

/// The most bytes of a `metadata.json` that are read.
const MAX_METADATA: u64 = 16 * 1024 * 1024;
/// A folder in which a run is prepared has its journal locked long before it is this old.
const ABANDONED: Duration = Duration::from_secs(60);

/// A log folder.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    job_runs: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), job_runs: root.join(JOB_RUNS) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder that holds a folder for every run.
    pub(crate) fn job_runs(&self) -> &Path {
        &self.job_runs
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.root.join("index.redb")
    }

    pub(crate) fn run(&self, id: &JobRunId) -> RunFolder {
        RunFolder { path: self.job_runs.join(id.as_str()) }
    }

    /// Makes the folders that are not there yet.
    pub(crate) fn create(&self) -> Result<(), LogError> {
        fs::create_dir_all(&self.job_runs).map_err(LogError::io("creating", &self.job_runs))
    }

    /// A folder in which a run is prepared before it appears under its id. No run id starts with a dot.
    pub(crate) fn prepare_run(&self, id: &JobRunId) -> Result<RunFolder, LogError> {
        static PREPARED: AtomicU64 = AtomicU64::new(0);
        let count = PREPARED.fetch_add(1, Ordering::Relaxed);
        let name = format!(".{id}.{}-{count}.new", std::process::id());
        let path = self.job_runs.join(name);
        fs::create_dir(&path).map_err(LogError::io("creating", &path))?;
        Ok(RunFolder { path })
    }

    /// Lets a prepared run appear under its id, all at once.
    pub(crate) fn publish_run(&self, prepared: &RunFolder, id: &JobRunId) -> Result<RunFolder, LogError> {
        let run = self.run(id);
        match renameat_with(CWD, &prepared.path, CWD, &run.path, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(run),
            Err(errno) if errno == rustix::io::Errno::EXIST => {
                Err(LogError::AlreadyExists { id: id.clone() })
            }
            Err(errno) => Err(LogError::io("creating", run.path)(errno.into())),
        }
    }

    /// The ids of all run folders, in no order.
    pub(crate) fn list_runs(&self) -> Result<Vec<JobRunId>, LogError> {
        let entries = match fs::read_dir(&self.job_runs) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(LogError::io("listing", &self.job_runs)(error)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(LogError::io("listing", &self.job_runs))?;
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if let Some(id) =
                entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|_| is_folder)
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Removes folders of runs that were prepared and never appeared: whoever prepared them is gone, for their
    /// journals are not locked, and they are older than the moment that passes before one is.
    pub(crate) fn remove_abandoned(&self) {
        let entries = fs::read_dir(&self.job_runs).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let is_prepared =
                name.to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(".new"));
            let is_old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok().map(|age| age > ABANDONED);
            if is_prepared && is_old() == Some(true) {
                let folder = RunFolder { path: entry.path() };
                let is_locked = File::open(folder.journal()).is_ok_and(|journal| {
                    flock(&journal, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
                });
                if !is_locked {
                    folder.discard();
                }
            }
        }
    }

    /// The run that a path is in, or is the folder of.
    pub(crate) fn run_of(&self, path: &Path) -> Option<JobRunId> {
        path.strip_prefix(&self.job_runs).ok()?.components().next()?.as_os_str().to_str()?.parse().ok()
    }
}

/// The folder of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the folder is there. A link to one is not: it could lead out of the log folder.
    pub(crate) fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|entry| entry.is_dir())
    }

    pub(crate) fn log(&self, stream: Stream) -> PathBuf {
        self.path.join(match stream {
            Stream::Stdout => "stdout.log",
            Stream::Stderr => "stderr.log",
        })
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join(JOURNAL)
    }

    pub(crate) fn metadata(&self) -> PathBuf {
        self.path.join(METADATA)
    }

    /// Reads `metadata.json`; `None` if there is none.
    pub(crate) fn read_metadata(&self) -> Result<Option<JobMetadata>, LogError> {
        let path = self.metadata();
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            open_regular(&path)?.take(MAX_METADATA).read_to_end(&mut text)?;
            Ok(text)
        };
        match read() {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| LogError::Corrupt { path, what: error.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LogError::io("reading", path)(error)),
        }
    }

    /// Where `metadata.json` is written before it gets its name. While the run goes on it is empty, and its blocks are
    /// kept for the end.
    fn new_metadata(&self) -> PathBuf {
        self.path.join(".metadata.json.new")
    }

    /// Keeps room on the disk for a `metadata.json` of so many bytes, so that it can be written when the disk is full.
    ///
    /// # Errors
    ///
    /// [`LogError::Io`] if there is no such room now.
    pub(crate) fn reserve_metadata(&self, bytes: u64) -> Result<(), LogError> {
        let path = self.new_metadata();
        let reserve = || allocate(&File::create(&path)?, bytes);
        reserve().map(drop).map_err(LogError::io("making room for", &path))
    }

    /// Writes `metadata.json` so that it is either there whole or not at all; with `sync`, even after a power cut.
    /// One process at a time does that: the writer, or the service when there is none.
    pub(crate) fn write_metadata(&self, run: &JobMetadata, sync: bool) -> Result<(), LogError> {
        let (path, new) = (self.metadata(), self.new_metadata());
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(run)?;
            text.push(b'\n');
            // Not emptied first: that would give away what was reserved.
            let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&new)?;
            file.write_all(&text)?;
            file.set_len(text.len() as u64)?;
            if sync {
                file.sync_all()?;
            }
            fs::rename(&new, &path)?;
            if sync {
                File::open(&self.path)?.sync_all()?;
                // The folder's own name is as new as it is.
                if let Some(job_runs) = self.path.parent() {
                    File::open(job_runs)?.sync_all()?;
                }
            }
            Ok(())
        };
        write().map_err(|error| {
            // Whether it could be removed makes no difference: a name with a dot is nobody's.
            let _ = fs::remove_file(&new);
            LogError::io("writing", &path)(error)
        })
    }

    /// Removes a folder that was prepared and is not needed.
    pub(crate) fn discard(&self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a run folder that was only prepared stays behind");
        }
    }
}

/// Asks for blocks of the disk for a file up to `end`, without changing its length. What is written there later finds
/// room on a disk that is full by then. Gives false on a file system that can't do that.
///
/// # Errors
///
/// What the system says; [`io::ErrorKind::StorageFull`] above all.
pub(crate) fn allocate(file: &File, end: u64) -> io::Result<bool> {
    loop {
        match fallocate(file, FallocateFlags::KEEP_SIZE, 0, end) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Opens a file for reading that is a file itself: a link could lead out of the log folder, and whoever opens a pipe
/// would wait for its writer.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}
