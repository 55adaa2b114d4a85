//! The bytes behind the frames of a compressed file: where each frame is, and how many lines end in it.
//!
//! The file is in the zstd seekable format: frames that each stand for themselves, and at the end a table of their
//! sizes, in a frame that every decompressor skips. Before that table stands a skipped frame of our own, the notes:
//! what keeps the numbers of lines right when a frame is damaged, and a checksum of the table, which has none.
//! `migrations-docs/0001-format-v1.md` has the byte tables.

use zeekstd::seek_table::SeekTable;
use zeekstd::{BytesWrapper, SEEK_TABLE_INTEGRITY_SIZE, SEEKABLE_MAGIC_NUMBER};

/// The most bytes of text in a frame.
pub(crate) const FRAME_BYTES: usize = 256 * 1024;

/// The first bytes of a frame that is skipped: one of sixteen numbers for that. The seek table has another.
const NOTES_MAGIC: u32 = 0x184D_2A5B;
const NOTES_NAME: [u8; 4] = *b"DBLZ";
const NOTES_VERSION: u32 = 1;
/// Magic number and length of a skipped frame.
pub(super) const SKIPPED_HEADER: usize = 8;
/// Name, version and length of the text.
const NOTES_HEAD: usize = 16;
const CHECKSUM: usize = 4;
/// A frame's two sizes in the seek table.
const TABLE_ENTRY: usize = 8;

/// Where every frame of a file is, and how many lines end in it.
#[derive(Debug)]
pub(crate) struct Table {
    seek: SeekTable,
    /// For each frame, twice the number of its `\n`, and one more if it ends within a line.
    notes: Vec<u32>,
    length: u64,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { seek: SeekTable::new(), notes: Vec::new(), length: 0 }
    }

    /// Adds a frame of so many bytes, in which this text is.
    pub(super) fn push(&mut self, compressed: usize, text: &[u8]) -> Result<(), String> {
        let too_large = |_| "a frame is too large for its table".to_owned();
        let (stored, length) = (u32::try_from(compressed), u32::try_from(text.len()));
        let (stored, length) = (stored.map_err(too_large)?, length.map_err(too_large)?);
        self.seek.log_frame(stored, length).map_err(|error| error.to_string())?;
        let lines = super::count_lines(text) as u32;
        self.notes.push(lines * 2 + u32::from(text.last().is_some_and(|&last| last != b'\n')));
        self.length += u64::from(length);
        Ok(())
    }

    /// The bytes of text in the file.
    pub(crate) const fn len(&self) -> u64 {
        self.length
    }

    /// How many frames there are.
    pub(crate) fn frames(&self) -> u32 {
        self.notes.len() as u32
    }

    /// The frame in which a byte of the text is; there has to be one.
    pub(super) fn frame_of(&self, offset: u64) -> u32 {
        self.seek.frame_index_decomp(offset).min(self.frames().saturating_sub(1))
    }

    /// Which bytes of the file a frame is.
    pub(super) fn stored(&self, frame: u32) -> std::ops::Range<u64> {
        let start = self.seek.frame_start_comp(frame).unwrap_or_default();
        start..self.seek.frame_end_comp(frame).unwrap_or(start)
    }

    /// Which bytes of the text are in a frame.
    pub(super) fn text(&self, frame: u32) -> std::ops::Range<u64> {
        let start = self.seek.frame_start_decomp(frame).unwrap_or_default();
        start..self.seek.frame_end_decomp(frame).unwrap_or(start)
    }

    /// How many lines end in the text before the end of a frame.
    pub(super) fn lines_up_to(&self, frame: u32) -> u64 {
        self.notes.iter().take(frame as usize + 1).map(|note| u64::from(note / 2)).sum()
    }

    /// Whether a frame ends within a line.
    pub(super) fn ends_within_a_line(&self, frame: u32) -> bool {
        self.notes.get(frame as usize).is_some_and(|note| note % 2 == 1)
    }

    /// The bytes that stand behind the frames.
    pub(super) fn encode(mut self) -> Result<Vec<u8>, String> {
        let content = NOTES_HEAD + self.notes.len() * 4 + CHECKSUM;
        let large = || "there are too many frames for one file".to_owned();
        let stored = u32::try_from(SKIPPED_HEADER + content).map_err(|_| large())?;
        self.seek.log_frame(stored, 0).map_err(|error| error.to_string())?;
        let mut serializer = self.seek.into_serializer();
        let mut table = vec![0; serializer.encoded_len()];
        serializer.write_into(&mut table);
        let mut bytes = Vec::with_capacity(SKIPPED_HEADER + content + table.len());
        bytes.extend_from_slice(&NOTES_MAGIC.to_le_bytes());
        bytes.extend_from_slice(&(content as u32).to_le_bytes());
        bytes.extend_from_slice(&NOTES_NAME);
        bytes.extend_from_slice(&NOTES_VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.length.to_le_bytes());
        self.notes.iter().for_each(|note| bytes.extend_from_slice(&note.to_le_bytes()));
        let sum = checksum(&table, &bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes.append(&mut table);
        Ok(bytes)
    }

    /// How many bytes at the end of a file are notes and table, by its last nine bytes; `None` if they are not what a
    /// table ends with.
    pub(super) fn encoded_len(footer: [u8; SEEK_TABLE_INTEGRITY_SIZE]) -> Option<u64> {
        let frames = u32::from_le_bytes([footer[0], footer[1], footer[2], footer[3]]);
        let magic = u32::from_le_bytes([footer[5], footer[6], footer[7], footer[8]]);
        // One entry is that of the notes.
        let noted = u64::from(frames.checked_sub(1)?);
        let table = SKIPPED_HEADER as u64 + (noted + 1) * TABLE_ENTRY as u64 + footer.len() as u64;
        let notes = (SKIPPED_HEADER + NOTES_HEAD + CHECKSUM) as u64 + noted * 4;
        (magic == SEEKABLE_MAGIC_NUMBER && footer[4] == 0).then_some(notes + table)
    }

    /// Reads what [`encode`](Self::encode) gave; `None` if one bit of it is another, or if it does not lie behind as
    /// many bytes as its frames have.
    pub(super) fn decode(bytes: &[u8], before: u64) -> Option<Self> {
        let content = bytes.get(4..SKIPPED_HEADER)?.try_into().map(u32::from_le_bytes).ok()?;
        let (notes, table) = bytes.split_at_checked(SKIPPED_HEADER + content as usize)?;
        let (notes, sum) = notes.split_at_checked(notes.len().checked_sub(CHECKSUM)?)?;
        if sum != checksum(table, notes).to_le_bytes() {
            return None;
        }
        let head = notes.get(..SKIPPED_HEADER + NOTES_HEAD)?;
        let version = NOTES_VERSION.to_le_bytes();
        if head[..4] != NOTES_MAGIC.to_le_bytes() || head[8..12] != NOTES_NAME || head[12..16] != version {
            return None;
        }
        let length = head[16..].try_into().map(u64::from_le_bytes).ok()?;
        let notes: Vec<u32> = notes[head.len()..]
            .chunks_exact(4)
            .map(|note| u32::from_le_bytes([note[0], note[1], note[2], note[3]]))
            .collect();
        let seek = SeekTable::from_seekable(&mut BytesWrapper::new(table)).ok()?;
        let found = Self { seek, notes, length };
        let frames = found.frames();
        let fits = found.seek.num_frames() == frames + 1
            && found.seek.frame_start_comp(frames).ok()? == before
            && found.seek.size_decomp() == length
            && found.seek.max_frame_size_decomp() <= FRAME_BYTES as u64;
        fits.then_some(found)
    }
}

