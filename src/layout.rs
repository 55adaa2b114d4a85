//! Where everything is on disk. No other file knows a file's name.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{
    CWD, FallocateFlags, FlockOperation, OFlags, RenameFlags, StatVfs, fallocate, flock, renameat_with,
    statvfs,
};
use rustix::io::Errno;

use crate::error::LogError;
use crate::line::{Stream, UnixMicros};
use crate::run::{JobMetadata, JobRunId};

const JOB_RUNS: &str = "job_runs";
const JOURNAL: &str = "journal";
const METADATA: &str = "metadata.json";
const TRASH: &str = "trash";
const PINNED: &str = "pinned";

/// Every file that this program makes in a run's folder, and that goes with the run. What it is still making begins
/// with a dot, then one of these, and ends in `.new`.
const OWN_FILES: [&str; 8] = [
    "stdout.log",
    "stderr.log",
    JOURNAL,
    "stdout.log.zst",
    "stderr.log.zst",
    "journal.zst",
    PINNED,
    METADATA,
];

/// The most bytes of a `metadata.json` that are read.
const MAX_METADATA: u64 = 16 * 1024 * 1024;
/// A log folder.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    job_runs: PathBuf,
    trash: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), job_runs: root.join(JOB_RUNS), trash: root.join(TRASH) }
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
                listing.prepared.push(RunFolder { path: entry.path() });
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
        let rename = || renameat_with(CWD, &run.path, CWD, &path, RenameFlags::NOREPLACE);
        let mut moved = rename();
        if moved == Err(Errno::NOENT) {
            match fs::create_dir(&self.trash) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(LogError::io("creating", &self.trash)(error));
                }
                _ => moved = rename(),
            }
        }
        moved.map_err(|errno| LogError::io("moving to the trash", &run.path)(errno.into()))?;
        Ok(RunFolder { path })
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
                found.extend(Trashed::from_name(name, RunFolder { path: entry.path() }));
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

/// What of a run's folder is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// What takes up much: `metadata.json` still tells what the run was.
    LogsOnly,
    /// All of it, and the folder itself.
    Everything,
}

/// Keeps a log folder's index to one process for as long as it lives.
#[derive(Debug)]
pub(crate) struct StoreLock {
    file: File,
}

impl Drop for StoreLock {
    /// A process that is just being started has this file open too, until it is what it becomes: closing it here
    /// would not be enough.
    fn drop(&mut self) {
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl StoreLock {
    /// Takes the lock that stands beside an index.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if somebody else has it, or what the disk said.
    pub(crate) fn take(index: &Path) -> Result<Self, LogError> {
        let path = index.with_file_name("LOCK");
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(LogError::io("opening", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file }),
            Err(Errno::WOULDBLOCK) => Err(LogError::InUse { path: index.to_owned() }),
            Err(errno) => Err(LogError::io("locking", path)(errno.into())),
        }
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

    /// Whether the run has a journal, compressed or not.
    pub(crate) fn has_journal(&self) -> bool {
        let journal = self.journal();
        journal.exists() || compressed(&journal).exists()
    }

    /// What is compressed when the run is over: its logs and its journal.
    pub(crate) fn parts(&self) -> [PathBuf; 3] {
        [self.log(Stream::Stdout), self.log(Stream::Stderr), self.journal()]
    }

    /// Whether nothing is left to be compressed. A file without a byte stays as it is.
    pub(crate) fn is_compressed(&self) -> bool {
        !self.parts().iter().any(|part| fs::symlink_metadata(part).is_ok_and(|file| file.len() > 0))
    }

    /// Files that somebody was making of the run's parts when it died.
    pub(crate) fn half_compressed(&self) -> Vec<PathBuf> {
        let parts = self.parts();
        let half_made = parts.iter().map(|part| being_compressed(part));
        // While the plain file is there, it is the truth.
        let unused = parts.iter().filter(|part| part.exists()).map(|part| compressed(part));
        half_made.chain(unused).filter(|path| path.exists()).collect()
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
        let reserve = || allocate(&File::create(&path)?, 0..bytes);
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

    /// What writers that died left of a `metadata.json` that they had not finished.
    pub(crate) fn unfinished_metadata(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let is_unfinished = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            name.to_str().is_some_and(|name| name.starts_with(".metadata.json.") && name.ends_with(".new"))
        };
        entries.filter(is_unfinished).map(|entry| entry.path()).collect()
    }

    /// Removes what writers that died left behind. The caller knows that no writer lives.
    pub(crate) fn remove_unfinished_metadata(&self) {
        for path in self.unfinished_metadata() {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "what a dead writer left stays behind");
            }
        }
    }

    /// The file that says that the run is never evicted. What is in it does not matter.
    fn pin(&self) -> PathBuf {
        self.path.join(PINNED)
    }

    /// Whether the run is pinned.
    pub(crate) fn is_pinned(&self) -> bool {
        fs::symlink_metadata(self.pin()).is_ok()
    }

