//! A log file: appending to it, reading it by position, and finding lines in what was read.
//!
//! A file of a run that is over may be there compressed. [`ReadFile`] reads either, by the same offsets: those of the
//! text.

mod append;
#[cfg(feature = "compression")]
mod compress;
#[cfg(feature = "compression")]
mod frames;
#[cfg(feature = "compression")]
mod seekable;
#[cfg(not(feature = "compression"))]
#[path = "unseekable.rs"]
mod seekable;

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use memchr::{memchr_iter, memrchr};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, ReadWriteFlags};

use crate::error::LogError;
use crate::layout::{Locked, compressed, file_at, file_id, is_absent, metadata_of, open_regular};
use seekable::Seekable;

pub(crate) use append::{AppendFile, Changed};
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

    /// Whether the file is the one that its path leads to; also if that leads nowhere any more.
    pub(crate) fn is_at_its_path(&self) -> bool {
        let open = self.source.file().and_then(|file| file.metadata().ok());
        open.zip(metadata_of(&self.path).ok()).is_none_or(|(open, there)| file_id(&open) == file_id(&there))
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
        let Some(file) = self.source.file() else { return Ok(false) };
        let lock = |operation| flock(file, operation);
        match lock(FlockOperation::NonBlockingLockShared).and_then(|()| lock(FlockOperation::Unlock)) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(LogError::io("locking", &self.path)(errno.into())),
        }
    }

    /// Takes the lock by which others see that somebody writes the file; `None` if somebody else has it, or there is no
    /// file.
    pub(crate) fn try_lock_alone(&self) -> Result<Option<Locked<&File>>, LogError> {
        let Some(file) = self.source.file() else { return Ok(None) };
        Locked::take(file).map_err(LogError::io("locking", &self.path))
    }

    /// Opens the file that is at the path now, if that is another than the one that is open. Gives whether that is so.
    pub(crate) fn follow_name(&mut self) -> Result<bool, LogError> {
        let identity = |file: &File| file.metadata().ok().map(|found| file_id(&found));
        let Some(open) = self.source.file().map(identity) else { return Ok(false) };
        if file_at(&self.path) == open {
            return Ok(false);
        }
        let other = Source::open(&self.path)?;
        let is_other = other.file().is_some_and(|file| identity(file) != open);
        if is_other {
            self.source = other;
        }
        Ok(is_other)
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
}
