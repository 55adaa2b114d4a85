//! A log file: appending to it, reading it by position, and finding lines in what was read.
//!
//! A file of a run that is over may be there compressed. [`ReadFile`] reads either, by the same offsets: those of the
//! text.

#[cfg(feature = "compression")]
mod compress;
#[cfg(feature = "compression")]
mod frames;
#[cfg(feature = "compression")]
mod seekable;
#[cfg(not(feature = "compression"))]
#[path = "unseekable.rs"]
mod seekable;

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use bytes::{Bytes, BytesMut};
use memchr::{memchr_iter, memrchr};
use rustix::fs::{FlockOperation, OFlags, flock, fstatvfs};
use rustix::io::{Errno, ReadWriteFlags};

use crate::error::LogError;
use crate::layout::{Disk, allocate, chooses_blocks_late, compressed, is_absent, open_regular, punch_hole};
use seekable::Seekable;

#[cfg(feature = "compression")]
pub(crate) use compress::compress;

/// Whether a read may wait for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Io {
    /// Only what is in memory or in the page cache.
    CachedOnly,
    /// Whatever it takes.
    MayBlock,
}

/// How many bytes to gather before asking the system to write them to the disk.
const WRITE_BACK_BYTES: u64 = 128 * 1024 * 1024;

/// A file that is only ever appended to.
#[derive(Debug)]
pub(crate) struct AppendFile {
    file: Arc<File>,
    path: PathBuf,
    length: u64,
    /// Up to where the system was asked to write the file to the disk.
    write_back: u64,
}

impl AppendFile {
    /// Creates a new, empty file.
    pub(crate) fn create(path: PathBuf) -> Result<Self, LogError> {
        let file = OpenOptions::new().append(true).read(true).create_new(true).open(&path);
        let file = Arc::new(file.map_err(LogError::io("creating", &path))?);
        Ok(Self { file, path, length: 0, write_back: 0 })
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
        Ok(Self { file: Arc::new(file), path, length, write_back: length })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the lock by which others see that the file's writer lives; false if somebody else has it. The kernel
    /// lets go of it when the file is closed, however that comes about.
    pub(crate) fn try_lock(&self) -> Result<bool, LogError> {
        match flock(&*self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(LogError::io("locking", &self.path)(errno.into())),
        }
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

    /// Cuts the file back to a length that it had before.
    pub(crate) fn cut(&mut self, length: u64) -> Result<(), LogError> {
        self.file.set_len(length).map_err(LogError::io("cutting", &self.path))?;
        self.length = length;
        Ok(())
    }

    /// The length of the file if somebody else has made it shorter than it was written; 0 if it is deleted, after it was
    /// made anew.
    pub(crate) fn shortened(&mut self) -> Result<Option<u64>, LogError> {
        let found = self.file.metadata().map_err(LogError::io("looking at", &self.path))?;
        if found.nlink() == 0 {
            let file = OpenOptions::new().append(true).read(true).create_new(true).open(&self.path);
            self.file = Arc::new(file.map_err(LogError::io("making anew", &self.path))?);
            return Ok(Some(0));
        }
        Ok((found.len() < self.length).then_some(found.len()))
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

/// What a positioned read gave.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// These bytes; fewer than asked for only at the end of the file, and before what is damaged.
    Bytes(Bytes),
    /// They are not at hand without waiting.
    WouldBlock,
    /// The first byte asked for is in a part of a compressed file that is damaged.
    #[cfg_attr(not(feature = "compression"), expect(dead_code, reason = "only what is compressed can tell"))]
    Damaged(Sound),
}

/// Where a damaged part of a file ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sound {
    /// The first byte behind it at which a line begins, or the end of the text.
    pub(crate) offset: u64,
    /// How many `\n` there are before that.
    pub(crate) lines: u64,
}

/// A file opened for reading by position, whether it is compressed or not.
#[derive(Debug)]
pub(crate) struct ReadFile {
    source: Source,
    path: PathBuf,
    buffer: BytesMut,
}

#[derive(Debug)]
enum Source {
    /// There is none under the path yet.
    None,
    Plain(File),
    Compressed(Box<Seekable>),
}

impl Source {
    /// Opens what is there under a path. While both are there the plain file is the truth: the other is what somebody
    /// was making of it.
    fn open(path: &Path) -> Result<Self, LogError> {
        let open = |path: &Path| match open_regular(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LogError::io("opening", path)(error)),
        };
        if let Some(file) = open(path)? {
            return Ok(Self::Plain(file));
        }
        let other = compressed(path);
        if let Some(file) = open(&other)? {
            return Ok(Self::Compressed(Box::new(Seekable::open(file, &other)?)));
        }
        // Somebody may have taken the compressed one apart between the two looks.
        Ok(open(path)?.map_or(Self::None, Self::Plain))
    }

    /// The file itself, if there is one.
    fn file(&self) -> Option<&File> {
        match self {
            Self::None => None,
            Self::Plain(file) => Some(file),
            Self::Compressed(file) => Some(file.file()),
        }
    }
}

/// The length in bytes of the text of a file, whether it is compressed or not; 0 if there is none, or if it is
/// compressed and can't be read.
///
/// # Errors
///
/// What the system said when it could not tell.
pub(crate) fn length(path: &Path) -> Result<u64, LogError> {
    match std::fs::metadata(path) {
        Ok(file) => Ok(file.len()),
        Err(error) if is_absent(&error) => {
            Ok(ReadFile::open_when_there(path).and_then(|file| file.len()).unwrap_or(0))
        }
        Err(error) => Err(LogError::io("looking at", path)(error)),
    }
}

impl ReadFile {
    /// Opens a file, or gives `None` when there is none.
    pub(crate) fn open_if_there(path: &Path) -> Result<Option<Self>, LogError> {
        let file = Self::open_when_there(path)?;
        Ok(file.is_there().then_some(file))
    }

