//! The folder of one run: what its files are called, and what they take up.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::disk::{FileId, allocate, file_id, open_regular};
use super::told::is_news;
use crate::error::LogError;
use crate::line::{Stream, UnixMicros};
use crate::run::{JobMetadata, TimesOfFiles};

const JOURNAL: &str = "journal";
const METADATA: &str = "metadata.json";
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

/// What of a run's folder is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// What takes up much: `metadata.json` still tells what the run was.
    LogsOnly,
    /// All of it, and the folder itself.
    Everything,
}

/// Tells a run's folder as it is from what it was before, and from another at its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FolderStamp {
    place: FileId,
    changed: (i64, i64),
}

/// The folder of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    pub(super) const fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What changes when another folder gets this path, or something in it appears, goes or gets another name; `None`
    /// if it is not there. A link to one is not.
    ///
    /// # Errors
    ///
    /// What the system said when it could not tell.
    pub(crate) fn stamp(&self) -> Result<Option<FolderStamp>, LogError> {
        match fs::symlink_metadata(&self.path) {
            Ok(entry) => Ok(entry.is_dir().then(|| FolderStamp {
                place: file_id(&entry),
                changed: (entry.ctime(), entry.ctime_nsec()),
            })),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(LogError::io("looking at", &self.path)(error)),
        }
    }

    /// When the folder was made, or changed last where the file system does not say; `None` if it is gone.
    pub(crate) fn made(&self) -> Option<UnixMicros> {
        let folder = fs::metadata(&self.path).ok()?;
        folder.created().or_else(|_| folder.modified()).ok().map(UnixMicros::from)
    }

    /// Whether the folder is there. A link to one is not: it could lead out of the log folder.
    ///
    /// # Errors
    ///
    /// What the system said when it could not tell.
    pub(crate) fn is_there(&self) -> Result<bool, LogError> {
        self.stamp().map(|stamp| stamp.is_some())
    }

    /// Whether anything at all is at the folder's path.
    ///
    /// # Errors
    ///
    /// The same.
    pub(crate) fn is_path_taken(&self) -> Result<bool, LogError> {
        match fs::metadata(&self.path) {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(LogError::io("looking at", &self.path)(error)),
        }
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

    /// Reads `metadata.json`; `None` if there is none. Times that it does not tell are 0.
    pub(crate) fn read_metadata(&self) -> Result<Option<JobMetadata>, LogError> {
        self.read_document(None)
    }

    /// The same with the times that it does not tell.
    pub(crate) fn read_metadata_with(
        &self,
        times: TimesOfFiles<'_>,
    ) -> Result<Option<JobMetadata>, LogError> {
        self.read_document(Some(times))
    }

    fn read_document(&self, times: Option<TimesOfFiles<'_>>) -> Result<Option<JobMetadata>, LogError> {
        let path = self.metadata();
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            open_regular(&path)?.take(MAX_METADATA).read_to_end(&mut text)?;
            Ok(text)
        };
        match read() {
            Ok(text) => self
                .parse_metadata(&text, times)
                .map(Some)
                .map_err(|error| LogError::Corrupt { path, what: error.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LogError::io("reading", path)(error)),
        }
    }

    /// A document by another tool may leave it to its folder to say which run it is of.
    fn parse_metadata(
        &self,
        text: &[u8],
        times: Option<TimesOfFiles<'_>>,
    ) -> serde_json::Result<JobMetadata> {
        JobMetadata::parse(text, times).or_else(|error| {
            let Ok(serde_json::Value::Object(mut document)) = serde_json::from_slice(text) else {
                return Err(error);
            };
            if let Some(id) = self.path.file_name().and_then(OsStr::to_str) {
                document.entry("job_run_id").or_insert_with(|| id.into());
            }
            let (run, left_out) = JobMetadata::from_document(document, times);
            let path = self.metadata();
            if run.is_ok() && !left_out.is_empty() && is_news(&path, &left_out.join(" ")) {
                tracing::warn!(path = %path.display(), fields = left_out.join(", "), %error, "fields of metadata.json that can't be understood are left out");
            }
            run
        })
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

/// Where to put what somebody else has put in the place of a file: a name that is none of ours, so that it is not
/// removed with the run.
pub(crate) fn aside(path: &Path) -> PathBuf {
    path.with_file_name(format!("{}.aside-{}", name_of(path), UnixMicros::now().0))
}

/// The same while it is being made.
pub(crate) fn being_compressed(plain: &Path) -> PathBuf {
    plain.with_file_name(format!(".{}.zst.new", name_of(plain)))
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Whether an error says that there is nothing at a path, and not that it can't be told.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// What the system says of a log or journal, compressed or not.
pub(crate) fn metadata_of(plain: &Path) -> io::Result<fs::Metadata> {
    fs::metadata(plain).or_else(|_| fs::metadata(compressed(plain)))
}

/// Bytes that a file or folder takes up on disk, as its blocks say; what is in the folder is not counted.
pub(super) fn blocks_of(path: &Path) -> u64 {
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
