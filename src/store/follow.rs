//! Catch up, then wait, then catch up: the one loop behind every read, of a backlog and of a live run alike.

use futures_util::StreamExt;
use futures_util::stream;
use tokio::sync::watch;

use crate::error::LogError;
use crate::logfile::Io;
use crate::store::{ReadEvent, ReadStream};

/// What a reader pulls its events from.
///
/// A source never blocks a writer and holds nothing but its position: what is not pulled stays where it is.
pub(crate) trait Source: Send + 'static {
    /// The next step of the read. With [`Io::CachedOnly`] it answers [`Step::WouldBlock`] rather than wait for a
    /// disk, and leaves the position as it was.
    fn next(&mut self, io: Io) -> Result<Step, LogError>;
}

/// What a source has to give.
#[derive(Debug)]
pub(crate) enum Step {
    /// An event; after a [`ReadEvent::End`] the source is not asked again.
    Event(ReadEvent),
    /// Everything that is there has been given; the signal will say when there may be more.
    CaughtUp,
    /// Ask again with [`Io::MayBlock`].
    WouldBlock,
}

/// Turns a source into a stream. `signal` changes whenever the source may have more to give.
///
/// The signal is marked as seen *before* the source is asked, so a change between the two is never slept through.
pub(crate) fn drive(source: Box<dyn Source>, signal: watch::Receiver<u64>) -> ReadStream {
    stream::unfold(Some((source, signal)), |state| async {
        let (mut source, mut signal) = state?;
        loop {
            signal.borrow_and_update();
            let mut step = source.next(Io::CachedOnly);
            if matches!(step, Ok(Step::WouldBlock)) {
                let reading = tokio::task::spawn_blocking(move || {
                    let step = source.next(Io::MayBlock);
                    (source, step)
                });
                let Ok((back, answer)) = reading.await else {
                    return Some((Err(LogError::Closed), None));
                };
                source = back;
                step = answer;
            }
            match step {
                Ok(Step::Event(end @ ReadEvent::End(_))) => return Some((Ok(end), None)),
                Ok(Step::Event(event)) => return Some((Ok(event), Some((source, signal)))),
                Err(error) => return Some((Err(error), None)),
                Ok(Step::CaughtUp | Step::WouldBlock) => {
                    if signal.changed().await.is_err() {
                        return Some((Err(LogError::Closed), None));
                    }
                }
            }
        }
    })
    .boxed()
}