    /// Whether there was a file when it was last looked for.
    pub(crate) const fn is_there(&self) -> bool {
        !matches!(self.source, Source::None)
    }

    /// Opens a file now or, when there is none, as soon as there is one; until then it is read as an empty one.
    pub(crate) fn open_when_there(path: &Path) -> Result<Self, LogError> {
        Ok(Self { source: Source::open(path)?, path: path.to_owned(), buffer: BytesMut::new() })
    }

    /// The length in bytes at this moment; of a compressed file, that of its text.
    pub(crate) fn len(&self) -> Result<u64, LogError> {
        match &self.source {
            Source::None => Ok(0),
            Source::Plain(file) => Ok(file.metadata().map_err(LogError::io("looking at", &self.path))?.len()),
            Source::Compressed(file) => Ok(file.len()),
        }
    }

    /// Whether the file is compressed: nothing is appended to it any more.
    pub(crate) const fn is_compressed(&self) -> bool {
        matches!(self.source, Source::Compressed(_))
    }

    /// Whether the file is compressed and its table is not the one that was written.
    pub(crate) fn is_damaged(&self) -> bool {
        matches!(&self.source, Source::Compressed(file) if !file.is_sound())
    }

    /// Whether a writer that lives has the file locked.
    pub(crate) fn is_locked(&self) -> Result<bool, LogError> {
        if self.try_lock(FlockOperation::NonBlockingLockShared)? {
            self.lock(FlockOperation::Unlock)?;
            return Ok(false);
        }
        Ok(self.source.file().is_some())
    }

    /// Takes the lock by which others see that somebody writes the file, until it is closed; false if somebody else
    /// has it.
    pub(crate) fn try_lock_alone(&self) -> Result<bool, LogError> {
        self.try_lock(FlockOperation::NonBlockingLockExclusive)
    }

