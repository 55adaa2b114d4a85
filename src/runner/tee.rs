//! A copy of a job's output, for somebody who watches.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::line::Stream;

/// Where a job's output is copied to while it is recorded.
///
/// The copy is best effort. A destination that is gone (`… | head`) is given up and recording goes on; one that is
/// slow slows the job down, as it would without us.
#[derive(Debug)]
pub struct Tee {
    outputs: [Option<OwnedFd>; 2],
}

impl Tee {
    /// Copies each stream to one of these.
    #[must_use]
    pub const fn new(stdout: OwnedFd, stderr: OwnedFd) -> Self {
        Self { outputs: [Some(stdout), Some(stderr)] }
    }

    /// Copies to this process's own standard output and error.
    ///
    /// # Errors
    ///
    /// When no more files can be opened.
    pub fn to_own_output() -> io::Result<Self> {
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Self::new(stdout, io::stderr().as_fd().try_clone_to_owned()?))
    }

    /// Writes all of these bytes, or gives the destination up.
    pub(super) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let output = &mut self.outputs[stream.index()];
        if let Some(fd) = output
            && let Err(error) = write_all(fd, bytes)
        {
            tracing::debug!(%stream, %error, "output is no longer copied");
            *output = None;
        }
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Somebody who shares the terminal or pipe with us made it non-blocking.
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(fd, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
