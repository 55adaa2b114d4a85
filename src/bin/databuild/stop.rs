//! What ends a viewer from outside: Ctrl-C, and the end of whoever reads its output.

use std::io;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{Code, Failure};

/// Ends this process with 130 on Ctrl-C, even while it waits for whoever reads its output. No run is touched.
///
/// # Errors
///
/// If the signal can't be caught.
pub(crate) fn on_interrupt() -> Result<(), Failure> {
    let cannot = |error| Failure::new(Code::General, format_args!("listening for Ctrl-C: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    tokio::spawn(async move {
        interrupt.recv().await;
        std::process::exit(i32::from(Code::Interrupted as u8));
    });
    Ok(())
}

/// Ends this process quietly when standard output is a pipe and its reader goes away: a follower of a silent run
/// would otherwise learn of it only with the next line.
pub(crate) fn on_closed_output() {
    let is_pipe = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
    if !fstat(io::stdout()).is_ok_and(is_pipe) {
        return;
    }
    std::thread::spawn(|| {
        let stdout = io::stdout();
        // Nothing is asked for: the error of a pipe without a reader is always told.
        let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
        loop {
            match poll(&mut fds, None) {
                Ok(_) if fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) => {
                    std::process::exit(0)
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    });
}
