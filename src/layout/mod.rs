//! Where everything is on disk. No file but those here knows a file's name.

mod disk;
mod home;
mod run_folder;
mod told;

use std::fs;
use std::io;
use std::path::{self, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::LogError;
use crate::line::UnixMicros;
use crate::run::JobRunId;
use run_folder::blocks_of;

pub(crate) use disk::{
    Disk, FileId, Locked, StoreLock, allocate, chooses_blocks_late, file_at, file_id, open_regular,
    punch_hole,
};
pub(crate) use home::Home;
#[cfg(feature = "compression")]
pub(crate) use run_folder::being_compressed;
pub(crate) use run_folder::{FolderStamp, Removal, RunFolder, aside, compressed, is_absent, metadata_of};
pub(crate) use told::is_news;

const JOB_RUNS: &str = "job_runs";
const TRASH: &str = "trash";

/// A log folder.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    job_runs: PathBuf,
    trash: PathBuf,
}

impl Layout {
    /// A relative path is below the working directory, wherever that is later: what is told of a folder that is watched
    /// has absolute paths.
    pub(crate) fn new(root: &Path) -> Self {
        let root = path::absolute(root).unwrap_or_else(|_| root.to_owned());
        Self { job_runs: root.join(JOB_RUNS), trash: root.join(TRASH), root }
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

    /// An index that is being made, until it takes the place of the other.
    pub(crate) fn new_index(&self) -> PathBuf {
        self.root.join("index.redb.new")
    }

    pub(crate) fn run(&self, id: &JobRunId) -> RunFolder {
        RunFolder::at(self.job_runs.join(id.as_str()))
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
        Ok(RunFolder::at(path))
    }

    /// Lets a prepared run appear under its id, all at once.
    pub(crate) fn publish_run(&self, prepared: &RunFolder, id: &JobRunId) -> Result<RunFolder, LogError> {
        let run = self.run(id);
        match renameat_with(CWD, prepared.path(), CWD, run.path(), RenameFlags::NOREPLACE) {
            Ok(()) => Ok(run),
            Err(errno) if errno == rustix::io::Errno::EXIST => {
                Err(LogError::AlreadyExists { id: id.clone() })
            }
            Err(errno) => Err(LogError::io("creating", run.path())(errno.into())),
        }
    }

    /// The ids of all run folders, in no order.
    pub(crate) fn list_runs(&self) -> Result<Vec<JobRunId>, LogError> {
        Ok(self.list()?.runs)
    }

    /// What there is beside each other in the folder of runs.
    pub(crate) fn list(&self) -> Result<Listing, LogError> {
        let mut listing = Listing::default();
        let entries = match fs::read_dir(&self.job_runs) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
            Err(error) => return Err(LogError::io("listing", &self.job_runs)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(LogError::io("listing", &self.job_runs))?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|_| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            else {
                continue;
            };
            if let Ok(id) = name.parse() {
                listing.runs.push(id);
            } else if name.starts_with('.') && name.ends_with(".new") {
                listing.prepared.push(RunFolder::at(entry.path()));
            }
        }
        Ok(listing)
    }

    /// Moves a run's folder to where it is removed, under a name that says what has to be known of the eviction.
    ///
    /// # Errors
    ///
    /// What the system said. The folder is where it was then.
    pub(crate) fn move_to_trash(
        &self,
        id: &JobRunId,
        at: UnixMicros,
        reason: &str,
    ) -> Result<RunFolder, LogError> {
        let run = self.run(id);
        let path = self.trash.join(format!("{id}.{}-{reason}", at.0));
        let rename = || renameat_with(CWD, run.path(), CWD, &path, RenameFlags::NOREPLACE);
        let mut moved = rename();
        if moved == Err(Errno::NOENT) {
            match fs::create_dir(&self.trash) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(LogError::io("creating", &self.trash)(error));
                }
                _ => moved = rename(),
            }
        }
        moved.map_err(|errno| LogError::io("moving to the trash", run.path())(errno.into()))?;
        Ok(RunFolder::at(path))
    }

    /// Moves a run's folder back from the trash. If that can't be done, it gets a name there that is none of an eviction,
    /// so that it is not removed.
    ///
    /// # Errors
    ///
    /// What the system said; a folder that has its place by now is left alone.
    pub(crate) fn take_back(&self, id: &JobRunId, trashed: &RunFolder) -> Result<(), LogError> {
        let rename = |to: &Path| renameat_with(CWD, trashed.path(), CWD, to, RenameFlags::NOREPLACE);
        rename(self.run(id).path()).map_err(|errno| {
            let kept = self.trash.join(format!("{id}.{}.kept", UnixMicros::now().0));
            let path = rename(&kept).map_or(trashed.path(), |()| &kept);
            tracing::error!(path = %path.display(), "a run that was not to be evicted could not be moved back");
            LogError::io("taking back from the trash", path)(errno.into())
        })
    }

    /// What an eviction that was cut short left behind. Names that are none of ours are left out.
    pub(crate) fn list_trash(&self) -> Result<Vec<Trashed>, LogError> {
        let entries = match fs::read_dir(&self.trash) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(LogError::io("listing", &self.trash)(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(LogError::io("listing", &self.trash))?;
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && let Some(name) = entry.file_name().to_str() {
                found.extend(Trashed::from_name(name, RunFolder::at(entry.path())));
            }
        }
        Ok(found)
    }

    /// Bytes that everything takes up on disk which is not in a run's folder, the index left out.
    pub(crate) fn bytes_beside_runs(&self) -> u64 {
        let index = self.index();
        let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        let files = entries(&self.root).filter(|entry| entry.path() != index);
        let beside = files.map(|entry| blocks_of(&entry.path())).sum::<u64>();
        let trashed = entries(&self.trash).map(|entry| {
            blocks_of(&entry.path()) + entries(&entry.path()).map(|file| blocks_of(&file.path())).sum::<u64>()
        });
        beside + trashed.sum::<u64>()
    }

    /// The run that a path is in, or is the folder of.
    pub(crate) fn run_of(&self, path: &Path) -> Option<JobRunId> {
        path.strip_prefix(&self.job_runs).ok()?.components().next()?.as_os_str().to_str()?.parse().ok()
    }
}

/// What there is in the folder of runs.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// The ids of run folders, in no order.
    pub(crate) runs: Vec<JobRunId>,
    /// Folders of runs that are being prepared, or were when their writer died.
    pub(crate) prepared: Vec<RunFolder>,
}

/// The folder of a run whose eviction has begun.
#[derive(Debug)]
pub(crate) struct Trashed {
    pub(crate) id: JobRunId,
    /// When it was evicted.
    pub(crate) at: UnixMicros,
    /// Why, as the word that it was moved with.
    pub(crate) reason: String,
    pub(crate) folder: RunFolder,
}

impl Trashed {
    fn from_name(name: &str, folder: RunFolder) -> Option<Self> {
        // An id can have dots of its own.
        let (id, eviction) = name.rsplit_once('.')?;
        let (at, reason) = eviction.split_once('-')?;
        Some(Self {
            id: id.parse().ok()?,
            at: UnixMicros(at.parse().ok()?),
            reason: reason.to_owned(),
            folder,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_a_relative_folder_is_known_to_be_in_it() {
        let told = std::env::current_dir().unwrap().join("./logs/job_runs/r/stdout.log");
        for root in ["logs", "./logs"] {
            assert_eq!(Layout::new(Path::new(root)).run_of(&told).unwrap().as_str(), "r");
        }
    }
}
