//! Opening an index only to look at it: whatever the database writes when it is opened, or mends, stays in memory, and the
//! file is as it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

use crate::error::LogError;
use crate::index::database::open_by;
use crate::index::handle::Index;

/// Bytes that are kept together.
const BLOCK: u64 = 4096;

impl Index {
    /// Opens an index without changing its file; `None` if there is none. What is written to it is gone when it is let go of.
    /// The caller has its lock.
    ///
    /// # Errors
    ///
    /// [`LogError::Index`] if it can't be used, or what the disk said.
    pub(crate) fn open_to_look(path: PathBuf) -> Result<Option<Self>, LogError> {
        let opened = open_by(&path, |builder| builder.create_with_backend(Unchanged::open(&path)?))?;
        Ok(opened.map(|database| Self::of(path, database, None)))
    }
}

/// A file that is read, and what was written over it.
#[derive(Debug)]
struct Unchanged {
    file: File,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    /// How long the whole is.
    length: u64,
    /// How much of the file still counts; behind that there are zeros.
    of_file: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl Unchanged {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let written = Written { length, of_file: length, blocks: BTreeMap::new() };
        Ok(Self { file, written: Mutex::new(written) })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_file(&self, of_file: u64, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let there = usize::try_from(of_file.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let (there, behind) = out.split_at_mut(there);
        behind.fill(0);
        self.file.read_exact_at(there, offset)
    }
}

/// Where a block and a part of the whole meet: the part of the block, and where that is in the other.
fn overlap(block: u64, offset: u64, length: usize) -> (std::ops::Range<usize>, usize) {
    let begin = block * BLOCK;
    let from = begin.max(offset);
    let until = (begin + BLOCK).min(offset + length as u64);
    let within = |at: u64| usize::try_from(at - begin).unwrap_or_default();
    (within(from)..within(until), usize::try_from(from - offset).unwrap_or_default())
}

impl StorageBackend for Unchanged {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written();
        let end = offset.checked_add(out.len() as u64).filter(|&end| end <= written.length);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.read_file(written.of_file, offset, out)?;
        for (&block, bytes) in written.blocks.range(offset / BLOCK..end.div_ceil(BLOCK)) {
            let (part, at) = overlap(block, offset, out.len());
            out[at..at + part.len()].copy_from_slice(&bytes[part]);
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut written = self.written();
        if length < written.length {
            written.of_file = written.of_file.min(length);
            drop(written.blocks.split_off(&length.div_ceil(BLOCK)));
            if let Some(last) = written.blocks.get_mut(&(length / BLOCK)) {
                last[usize::try_from(length % BLOCK).unwrap_or_default()..].fill(0);
            }
        }
        written.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = &mut *self.written();
        let end = offset.checked_add(data.len() as u64).filter(|&end| end <= written.length);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let (part, at) = overlap(block, offset, data.len());
            if !written.blocks.contains_key(&block) {
                let mut before = vec![0; BLOCK as usize].into_boxed_slice();
                self.read_file(written.of_file, block * BLOCK, &mut before)?;
                written.blocks.insert(block, before);
            }
            if let Some(bytes) = written.blocks.get_mut(&block) {
                let length = part.len();
                bytes[part].copy_from_slice(&data[at..at + length]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Act {
        Write(u64, Vec<u8>),
        SetLen(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        let bytes = proptest::collection::vec(1u8.., 1..9_000);
        prop_oneof![
            (0..30_000u64, bytes).prop_map(|(at, bytes)| Act::Write(at, bytes)),
            (0..30_000u64).prop_map(Act::SetLen),
        ]
    }

    proptest! {
        /// It reads as a file would that was written to, and the file is as it was.
        #[test]
        fn what_is_written_is_read_and_the_file_stays(
            before in proptest::collection::vec(1u8.., 0..20_000),
            acts in proptest::collection::vec(act(), 0..12),
            from in 0..30_000usize,
            length in 0..9_000usize,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            std::fs::write(&path, &before).unwrap();
            let (looked_at, mut model) = (Unchanged::open(&path).unwrap(), before.clone());
            for act in acts {
                match act {
                    Act::Write(at, bytes) => {
                        let range = usize::try_from(at).unwrap()..usize::try_from(at).unwrap() + bytes.len();
                        let fits = range.end <= model.len();
                        prop_assert_eq!(looked_at.write(at, &bytes).is_ok(), fits);
                        if fits {
                            model[range].copy_from_slice(&bytes);
                        }
                    }
                    Act::SetLen(length) => {
                        looked_at.set_len(length).unwrap();
                        model.resize(usize::try_from(length).unwrap(), 0);
                    }
                }
            }
            prop_assert_eq!(looked_at.len().unwrap(), model.len() as u64);
            let mut read = vec![9; model.len()];
            looked_at.read(0, &mut read).unwrap();
            prop_assert_eq!(&read, &model);
            let mut part = vec![9; length];
            let expected = model.get(from..from + length);
            prop_assert_eq!(looked_at.read(from as u64, &mut part).is_ok(), expected.is_some());
            prop_assert!(expected.is_none_or(|expected| expected == part));
            prop_assert_eq!(std::fs::read(&path).unwrap(), before);
        }
    }
}
