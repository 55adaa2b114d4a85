//! The disk that logs are on, and the lock that keeps an index to one process.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{
    FallocateFlags, FlockOperation, FsWord, OFlags, StatVfs, fallocate, flock, fstatfs, statvfs,
};
use rustix::io::Errno;

use crate::error::LogError;

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

/// Which file or folder stands at a path: device and inode.
pub(crate) type FileId = (u64, u64);

/// Which file or folder it is that was asked.
pub(crate) fn file_id(found: &Metadata) -> FileId {
    (found.dev(), found.ino())
}

/// Which file or folder stands at a path, if there is one that can be asked.
pub(crate) fn file_at(path: &Path) -> Option<FileId> {
    fs::metadata(path).ok().map(|found| file_id(&found))
}

/// Asks for blocks of the disk for a part of a file, also of one behind its end, without changing its length. What is
/// written there later finds room on a disk that is full by then. Gives false on a file system that can't do that.
///
/// # Errors
///
/// What the system says; [`io::ErrorKind::StorageFull`] above all.
pub(crate) fn allocate(file: &File, part: Range<u64>) -> io::Result<bool> {
    change_blocks(file, FallocateFlags::KEEP_SIZE, part)
}

/// Whether the file system of a file chooses blocks only when it writes to the disk, and keeps who appends to the file
/// waiting while it reads from the disk which ones are free: ext4.
pub(crate) fn chooses_blocks_late(file: &File) -> bool {
    /// That of ext2, ext3 and ext4, from `linux/magic.h`.
    const EXT_SUPER_MAGIC: FsWord = 0xef53;
    fstatfs(file).is_ok_and(|found| found.f_type == EXT_SUPER_MAGIC)
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

/// A file that is locked for as long as this lives.
#[derive(Debug)]
pub(crate) struct Locked<F: AsFd>(F);

impl<F: AsFd> Locked<F> {
    /// Takes the lock; `None` if somebody else has it.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub(crate) fn take(file: F) -> io::Result<Option<Self>> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl<F: AsFd> Deref for Locked<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.0
    }
}

impl<F: AsFd> Drop for Locked<F> {
    /// A process that is just being started has this file open too, until it is what it becomes: closing it here
    /// would not be enough.
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Keeps a log folder's index to one process for as long as it lives.
#[derive(Debug)]
pub(crate) struct StoreLock {
    _file: Locked<File>,
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
        let locked = Locked::take(file).map_err(LogError::io("locking", path))?;
        Ok(Self { _file: locked.ok_or_else(|| LogError::InUse { path: index.to_owned() })? })
    }
}