    /// Pins the run, or takes the pin away.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub(crate) fn set_pinned(&self, pinned: bool) -> Result<(), LogError> {
        let path = self.pin();
        let done = match pinned {
            true => OpenOptions::new().write(true).create_new(true).open(&path).map(drop),
            false => fs::remove_file(&path),
        };
        let (doing, already) = match pinned {
            true => ("creating", io::ErrorKind::AlreadyExists),
            false => ("removing", io::ErrorKind::NotFound),
        };
        match done {
            Err(error) if error.kind() == already => Ok(()),
            Err(error) => Err(LogError::io(doing, path)(error)),
            // A pin is to survive what the run survives.
            Ok(()) => File::open(&self.path)
                .and_then(|folder| folder.sync_all())
                .map_err(LogError::io("syncing", &self.path)),
        }
    }

    /// Bytes on disk of what is written while a run goes on, without listing the folder.
    pub(crate) fn live_bytes(&self) -> u64 {
        let files = OWN_FILES.iter().map(|name| blocks_of(&self.path.join(name)));
        files.sum::<u64>() + blocks_of(&self.new_metadata()) + blocks_of(&self.path)
    }

    /// Bytes on disk of a run that is over.
    pub(crate) fn disk_bytes(&self) -> u64 {
        // Blocks behind the end of a file are given back when the run ends.
        let used = |path: &Path| match fs::symlink_metadata(path) {
            Ok(file) if file.is_file() => (file.blocks() * 512).min(file.len().next_multiple_of(4096)),
            Ok(other) => other.blocks() * 512,
            Err(_) => 0,
        };
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.map(|entry| used(&entry.path())).sum::<u64>() + used(&self.path)
    }

    /// Whether anything is left that this program made.
    pub(crate) fn has_own_files(&self) -> bool {
        let entries = || fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries().any(|entry| entry_is_own(&entry)) || entries().next().is_none()
    }

    /// Removes files that this program made. Gives the names of what others put there, which stays: files of other
    /// names, folders, links. Nothing is followed.
    ///
    /// # Errors
    ///
    /// What the system said of a file of ours that it does not remove.
    pub(crate) fn remove_own_files(&self, removal: Removal) -> Result<Vec<OsString>, LogError> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(LogError::io("listing", &self.path)(error)),
        };
        let (mut foreign, mut own) = (Vec::new(), Vec::new());
        for entry in entries {
            let entry = entry.map_err(LogError::io("listing", &self.path))?;
            if entry_is_own(&entry) { &mut own } else { &mut foreign }.push(entry.file_name());
        }
        // While `metadata.json` is there, whoever goes on with this can tell what the run was.
        own.sort_unstable_by_key(|name| name == METADATA);
        for name in own {
            if name == METADATA && removal == Removal::LogsOnly {
                continue;
            }
            let path = self.path.join(&name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(LogError::io("removing", path)(error));
                }
                _ => {}
            }
        }
        if removal == Removal::Everything && foreign.is_empty() {
            fs::remove_dir(&self.path).map_err(LogError::io("removing", &self.path))?;
        }
        Ok(foreign)
    }

    /// How long ago something in the folder appeared or went.
    pub(crate) fn age(&self) -> Duration {
        let changed = fs::metadata(&self.path).and_then(|folder| folder.modified());
        changed.ok().and_then(|changed| changed.elapsed().ok()).unwrap_or_default()
    }

    /// Removes a folder that was prepared and is not needed.
    pub(crate) fn discard(&self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a run folder that was only prepared stays behind");
        }
    }
}

/// The compressed file that stands in place of a log or journal.
pub(crate) fn compressed(plain: &Path) -> PathBuf {
    plain.with_file_name(format!("{}.zst", name_of(plain)))
}

/// The same while it is being made.
pub(crate) fn being_compressed(plain: &Path) -> PathBuf {
    plain.with_file_name(format!(".{}.zst.new", name_of(plain)))
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// What the system says of a log or journal, compressed or not.
pub(crate) fn metadata_of(plain: &Path) -> io::Result<fs::Metadata> {
    fs::metadata(plain).or_else(|_| fs::metadata(compressed(plain)))
}

/// Bytes that a file or folder takes up on disk, as its blocks say; what is in the folder is not counted.
fn blocks_of(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |file| file.blocks() * 512)
}

fn entry_is_own(entry: &fs::DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_file()) && entry.file_name().to_str().is_some_and(is_own)
}

/// Whether a file of this name in a run's folder is of this program.
fn is_own(name: &str) -> bool {
    let being_made = name.strip_prefix('.').and_then(|name| name.strip_suffix(".new"));
    match being_made {
        Some(made) => OWN_FILES.iter().any(|own| made.starts_with(own)),
        None => OWN_FILES.contains(&name),
    }
}

/// What is known of the file system that a file or folder is in, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// What this process may still write.
    pub(crate) free: u64,
    pub(crate) size: u64,
}

impl Disk {
    /// The file system that a path is in.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub(crate) fn at(path: &Path) -> Result<Self, LogError> {
        statvfs(path)
            .map(Self::from)
            .map_err(|errno| LogError::io("asking for free space of", path)(errno.into()))
    }

    /// What logs leave free here when so much is asked for: never more than half of it.
    pub(crate) fn floor(self, min_free_bytes: u64) -> u64 {
        min_free_bytes.min(self.size / 2)
    }
}

impl From<StatVfs> for Disk {
    fn from(found: StatVfs) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Self { free: bytes(found.f_bavail), size: bytes(found.f_blocks) }
    }
}

/// Asks for blocks of the disk for a part of a file, also of one behind its end, without changing its length. What is written there later finds
/// room on a disk that is full by then. Gives false on a file system that can't do that.
///
/// # Errors
///
/// What the system says; [`io::ErrorKind::StorageFull`] above all.
pub(crate) fn allocate(file: &File, part: Range<u64>) -> io::Result<bool> {
    change_blocks(file, FallocateFlags::KEEP_SIZE, part)
}

/// Gives the blocks of a part of a file back to the disk; it reads as zeros then. The file stays as long as it is. Gives
/// false on a file system that can't do that.
///
/// # Errors
///
/// What the system says.
pub(crate) fn punch_hole(file: &File, part: Range<u64>) -> io::Result<bool> {
    change_blocks(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, part)
}

fn change_blocks(file: &File, flags: FallocateFlags, part: Range<u64>) -> io::Result<bool> {
    if part.is_empty() {
        return Ok(true);
    }
    loop {
        match fallocate(file, flags, part.start, part.end - part.start) {
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
