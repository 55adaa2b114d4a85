//! Putting compressed files in the place of a run's logs and journal, so that whoever reads the run never misses a
//! byte, and neither a crash nor a power cut does harm at any moment.
//!
//! While a plain file is there, it is the truth. It goes last: when the compressed one is on the disk under its name
//! and was read back whole. Whoever has the plain one open finishes on it; whoever opens the run later finds the
//! other.

use std::fs::{File, FileTimes};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::layout::{Locked, RunFolder, being_compressed, compressed};
use crate::logfile::{ReadFile, compress};
use crate::run::JobRunId;
use crate::store::Compression;
use crate::store::file::identity::is_of;

/// Compresses the logs and the journal of the run of a record; what is compressed already or empty stays as it is.
/// `go_on` is asked every now and then.
///
/// # Errors
///
/// [`LogError::NotFound`] if there is no such folder, or another run is in it; [`LogError::InUse`] if somebody else is at
/// it, or has the journal locked; [`LogError::Unfinished`] if nothing in the folder says that the run is over;
/// [`LogError::Closed`] when it should not go on; or what the disk said. The run can be read as before then.
pub(crate) fn compress_folder(
    folder: &RunFolder,
    record: &RunRecord,
    go_on: &dyn Fn() -> bool,
) -> Result<Compression, LogError> {
    let id = record.run.id();
    let bytes_before = folder.disk_bytes();
    let place = Place::open(folder, id)?;
    // Kept until all is done: nobody mends a journal that is being compressed.
    let journal = ReadFile::open_when_there(&folder.journal())?;
    let lock = if folder.has_journal() { journal.try_lock_alone()? } else { None };
    let is_over = match folder.has_journal() {
        true => lock.is_some(),
        // Whoever writes a folder by hand has no lock that could be seen.
        false => folder.read_metadata()?.is_some_and(|run| run.state.is_over()),
    };
    if !is_over {
        return Err(match folder.has_journal() {
            true => LogError::InUse { path: folder.journal() },
            false => LogError::Unfinished { id: id.clone() },
        });
    }
    if !is_of(folder, record) {
        return Err(LogError::NotFound { id: id.clone() });
    }
    let mut made = Vec::new();
    for part in folder.parts() {
        made.extend(place.compress(&part, go_on)?);
    }
    place.sync()?;
    for part in &made {
        place.remove(part)?;
    }
    if !made.is_empty() {
        place.keep_times()?;
        place.sync()?;
    }
    Ok(Compression { bytes_before, bytes_after: folder.disk_bytes() })
}

/// A run's folder, held open: another one that gets its name meanwhile is not touched.
struct Place {
    folder: Locked<File>,
    path: PathBuf,
    times: FileTimes,
}

/// A plain file for which there is a compressed one.
struct Made {
    path: PathBuf,
    plain: File,
    /// Length and time of the last change.
    state: (u64, i64, i64),
}

impl Place {
    fn open(folder: &RunFolder, id: &JobRunId) -> Result<Self, LogError> {
        let path = folder.path().to_owned();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = match openat(CWD, &path, flags, Mode::empty()) {
            Ok(folder) => File::from(folder),
            Err(Errno::NOENT) => return Err(LogError::NotFound { id: id.clone() }),
            Err(errno) => return Err(LogError::io("opening", path)(errno.into())),
        };
        let locked = Locked::take(folder).map_err(LogError::io("locking", &path))?;
        let Some(folder) = locked else { return Err(LogError::InUse { path }) };
        let found = folder.metadata().and_then(|found| times_of(&found));
        let times = found.map_err(LogError::io("looking at", &path))?;
        Ok(Self { folder, path, times })
    }

    /// Makes the compressed file of a part; `None` if there is nothing to compress.
    fn compress(&self, path: &Path, go_on: &dyn Fn() -> bool) -> Result<Option<Made>, LogError> {
        let opened = match self.open_file(path, OFlags::RDONLY | OFlags::NONBLOCK) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened,
        };
        let plain = opened.map_err(LogError::io("opening", path))?;
        let found = plain.metadata().map_err(LogError::io("looking at", path))?;
        if found.len() == 0 || !found.is_file() {
            return Ok(None);
        }
        let new = being_compressed(path);
        let make = || -> io::Result<()> {
            let out = self.open_file(&new, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC)?;
            if compress(&plain, &out, &new, go_on)? != found.len() {
                return Err(io::Error::other("somebody changed it meanwhile"));
            }
            out.set_times(times_of(&found)?)?;
            renameat(&*self.folder, name(&new), &*self.folder, name(&compressed(path)))?;
            Ok(())
        };
        if let Err(error) = make() {
            // Whether it could be removed makes no difference: it is made anew the next time.
            let _ = unlinkat(&*self.folder, name(&new), AtFlags::empty());
            return Err(match error.kind() {
                io::ErrorKind::Interrupted => LogError::Closed,
                _ => LogError::io("compressing", path)(error),
            });
        }
        let state = state_of(&plain).map_err(LogError::io("looking at", path))?;
        Ok(Some(Made { path: path.to_owned(), plain, state }))
    }

    /// Removes a plain file in whose place there is a compressed one, unless somebody wrote to it.
    fn remove(&self, made: &Made) -> Result<(), LogError> {
        let path = &made.path;
        if state_of(&made.plain).map_err(LogError::io("looking at", path))? != made.state {
            // It is the truth for as long as it is there.
            return Err(LogError::InUse { path: path.clone() });
        }
        unlinkat(&*self.folder, name(path), AtFlags::empty())
            .map_err(|errno| LogError::io("removing", path)(errno.into()))
    }

    /// Gives the folder the times that it had: of a run without a journal they tell when it was.
    fn keep_times(&self) -> Result<(), LogError> {
        self.folder.set_times(self.times).map_err(LogError::io("setting the times of", &self.path))
    }

    fn sync(&self) -> Result<(), LogError> {
        self.folder.sync_all().map_err(LogError::io("syncing", &self.path))
    }

    fn open_file(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: OwnedFd = openat(&*self.folder, name(path), flags, Mode::from_raw_mode(0o644))?;
        Ok(File::from(file))
    }
}

fn name(path: &Path) -> &Path {
    path.file_name().map_or(path, Path::new)
}

fn times_of(found: &std::fs::Metadata) -> io::Result<FileTimes> {
    Ok(FileTimes::new().set_modified(found.modified()?).set_accessed(found.accessed()?))
}

fn state_of(file: &File) -> io::Result<(u64, i64, i64)> {
    let found = file.metadata()?;
    Ok((found.len(), found.mtime(), found.mtime_nsec()))
}
