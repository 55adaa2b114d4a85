//! What `benches/compare.py open` needs to measure what opening costs by the size of the index: one as large as that of
//! terabytes of logs, without the logs.

use std::path::Path;

use crate::error::LogError;
use crate::index::progress::{Checkpointer, LineCheckpoint};
use crate::index::{Changes, Index};
use crate::layout::Layout;
use crate::line::{Stream, UnixMicros};

/// Places that are written with one commit.
const AT_ONCE: usize = 1_000_000;

/// Adds so many places of lines to each run in the index of a log folder that nobody has open: as if its logs were
/// that long.
///
/// # Errors
///
/// What the disk or the index said.
pub fn add_places(folder: &Path, places: u64) -> Result<(), LogError> {
    let index = Index::open(Layout::new(folder).index())?;
    let mut lines = Vec::new();
    for number in 1..=index.last_number()? {
        lines.extend((1..=places).map(|place| (number, place_of(place))));
        if lines.len() >= AT_ONCE {
            index.commit(&Changes { lines: std::mem::take(&mut lines), ..Changes::default() })?;
        }
    }
    index.commit(&Changes { lines, ..Changes::default() })?;
    index.close()
}

fn place_of(place: u64) -> LineCheckpoint {
    LineCheckpoint {
        stream: Stream::Stdout,
        line: place * 631,
        offset: place * (Checkpointer::EVERY_BYTES + place % 97),
        time: UnixMicros(1_700_000_000_000_000 + place * 41_113),
    }
}
