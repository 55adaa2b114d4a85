//! How much of the disk is left to others: below a floor of free space, nothing more is taken for logs.

use crate::line::UnixMicros;
use crate::logfile::AppendFile;

/// How long what was seen of the free space holds, in microseconds.
const CHECK_MICROS: u64 = 100_000;
/// After so many bytes it is looked at again at once.
const CHECK_BYTES: u64 = 4 * 1024 * 1024;

/// Free space as it was seen last.
#[derive(Debug)]
pub(crate) struct Floor {
    min_free_bytes: u64,
    seen_at: Option<UnixMicros>,
    bytes_since: u64,
    below: bool,
}

impl Floor {
    /// 0 bytes: there is no floor.
    pub(crate) const fn new(min_free_bytes: u64) -> Self {
        Self { min_free_bytes, seen_at: None, bytes_since: 0, below: false }
    }

    /// Room was made: what was seen before does not hold any more.
    pub(crate) const fn look_again(&mut self) {
        self.seen_at = None;
    }

    /// Whether nothing may be appended to a file now; `bytes` is how many there are to append.
    pub(crate) fn is_reached(&mut self, file: &AppendFile, bytes: usize, now: UnixMicros) -> bool {
        if self.min_free_bytes == 0 {
            return false;
        }
        self.bytes_since += bytes as u64;
        // A clock that goes back makes what was seen old too.
        let holds = self.seen_at.is_some_and(|at| now >= at && now.0 - at.0 < CHECK_MICROS);
        if !holds || self.bytes_since >= CHECK_BYTES {
            (self.seen_at, self.bytes_since) = (Some(now), 0);
            // A disk that can't be asked is not known to be full.
            self.below = file.disk().is_ok_and(|disk| disk.free < disk.floor(self.min_free_bytes));
        }
        self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_looked_at_now_and_then_and_not_at_every_append() {
        let folder = tempfile::tempdir().unwrap();
        let file = AppendFile::create(folder.path().join("x")).unwrap();
        assert!(!Floor::new(0).is_reached(&file, 1, UnixMicros(0)), "no floor, no limit");
        let mut floor = Floor::new(1);
        assert!(!floor.is_reached(&file, 1, UnixMicros(1_000_000)), "a byte is free");
        floor.below = true;
        assert!(floor.is_reached(&file, 1, UnixMicros(1_000_000 + CHECK_MICROS - 1)), "still holds");
        assert!(!floor.is_reached(&file, 1, UnixMicros(1_000_000 + CHECK_MICROS)), "time has passed");
        floor.below = true;
        assert!(!floor.is_reached(&file, 4 * 1024 * 1024, UnixMicros(1_100_001)), "much was written");
        floor.below = true;
        assert!(!floor.is_reached(&file, 1, UnixMicros(5)), "the clock went back");
    }
}
