//! Compressing a file, frame by frame, and looking whether what was written is what was read.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memchr::memrchr;
use rustix::fs::{Advice, fadvise};
use zstd_safe::{CCtx, CParameter, DCtx, compress_bound, get_error_name};

use super::frames::{FRAME_BYTES, Table};
use super::seekable::{Seekable, take_apart};

/// Measured on build logs in frames of 256 KiB; see `benches/README.md`.
const LEVEL: i32 = 3;
/// So much text is compressed, synced and read back at a time: the disk has a little to write now and then, and the
/// text is read from it once.
const SEGMENT_BYTES: u64 = 32 * 1024 * 1024;

/// Writes the text of `plain` to `out`, an empty file that can be read too, as frames, each ending where a line does
/// unless the line is longer than a frame. All of it is on the disk then, was read back and compared. `go_on` is asked
/// before every frame. Gives how many bytes of text there were.
///
/// # Errors
///
/// What the system said; [`io::ErrorKind::InvalidData`] if what was read back is not what was written;
/// [`io::ErrorKind::Interrupted`] when it should not go on.
pub(crate) fn compress(
    plain: &File,
    mut out: &File,
    path: &Path,
    go_on: &dyn Fn() -> bool,
) -> io::Result<u64> {
    let mut context = CCtx::create();
    for parameter in [CParameter::CompressionLevel(LEVEL), CParameter::ChecksumFlag(true)] {
        context.set_parameter(parameter).map_err(zstd_error)?;
    }
    let mut table = Table::new();
    let (mut text, mut frame) = (vec![0; FRAME_BYTES], Vec::with_capacity(compress_bound(FRAME_BYTES)));
    let mut segment = 0..0;
    loop {
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let filled = fill(plain, table.len(), &mut text)?;
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
        segment.end = table.frames();
        if table.len() - table.text(segment.start).start >= SEGMENT_BYTES {
            read_back(plain, out, &table, segment.clone(), go_on)?;
            segment.start = segment.end;
        }
    }
    read_back(plain, out, &table, segment, go_on)?;
    let length = table.len();
    out.write_all(&table.encode().map_err(io::Error::other)?)?;
    out.sync_all()?;
    forget(out);
    let found = Seekable::open(out.try_clone()?, path).map_err(io::Error::other)?;
    if found.is_sound() && found.len() == length { Ok(length) } else { Err(another()) }
}

/// Looks whether these frames have the text that they were made of, read from the disk as far as the system lets us.
fn read_back(
    plain: &File,
    out: &File,
    table: &Table,
    frames: Range<u32>,
    go_on: &dyn Fn() -> bool,
) -> io::Result<()> {
    out.sync_data()?;
    // What is only in memory has not been on the disk and back.
    forget(out);
    let mut context = DCtx::create();
    let (mut text, mut stored) = (vec![0; FRAME_BYTES], Vec::new());
    for frame in frames {
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let (bounds, place) = (table.text(frame), table.stored(frame));
        let length = (bounds.end - bounds.start) as usize;
        stored.resize((place.end - place.start) as usize, 0);
        out.read_exact_at(&mut stored, place.start)?;
        let same = fill(plain, bounds.start, &mut text[..length])? == length
            && take_apart(&mut context, &stored, length).is_some_and(|found| found == text[..length]);
        if !same {
            return Err(another());
        }
    }
    // Others need the memory more.
    forget(plain);
    Ok(())
}

fn another() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what was read back is not what was written")
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

/// Gives up the pages of a file that are in memory.
fn forget(file: &File) {
    let _ = fadvise(file, 0, None, Advice::DontNeed);
}

fn zstd_error(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn what_is_read_back_is_compared() {
        let folder = tempfile::tempdir().unwrap();
        let (path, zst) = (folder.path().join("x"), folder.path().join("x.zst"));
        let text: String = (0..100_000).map(|number| format!("line {number}\n")).collect();
        std::fs::write(&path, &text).unwrap();
        let plain = File::open(&path).unwrap();
        let out = OpenOptions::new().read(true).write(true).create_new(true).open(&zst).unwrap();
        assert_eq!(compress(&plain, &out, &zst, &|| true).unwrap(), text.len() as u64);
        let found = Seekable::open(File::open(&zst).unwrap(), &zst).unwrap();
        let table = found.table();
        let all = 0..table.frames();
        assert!(all.end > 1);
        read_back(&plain, &out, table, all.clone(), &|| true).unwrap();
        for file in [&path, &zst] {
            let sound = std::fs::read(file).unwrap();
            let mut other = sound.clone();
            other[3_000] ^= 1;
            std::fs::write(file, other).unwrap();
            let error = read_back(&plain, &out, table, all.clone(), &|| true).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            std::fs::write(file, sound).unwrap();
        }
        let stopped = read_back(&plain, &out, table, all, &|| false).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
    }
}
