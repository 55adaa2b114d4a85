//! Compressing a file, frame by frame, and looking whether what was written is what was read.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use memchr::memrchr;
use rustix::fs::{Advice, fadvise};
use zstd_safe::{CCtx, CParameter, compress_bound, get_error_name};

use super::frames::{FRAME_BYTES, Table};
use super::seekable::Seekable;
use super::{Fetched, Io};

/// Measured on build logs in frames of 256 KiB; see `benches/README.md`.
const LEVEL: i32 = 3;
/// How much of a file is read before the system is told that its pages are not needed again.
const LET_GO_BYTES: u64 = 8 * 1024 * 1024;

/// Writes the text of `plain` to `out` as frames, each ending where a line does unless the line is longer than a
/// frame, and syncs it. `go_on` is asked before every frame. Gives how many bytes of text there were.
///
/// # Errors
///
/// What the system said, or [`io::ErrorKind::Interrupted`] when it should not go on.
pub(crate) fn compress(plain: &File, out: &mut File, go_on: &dyn Fn() -> bool) -> io::Result<u64> {
    let mut context = CCtx::create();
    for parameter in [CParameter::CompressionLevel(LEVEL), CParameter::ChecksumFlag(true)] {
        context.set_parameter(parameter).map_err(zstd_error)?;
    }
    let mut table = Table::new();
    let (mut text, mut frame) = (vec![0; FRAME_BYTES], Vec::with_capacity(compress_bound(FRAME_BYTES)));
    let (mut offset, mut let_go) = (0, LET_GO_BYTES);
    loop {
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let filled = fill(plain, offset, &mut text)?;
        if filled == 0 {
            break;
        }
        // The last lines of a full frame go to the next one, whole.
        let length = match memrchr(b'\n', &text[..filled]) {
            Some(last) if filled == text.len() => last + 1,
            _ => filled,
        };
        frame.clear();
        context.compress2(&mut frame, &text[..length]).map_err(zstd_error)?;
        out.write_all(&frame)?;
        table.push(frame.len(), &text[..length]).map_err(io::Error::other)?;
        offset += length as u64;
        if offset >= let_go {
            forget(plain, offset);
            let_go = offset + LET_GO_BYTES;
        }
    }
    out.write_all(&table.encode().map_err(io::Error::other)?)?;
    out.sync_all()?;
    Ok(offset)
}

/// Whether `compressed` gives exactly the bytes of `plain`, read from the disk as far as the system lets us.
///
/// # Errors
///
/// As [`compress`].
pub(crate) fn is_same(
    plain: &File,
    compressed: File,
    path: &Path,
    go_on: &dyn Fn() -> bool,
) -> io::Result<bool> {
    // What is only in memory has not been on the disk and back.
    forget(&compressed, 0);
    let length = plain.metadata()?.len();
    let mut found = Seekable::open(compressed, path).map_err(io::Error::other)?;
    if !found.is_sound() || found.len() != length {
        return Ok(false);
    }
    let mut text = vec![0; FRAME_BYTES];
    let mut offset = 0;
    while offset < length {
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let filled = fill(plain, offset, &mut text)?;
        let read = found.read(offset, filled, Io::MayBlock).map_err(io::Error::other)?;
        if filled == 0 || !matches!(read, Fetched::Bytes(bytes) if bytes == text[..filled]) {
            return Ok(false);
        }
        offset += filled as u64;
    }
    forget(plain, 0);
    Ok(true)
}

fn fill(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Gives up the pages of a file before `end`, or all of them at 0: others need the memory more.
fn forget(file: &File, end: u64) {
    let _ = fadvise(file, 0, std::num::NonZeroU64::new(end), Advice::DontNeed);
}

fn zstd_error(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}
