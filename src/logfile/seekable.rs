//! Reading a compressed file by position in its text.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use memchr::memchr;
use zstd_safe::{DCtx, compress_bound, find_frame_compressed_size, get_frame_content_size};

use super::frames::{FRAME_BYTES, SKIPPED_HEADER, Table};
use super::{Fetched, Io, Sound};
use crate::error::LogError;

/// A compressed file: its table, and the frame that was read last.
///
/// A read takes the frames that it touches apart and no others. The last one is kept, so reads that follow each other
/// take each frame apart once; memory is one frame, and 20 bytes of table for every frame of the file.
pub(crate) struct Seekable {
    file: File,
    path: PathBuf,
    table: Arc<Table>,
    /// Whether the table is the one that was written.
    sound: bool,
    held: Option<(u32, Bytes)>,
    context: Option<DCtx<'static>>,
}

impl fmt::Debug for Seekable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seekable").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Seekable {
    /// Reads the table of an open file. If that is damaged, the frames are looked for one after the other, up to the
    /// first that is damaged too.
    ///
    /// # Errors
    ///
    /// What the disk said.
    pub(crate) fn open(file: File, path: &Path) -> Result<Self, LogError> {
        let read = || -> io::Result<(Table, bool)> {
            let length = file.metadata()?.len();
            Ok(match read_table(&file, length)? {
                Some(table) => (table, true),
                None => (find_frames(&file, length)?, false),
            })
        };
        let (table, sound) = read().map_err(LogError::io("reading", path))?;
        if !sound {
            tracing::error!(path = %path.display(), bytes = table.len(), "the table of a compressed file is damaged; its frames were looked for");
        }
        let table = Arc::new(table);
        Ok(Self { file, path: path.to_owned(), table, sound, held: None, context: None })
    }

    #[cfg(test)]
    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Whether the table is the one that was written.
    pub(crate) const fn is_sound(&self) -> bool {
        self.sound
    }

    /// The bytes of text.
    pub(crate) fn len(&self) -> u64 {
        self.table.len()
    }

    /// Reads up to `length` bytes of text from `offset` on. A frame that is not held counts as one for which a disk
    /// has to be waited for: to take it apart costs some hundred microseconds, too long for a thread that serves
    /// others meanwhile.
    pub(crate) fn read(&mut self, offset: u64, length: usize, io: Io) -> Result<Fetched, LogError> {
        let table = Arc::clone(&self.table);
        let end = table.len().min(offset.saturating_add(length as u64));
        if offset >= end {
            return Ok(Fetched::Bytes(Bytes::new()));
        }
        let first = table.frame_of(offset);
        if io == Io::CachedOnly && self.held.as_ref().is_none_or(|(held, _)| *held != first) {
            return Ok(Fetched::WouldBlock);
        }
        let Some(text) = self.hold(first)? else {
            return Ok(Fetched::Damaged(self.behind(first)?));
        };
        let bounds = table.text(first);
        let part =
            text.slice((offset - bounds.start) as usize..(end.min(bounds.end) - bounds.start) as usize);
        if end <= bounds.end || io == Io::CachedOnly {
            return Ok(Fetched::Bytes(part));
        }
        let mut gathered = BytesMut::with_capacity((end - offset) as usize);
        gathered.extend_from_slice(&part);
        for frame in first + 1..=table.frame_of(end - 1) {
            let Some(text) = self.hold(frame)? else { break };
            let bounds = table.text(frame);
            gathered.extend_from_slice(&text[..(end.min(bounds.end) - bounds.start) as usize]);
        }
        Ok(Fetched::Bytes(gathered.freeze()))
    }

    /// The text of a frame; `None` if the frame is damaged.
    fn hold(&mut self, frame: u32) -> Result<Option<Bytes>, LogError> {
        if let Some((held, text)) = &self.held
            && *held == frame
        {
            return Ok(Some(text.clone()));
        }
        let (stored, bounds) = (self.table.stored(frame), self.table.text(frame));
        let mut bytes = vec![0; (stored.end - stored.start) as usize];
        match self.file.read_exact_at(&mut bytes, stored.start) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(LogError::io("reading", &self.path)(error)),
        }
        let context = self.context.get_or_insert_with(DCtx::create);
        let text = take_apart(context, &bytes, (bounds.end - bounds.start) as usize);
        if text.is_none() {
            tracing::error!(path = %self.path.display(), at = stored.start, "a frame of a compressed file is damaged");
        }
        self.held = text.clone().map(|text| (frame, text));
        Ok(text)
    }

    /// Where the first line begins behind a frame that is damaged.
    fn behind(&mut self, damaged: u32) -> Result<Sound, LogError> {
        let table = Arc::clone(&self.table);
        let mut lost = damaged;
        while table.ends_within_a_line(lost) && lost + 1 < table.frames() {
            let next = lost + 1;
            let bounds = table.text(next);
            if let Some(text) = self.hold(next)?
                && let Some(end) = memchr(b'\n', &text)
            {
                return Ok(Sound {
                    offset: bounds.start + end as u64 + 1,
                    lines: table.lines_up_to(lost) + 1,
                });
            }
            lost = next;
        }
        Ok(Sound { offset: table.text(lost).end, lines: table.lines_up_to(lost) })
    }
}

