//! A log file or journal that is appended to.

use std::cmp::Ordering;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::mem;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use rustix::fs::{OFlags, fstatvfs};

use crate::error::LogError;
use crate::layout::{
    Disk, Locked, allocate, aside, chooses_blocks_late, compressed, file_id, is_absent, punch_hole,
};

/// How many bytes to gather before asking the system to write them to the disk.
const WRITE_BACK_BYTES: u64 = 128 * 1024 * 1024;

/// A file that is only ever appended to.
#[derive(Debug)]
pub(crate) struct AppendFile {
    file: Arc<File>,
    /// The same, while it is locked.
    lock: Option<Locked<Arc<File>>>,
    path: PathBuf,
    length: u64,
    /// The length when it was asked last whether somebody else had changed it.
    asked: u64,
    /// Up to where the system was asked to write the file to the disk.
    write_back: u64,
}

impl AppendFile {
    /// Creates a new, empty file.
    pub(crate) fn create(path: PathBuf) -> Result<Self, LogError> {
        let file = OpenOptions::new().append(true).read(true).create_new(true).open(&path);
        let file = Arc::new(file.map_err(LogError::io("creating", &path))?);
        Ok(Self { file, lock: None, path, length: 0, asked: 0, write_back: 0 })
    }

    /// Opens a file to append to it, and creates it if it is not there. What was compressed is not appended to.
    pub(crate) fn open(path: PathBuf) -> Result<Self, LogError> {
        let open = || -> io::Result<(File, u64)> {
            if !path.exists() && compressed(&path).exists() {
                return Err(io::Error::other("it is compressed, and nothing can be appended to it"));
            }
            let mut options = OpenOptions::new();
            options.append(true).read(true).create(true).custom_flags(OFlags::NOFOLLOW.bits() as i32);
            let file = options.open(&path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        let (file, length) = open().map_err(LogError::io("opening", &path))?;
        Ok(Self { file: Arc::new(file), lock: None, path, length, asked: length, write_back: length })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the lock by which others see that the file's writer lives; false if somebody else has it. The kernel
    /// lets go of it when the process ends, however that comes about.
    pub(crate) fn try_lock(&mut self) -> Result<bool, LogError> {
        let locked = Locked::take(Arc::clone(&self.file));
        self.lock = locked.map_err(LogError::io("locking", &self.path))?;
        Ok(self.lock.is_some())
    }

    /// The length in bytes.
    pub(crate) const fn len(&self) -> u64 {
        self.length
    }

    /// Moves the file's path, after its folder was renamed.
    pub(crate) fn moved_to(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// Appends all bytes. When that fails, what was written of them stays, and [`len`](Self::len) says so.
    pub(crate) fn append(&mut self, mut bytes: &[u8]) -> Result<(), LogError> {
        while !bytes.is_empty() {
            match (&*self.file).write(bytes) {
                Ok(0) => {
                    return Err(LogError::io("appending to", &self.path)(io::ErrorKind::WriteZero.into()));
                }
                Ok(written) => {
                    self.length += written as u64;
                    bytes = &bytes[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LogError::io("appending to", &self.path)(error)),
            }
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<(), LogError> {
        self.file.set_len(length).map_err(LogError::io("cutting", &self.path))
    }

    fn seek(&self, to: SeekFrom) -> Result<u64, LogError> {
        (&*self.file).seek(to).map_err(|error| LogError::io("asking for the end of", &self.path)(error))
    }

    /// Gives the file a length: one that it had before, or a longer one whose end reads as zeros.
    pub(crate) fn cut(&mut self, length: u64) -> Result<(), LogError> {
        self.set_len(length)?;
        (self.length, self.asked) = (length, length);
        Ok(())
    }

    /// What somebody else made of the file since it was asked last.
    ///
    /// The system appends where the file ends, wherever that is by then. So where the last append ended tells whether
    /// those since the last time got to their places. If not, all of them are taken back.
    pub(crate) fn changed(&mut self) -> Result<Option<Changed>, LogError> {
        let is_in_place = self.asked == self.length || self.seek(SeekFrom::Current(0))? == self.length;
        let found = self.seek(SeekFrom::End(0))?;
        let since = self.length - mem::replace(&mut self.asked, self.length);
        if !is_in_place {
            let left = found.min(self.length).saturating_sub(since);
            self.set_len(left)?;
            return Ok(Some(Changed::Shorter(left)));
        }
        Ok(match found.cmp(&self.length) {
            Ordering::Less => Some(Changed::Shorter(found)),
            Ordering::Equal => None,
            Ordering::Greater => Some(Changed::Longer(found)),
        })
    }

    /// Takes over some of what somebody else has appended, as if it had been appended here.
    pub(crate) fn take_over(&mut self, bytes: &mut [u8]) -> Result<(), LogError> {
        self.file.read_exact_at(bytes, self.length).map_err(LogError::io("reading", &self.path))?;
        self.length += bytes.len() as u64;
        self.asked = self.length;
        Ok(())
    }

    /// Whether the file that is written stands at its path, and not another or none. While that can't be told, it is.
    pub(crate) fn is_at_its_path(&self) -> Result<bool, LogError> {
        let written = self.file.metadata().map_err(LogError::io("looking at", &self.path))?;
        Ok(match fs::metadata(&self.path) {
            Ok(found) => file_id(&found) == file_id(&written),
            Err(error) => !is_absent(&error),
        })
    }

    /// Goes on in a new, empty file at the path: what was written is not there any more. What somebody else has put
    /// there is moved aside.
    pub(crate) fn make_anew(&mut self) -> Result<(), LogError> {
        let file = loop {
            match self.open_anew() {
                // Somebody else made one just now.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                file => break file.map_err(LogError::io("making anew", &self.path))?,
            }
        };
        self.file = Arc::new(file);
        Ok(())
    }

    fn open_anew(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.append(true).read(true).custom_flags(OFlags::NOFOLLOW.bits() as i32);
        match fs::symlink_metadata(&self.path) {
            Ok(found) if found.is_file() && found.len() == 0 => return options.open(&self.path),
            Ok(_) => {
                let aside = aside(&self.path);
                fs::rename(&self.path, &aside)?;
                tracing::warn!(path = %aside.display(), "somebody else put something in the place of a run's log; it is moved aside");
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        options.create_new(true).open(&self.path)
    }

    /// Asks for blocks of the disk from the end of the file up to `end`; see [`allocate`].
    pub(crate) fn allocate(&self, end: u64) -> Result<bool, LogError> {
        allocate(&self.file, self.length..end).map_err(LogError::io("making room in", &self.path))
    }

    /// Gives back the blocks of a part of the file; see [`punch_hole`].
    pub(crate) fn punch(&self, part: Range<u64>) -> Result<bool, LogError> {
        punch_hole(&self.file, part).map_err(LogError::io("freeing a part of", &self.path))
    }

    /// The file system that the file is in.
    pub(crate) fn disk(&self) -> Result<Disk, LogError> {
        fstatvfs(&*self.file)
            .map(Disk::from)
            .map_err(|errno| LogError::io("asking for free space of", &self.path)(errno.into()))
    }

    /// The file itself, to be synced while others go on appending.
    pub(crate) fn handle(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Begins to write a large file to the disk in the background, so that the sync at its end has little left to
    /// wait for. Measured with 1 GB: that sync alone took half as long as the writing before it. Nothing before
    /// `kept_from` is written: those bytes are given up.
    pub(crate) fn begin_write_back(&mut self, kept_from: u64) {
        self.write_back = self.write_back.max(kept_from);
        let in_progress = Arc::strong_count(&self.file) > 1;
        if in_progress || self.length < self.write_back + WRITE_BACK_BYTES {
            return;
        }
        // What chooses blocks reads which are free, while appends wait. Now nothing is before it in the disk's queue,
        // and it takes less than a millisecond; from within the write-back it took 34, behind all that is written.
        if chooses_blocks_late(&self.file) {
            // A disk that has no room says so to the append that needs it.
            let _ = allocate(&self.file, self.write_back..self.length);
        }
        self.write_back = self.length;
        let file = Arc::clone(&self.file);
        // An error shows again at the sync that counts; without a thread that one has more to do.
        let _ = thread::Builder::new().name("write-back".into()).spawn(move || file.sync_data());
    }

    /// Waits until the bytes are on the disk.
    pub(crate) fn sync(&self) -> Result<(), LogError> {
        self.file.sync_data().map_err(LogError::io("syncing", &self.path))
    }
}

/// What somebody else made of a file that is appended to: the length that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    /// Less than was written.
    Shorter(u64),
    /// More than was written.
    Longer(u64),
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;
    use crate::logfile::ReadFile;

    #[test]
    fn a_file_is_not_at_its_path_only_if_the_system_says_so() {
        let home = tempfile::tempdir().unwrap();
        let [folder, moved] = ["folder", "moved"].map(|name| home.path().join(name));
        fs::create_dir(&folder).unwrap();
        let file = AppendFile::create(folder.join("x")).unwrap();
        assert!(file.is_at_its_path().unwrap());
        fs::rename(&folder, &moved).unwrap();
        assert!(!file.is_at_its_path().unwrap());
        std::os::unix::fs::symlink(&folder, &folder).unwrap();
        assert!(file.is_at_its_path().unwrap(), "the path leads in a circle");
        fs::remove_file(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("x"), "").unwrap();
        assert!(!file.is_at_its_path().unwrap());
    }

    /// A process that is just being started has all files open that this one has, until it is what it becomes.
    #[test]
    fn the_lock_goes_with_the_writer_while_other_processes_are_started() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    assert!(Command::new("true").status().unwrap().success());
                }
            });
            let held = (0..20_000).filter(|_| {
                let mut file = AppendFile::open(path.clone()).unwrap();
                let is_ours = file.try_lock().unwrap();
                drop(file);
                !is_ours || ReadFile::open_if_there(&path).unwrap().unwrap().is_locked().unwrap()
            });
            let held = held.count();
            stop.store(true, Relaxed);
            assert_eq!(held, 0);
        });
    }

    #[test]
    fn a_write_back_leaves_what_is_given_up_without_blocks() {
        const MIB: u64 = 1024 * 1024;
        let folder = tempfile::tempdir().unwrap();
        let mut file = AppendFile::create(folder.path().join("x")).unwrap();
        let blocks = |file: &AppendFile| file.file.metadata().unwrap().blocks() * 512;
        let done = |file: &AppendFile| {
            while Arc::strong_count(&file.file) > 1 {
                thread::yield_now()
            }
        };

        file.cut(100 * MIB + WRITE_BACK_BYTES - 1).unwrap();
        file.begin_write_back(100 * MIB);
        assert_eq!((file.write_back, blocks(&file)), (100 * MIB, 0), "there is not enough to be written");

        file.cut(100 * MIB + WRITE_BACK_BYTES).unwrap();
        file.begin_write_back(100 * MIB);
        done(&file);
        assert_eq!(file.write_back, file.len());
        let expected = if chooses_blocks_late(&file.file) { WRITE_BACK_BYTES } else { 0 };
        assert!((expected..=expected + MIB).contains(&blocks(&file)), "{} bytes of blocks", blocks(&file));
    }
}
