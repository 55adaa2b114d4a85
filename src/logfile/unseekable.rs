//! Compressed files in a build without the feature `compression`: they are there, and can't be read.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Fetched, Io};
use crate::error::LogError;

/// Never made.
#[derive(Debug)]
pub(crate) enum Seekable {}

impl Seekable {
    /// # Errors
    ///
    /// Always: it can't be read.
    pub(crate) fn open(_: File, path: &Path) -> Result<Self, LogError> {
        let reason = "it is compressed, and this program was built without the feature `compression`";
        Err(LogError::io("reading", path)(io::Error::new(io::ErrorKind::Unsupported, reason)))
    }

    pub(crate) const fn file(&self) -> &File {
        match *self {}
    }

    pub(crate) const fn is_sound(&self) -> bool {
        match *self {}
    }

    pub(crate) const fn len(&self) -> u64 {
        match *self {}
    }

    pub(crate) fn read(&mut self, _: u64, _: usize, _: Io) -> Result<Fetched, LogError> {
        match *self {}
    }
}
