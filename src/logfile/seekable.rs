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
fn take_apart(context: &mut DCtx<'_>, frame: &[u8], length: usize) -> Option<Bytes> {
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