/// The notes are covered too.
fn checksum(table: &[u8], notes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(table);
    crc.update(notes);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new();
        table.push(20, b"a\nb\n").unwrap();
        table.push(10, b"within a li").unwrap();
        table.push(11, b"ne\n").unwrap();
        table
    }

    #[test]
    fn golden_bytes_of_a_table() {
        let hex: String = table().encode().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
    }

    /// The format is what is on disks already: these bytes never change.
    const GOLDEN: &str = "5b2a4d182000000044424c5a01000000120000000000000004000000010000000200\
        00008b5da58c5e2a4d182900000014000000040000000a0000000b0000000b0000000300000028000000000000000400000000b1ea\
        928f";

    #[test]
    fn a_table_survives_its_bytes() {
        let bytes = table().encode().unwrap();
        let footer = bytes[bytes.len() - 9..].try_into().unwrap();
        assert_eq!(Table::encoded_len(footer), Some(bytes.len() as u64));
        let found = Table::decode(&bytes, 41).unwrap();
        assert_eq!((found.len(), found.frames()), (18, 3));
        assert_eq!([0, 3, 4, 14, 15, 17].map(|at| found.frame_of(at)), [0, 0, 1, 1, 2, 2]);
        assert_eq!((found.stored(1), found.text(2)), (20..30, 15..18));
        assert_eq!([0, 1, 2].map(|frame| found.lines_up_to(frame)), [2, 2, 3]);
        assert_eq!([0, 1, 2].map(|frame| found.ends_within_a_line(frame)), [false, true, false]);
        let none = Table::new().encode().unwrap();
        assert_eq!(Table::decode(&none, 0).unwrap().len(), 0);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = table().encode().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Table::decode(&flipped, 41).is_none(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Table::decode(&bytes[..length], 41).is_none());
        }
        assert!(Table::decode(&bytes, 42).is_none(), "behind more than its frames");
    }
}