/// The text of a whole frame, if it has so many bytes and its checksum is right.
pub(super) fn take_apart(context: &mut DCtx<'_>, frame: &[u8], length: usize) -> Option<Bytes> {
    let mut text = Vec::with_capacity(length);
    // Without a checksum a flipped bit could give another text.
    let has_checksum = frame.get(4).is_some_and(|descriptor| descriptor & 0b100 != 0);
    context.decompress(&mut text, frame).ok().filter(|_| has_checksum && text.len() == length)?;
    Some(text.into())
}

fn read_table(file: &File, length: u64) -> io::Result<Option<Table>> {
    let mut footer = [0; 9];
    let Some(at) = length.checked_sub(footer.len() as u64) else { return Ok(None) };
    file.read_exact_at(&mut footer, at)?;
    let Some(before) = Table::encoded_len(footer).and_then(|encoded| length.checked_sub(encoded)) else {
        return Ok(None);
    };
    let mut bytes = vec![0; (length - before) as usize];
    file.read_exact_at(&mut bytes, before)?;
    Ok(Table::decode(&bytes, before))
}

/// Finds the frames of a file whose table is damaged, up to the first that is none.
fn find_frames(file: &File, length: u64) -> io::Result<Table> {
    let mut table = Table::new();
    let mut context = DCtx::create();
    let mut buffer = vec![0; compress_bound(FRAME_BYTES) + SKIPPED_HEADER];
    let mut at = 0;
    while at < length {
        let wanted = buffer.len().min((length - at) as usize);
        file.read_exact_at(&mut buffer[..wanted], at)?;
        let (Ok(stored), Ok(Some(text))) =
            (find_frame_compressed_size(&buffer[..wanted]), get_frame_content_size(&buffer[..wanted]))
        else {
            break;
        };
        // A frame that is skipped is as if it had no text; behind the last one nothing is left to find.
        if text == 0 || text > FRAME_BYTES as u64 {
            break;
        }
        let Some(text) = take_apart(&mut context, &buffer[..stored], text as usize) else { break };
        table.push(stored, &text).map_err(io::Error::other)?;
        at += stored as u64;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use proptest::prelude::*;

    use super::super::{compress, count_lines};
    use super::*;

    /// A compressed file with this text in it.
    fn compressed(text: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (plain, path) = (folder.path().join("x"), folder.path().join("x.zst"));
        std::fs::write(&plain, text).unwrap();
        let out = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        let length = compress(&File::open(plain).unwrap(), &out, &path, &|| true).unwrap();
        assert_eq!(length, text.len() as u64);
        (folder, path)
    }

    fn open(path: &Path) -> Seekable {
        Seekable::open(File::open(path).unwrap(), path).unwrap()
    }

    /// Lines of all lengths, so that frames end at lines and within them.
    fn text(seed: u64, bytes: usize) -> Vec<u8> {
        let (mut state, mut text) = (seed, Vec::new());
        while text.len() < bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let length = match state >> 60 {
                0 => 1 << (state >> 40 & 0xf),
                1 => (state >> 30 & 0xf_ffff) as usize,
                _ => (state >> 50 & 0x7f) as usize,
            };
            text.extend((0..length).map(|at| b'a' + ((state >> (at % 48)) % 26) as u8));
            text.push(b'\n');
        }
        text.truncate(bytes);
        text
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_part_of_the_text_is_read_as_it_was(
            seed: u64, bytes in 0..2_000_000usize, parts in prop::collection::vec((0..2_100_000u64, 0..700_000usize), 20),
        ) {
            let text = text(seed, bytes);
            let (_folder, path) = compressed(&text);
            let mut file = open(&path);
            prop_assert!(file.is_sound());
            prop_assert_eq!(file.len(), text.len() as u64);
            for (offset, length) in parts {
                let Fetched::Bytes(found) = file.read(offset, length, Io::MayBlock).unwrap() else {
                    return Err(TestCaseError::fail("damaged"));
                };
                let from = text.len().min(offset as usize);
                prop_assert_eq!(&found[..], &text[from..text.len().min(from + length)]);
            }
        }

        #[test]
        fn frames_end_where_lines_do_and_are_no_larger_than_they_may_be(seed: u64, bytes in 1..2_000_000usize) {
            let text = text(seed, bytes);
            let (_folder, path) = compressed(&text);
            let table = open(&path).table;
            let mut at = 0;
            for frame in 0..table.frames() {
                let bounds = table.text(frame);
                prop_assert_eq!(bounds.start, at);
                let part = &text[bounds.start as usize..bounds.end as usize];
                prop_assert!(!part.is_empty() && part.len() <= FRAME_BYTES);
                let whole = bounds.end == text.len() as u64 || part.last() == Some(&b'\n');
                prop_assert!(whole || !part.contains(&b'\n'), "cut within a line that had room");
                prop_assert_eq!(table.lines_up_to(frame), count_lines(&text[..bounds.end as usize]));
                at = bounds.end;
            }
            prop_assert_eq!(at, text.len() as u64);
        }

        #[test]
        fn a_flipped_bit_is_never_another_text(seed: u64, flips in prop::collection::vec(any::<prop::sample::Index>(), 12)) {
            let text = text(seed, 900_000);
            let (_folder, path) = compressed(&text);
            let sound = std::fs::read(&path).unwrap();
            // The bytes behind the frames are few, and every one of them matters.
            let behind = (sound.len() - 200..sound.len()).flat_map(|at| [at * 8, at * 8 + 7]).step_by(9);
            for bit in flips.iter().map(|flip| flip.index(sound.len() * 8)).chain(behind) {
                let mut flipped = sound.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                std::fs::write(&path, &flipped).unwrap();
                let mut file = open(&path);
                let (mut offset, mut lost) = (0, 0);
                while offset < text.len() as u64 {
                    match file.read(offset, 100_000, Io::MayBlock).unwrap() {
                        Fetched::Bytes(found) if found.is_empty() => break,
                        Fetched::Bytes(found) => {
                            prop_assert_eq!(&found[..], &text[offset as usize..offset as usize + found.len()]);
                            offset += found.len() as u64;
                        }
                        Fetched::Damaged(sound) => {
                            prop_assert!(sound.offset > offset);
                            let before = &text[..sound.offset as usize];
                            prop_assert_eq!(sound.lines, count_lines(before));
                            prop_assert!(before.len() == text.len() || before.ends_with(b"\n"));
                            (offset, lost) = (sound.offset, lost + 1);
                        }
                        Fetched::WouldBlock => prop_assert!(false, "it may block"),
                    }
                }
                prop_assert!(lost <= 1, "one bit, one frame");
                prop_assert_eq!(offset, text.len() as u64, "what is behind the damage is read");
            }
        }
    }

    #[test]
    fn a_read_takes_apart_only_what_it_touches_and_that_once() {
        let text = text(7, 3_000_000);
        let (_folder, path) = compressed(&text);
        let mut file = open(&path);
        assert!(matches!(file.read(1_000_000, 10, Io::CachedOnly), Ok(Fetched::WouldBlock)));
        assert!(matches!(file.read(1_000_000, 10, Io::MayBlock), Ok(Fetched::Bytes(_))));
        let (frame, held) = file.held.clone().unwrap();
        let bounds = file.table.text(frame);
        // From here on the frame can't be had again.
        std::fs::write(&path, b"").unwrap();
        for offset in [bounds.start, 1_000_000, bounds.end - 1] {
            for io in [Io::CachedOnly, Io::MayBlock] {
                let length = (bounds.end - offset) as usize;
                let Ok(Fetched::Bytes(found)) = file.read(offset, length, io) else { panic!("not held") };
                let at = (offset - bounds.start) as usize;
                assert_eq!(found.as_ptr(), held[at..].as_ptr(), "not copied either");
            }
        }
        assert!(matches!(file.read(bounds.end, 1, Io::MayBlock), Ok(Fetched::Damaged(_))));
    }

    #[test]
    fn what_is_no_such_file_has_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.zst");
        for bytes in [&b""[..], b"\0", b"plain text\n", &[0; 4096]] {
            std::fs::write(&path, bytes).unwrap();
            let mut file = open(&path);
            assert!(!file.is_sound());
            assert_eq!(file.len(), 0);
            assert!(matches!(file.read(0, 10, Io::MayBlock), Ok(Fetched::Bytes(bytes)) if bytes.is_empty()));
        }
    }
}
