//! Sending a log as it grows: the loop around [`LogReader`], woken by the file system and by the container's end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::inotify;
use rustix::fs::inotify::{CreateFlags, WatchFlags};
use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use super::log::{Batch, LogReader};
use super::record::View;

/// Reads until the log is complete (or, without `following`, until its present end) and sends what it finds. Ends
/// early when the receiver has gone.
pub async fn send(
    mut reader: LogReader,
    folder: PathBuf,
    following: Option<watch::Receiver<Arc<View>>>,
    output: mpsc::Sender<io::Result<Bytes>>,
) {
    let result = async {
        // Before the first read, so that no change is missed.
        let changes = following.as_ref().map(|_| Changes::watch(&folder)).transpose()?;
        let mut views = following;
        loop {
            // Whether it ran before the read: if not, what the read found was all.
            let live = views.as_mut().is_some_and(|views| views.borrow_and_update().live.is_some());
            let (next, batch) = read(reader).await?;
            reader = next;
            match (batch, &changes, &mut views) {
                (Batch::Output(bytes), ..) => {
                    if !bytes.is_empty() && output.send(Ok(bytes.into())).await.is_err() {
                        return Ok(());
                    }
                }
                (Batch::Idle, Some(changes), Some(views)) if live => {
                    tokio::select! {
                        changed = changes.next() => changed?,
                        // The driver's end is the container's end, or the engine's.
                        published = views.changed() => if published.is_err() { return Ok(()) },
                        () = output.closed() => return Ok(()),
                    }
                }
                (Batch::Idle | Batch::Done, ..) => return Ok(()),
            }
        }
    };
    let result: io::Result<()> = result.await;
    if let Err(error) = result {
        // The receiver may have gone.
        let _ = output.send(Err(error)).await;
    }
}

async fn read(mut reader: LogReader) -> io::Result<(LogReader, Batch)> {
    tokio::task::spawn_blocking(move || {
        let batch = reader.next()?;
        Ok((reader, batch))
    })
    .await
    .map_err(io::Error::other)?
}

/// Changes of the files in a folder.
struct Changes {
    descriptor: AsyncFd<OwnedFd>,
}

impl Changes {
    fn watch(folder: &Path) -> io::Result<Self> {
        let descriptor = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(
            &descriptor,
            folder,
            WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO,
        )?;
        #[expect(
            deprecated,
            reason = "unsound only for types that may close their descriptor early; ours is an OwnedFd"
        )]
        let descriptor = AsyncFd::new(descriptor)?;
        Ok(Self { descriptor })
    }

    /// Waits for a change; many at once count as one.
    async fn next(&self) -> io::Result<()> {
        let mut guard = self.descriptor.readable().await?;
        let mut events = [0; 4096];
        loop {
            match rustix::io::read(self.descriptor.get_ref(), &mut events) {
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        Ok(())
    }
}