    fn try_lock(&self, operation: FlockOperation) -> Result<bool, LogError> {
        match self.lock(operation) {
            Err(LogError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(false),
            locked => locked,
        }
    }

    fn lock(&self, operation: FlockOperation) -> Result<bool, LogError> {
        let Some(file) = self.source.file() else { return Ok(false) };
        match flock(file, operation) {
            Ok(()) => Ok(true),
            Err(errno) => Err(LogError::io("locking", &self.path)(errno.into())),
        }
    }

    /// Opens the file that is at the path now, if the one that is open was deleted and another is there. Gives whether
    /// that is so.
    pub(crate) fn follow_name(&mut self) -> Result<bool, LogError> {
        let is_deleted = |file: &File| file.metadata().is_ok_and(|file| file.nlink() == 0);
        if !self.source.file().is_some_and(is_deleted) {
            return Ok(false);
        }
        let other = Source::open(&self.path)?;
        let is_there = !matches!(other, Source::None);
        if is_there {
            self.source = other;
        }
        Ok(is_there)
    }

    /// Reads up to `length` bytes from `offset` on.
    pub(crate) fn read(&mut self, offset: u64, length: usize, io: Io) -> Result<Fetched, LogError> {
        if matches!(self.source, Source::None) {
            if io == Io::CachedOnly {
                return Ok(Fetched::WouldBlock);
            }
            self.source = Source::open(&self.path)?;
        }
        let file = match &mut self.source {
            Source::None => return Ok(Fetched::Bytes(Bytes::new())),
            Source::Compressed(file) => return file.read(offset, length, io),
            Source::Plain(file) => file,
        };
        self.buffer.clear();
        self.buffer.resize(length, 0);
        let mut filled = 0;
        while filled < length {
            let at = offset + filled as u64;
            let read = match io {
                Io::CachedOnly => read_cached(file, at, &mut self.buffer[filled..]),
                Io::MayBlock => file.read_at(&mut self.buffer[filled..], at),
            };
            match read {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if filled > 0 {
                        break;
                    }
                    return Ok(Fetched::WouldBlock);
                }
                Err(error) => return Err(LogError::io("reading", &self.path)(error)),
            }
        }
        self.buffer.truncate(filled);
        Ok(Fetched::Bytes(self.buffer.split().freeze()))
    }
}

fn read_cached(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    match rustix::io::preadv2(file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT) {
        // A file system that can't tell what is cached is read as it is.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.read_at(buffer, offset),
        read => Ok(read?),
    }
}

/// How many `\n` there are.
pub(crate) fn count_lines(bytes: &[u8]) -> u64 {
    memchr_iter(b'\n', bytes).count() as u64
}

/// Where the last line that is complete ends: the number of bytes up to and with the last `\n`.
pub(crate) fn whole_lines(bytes: &[u8]) -> usize {
    memrchr(b'\n', bytes).map_or(0, |last| last + 1)
}

/// Where line number `count`, counted from 1, ends: the number of bytes up to and with its `\n`. If there are fewer
/// lines, how many there are.
pub(crate) fn end_of_line(bytes: &[u8], count: u64) -> Result<usize, u64> {
    if count == 0 {
        return Ok(0);
    }
    let index = usize::try_from(count - 1).unwrap_or(usize::MAX);
    let mut ends = memchr_iter(b'\n', bytes);
    match ends.nth(index) {
        Some(end) => Ok(end + 1),
        None => Err(count_lines(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_their_ends() {
        let text = b"a\n\nbcd\ne";
        assert_eq!(count_lines(text), 3);
        assert_eq!(whole_lines(text), 7);
        assert_eq!(end_of_line(text, 0), Ok(0));
        assert_eq!(end_of_line(text, 2), Ok(3));
        assert_eq!(end_of_line(text, 4), Err(3));
    }

    #[test]
    fn a_positioned_read_stops_at_the_end_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let mut file = AppendFile::create(path.clone()).unwrap();
        file.append(b"0123456789").unwrap();
        let mut reader = ReadFile::open_if_there(&path).unwrap().unwrap();
        for io in [Io::CachedOnly, Io::MayBlock] {
            let Fetched::Bytes(bytes) = reader.read(4, 100, io).unwrap() else { panic!("not cached") };
            assert_eq!(bytes, "456789");
        }
        file.cut(3).unwrap();
        file.append(b"x").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"012x");
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
