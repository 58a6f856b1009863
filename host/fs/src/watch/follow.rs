//! The stream to the thread in the guest that repeats changes.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use guest_protocol::changes::{self, BATCH_BYTES_MAX, DONE, Touch};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::inotify::Inotify;
use super::pending::Pending;
use super::{Event, Happening, Notifier, Own, Spot};
use crate::server::Server;

/// Changes are collected for so long: programs make several at once.
const SETTLE: Duration = Duration::from_millis(10);
/// And for so long while there is no end to them.
const SETTLE_BUSY: Duration = Duration::from_millis(50);
/// A batch ends when it is this long; one more change fits.
const BATCH_BYTES: usize = BATCH_BYTES_MAX / 4;

/// So long after its end the guest's thread is still known by its number: it may have asked for something just before.
const LINGER: Duration = Duration::from_millis(500);

/// Changes are not told any more.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The user may have no more of them.
    #[error(
        "cannot watch shared folders, so containers are not told what changes in them: see fs.inotify.max_user_instances"
    )]
    Notifier(#[source] Errno),
    /// The stream broke, or the folders cannot be watched any longer.
    #[error("the watching of shared folders broke off")]
    Broken(#[source] Errno),
    /// The guest says something that makes no sense.
    #[error("the guest does not speak of shared folders as it should")]
    Guest,
}

/// The first half of a renaming.
struct Moved {
    cookie: u32,
    from: Vec<Spot>,
    folder: bool,
}

impl Server {
    /// Tells the guest at the other end of `stream` what changes on the host in the folders that it wants to hear of, until it
    /// hangs up. One at a time.
    pub fn follow(&self, stream: &OwnedFd) -> Result<(), FollowError> {
        let mut hello = [0; 4];
        if !receive(stream.as_fd(), &mut hello).map_err(FollowError::Broken)? {
            return Ok(());
        }
        let notifier: Arc<dyn Notifier> = Arc::new(Inotify::new().map_err(FollowError::Notifier)?);
        self.nodes.watch_with(Some(Arc::clone(&notifier)));
        self.ledger.keep(true);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.repeater.store(changes::thread(hello), Ordering::Release);
        let result = self.tell(stream.as_fd(), &*notifier);
        outlast(stream.as_fd());
        self.repeater.store(0, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.set_repeating(Vec::new());
        self.ledger.keep(false);
        self.nodes.watch_with(None);
        result
    }

    fn tell(&self, stream: BorrowedFd<'_>, notifier: &dyn Notifier) -> Result<(), FollowError> {
        let mut pending = Pending::default();
        // The empty batch.
        send(stream, &0u32.to_le_bytes()).map_err(FollowError::Broken)?;
        let (mut away, mut busy) = (true, false);
        loop {
            let (answered, changed) = wait(stream, notifier.ready()).map_err(FollowError::Broken)?;
            if answered {
                let mut done = [0];
                match receive(stream, &mut done).map_err(FollowError::Broken)? {
                    false => return Ok(()),
                    true if done == [DONE] && away => away = false,
                    true => return Err(FollowError::Guest),
                }
                self.set_repeating(Vec::new());
            }
            if changed {
                std::thread::sleep(if busy { SETTLE_BUSY } else { SETTLE });
                self.drain(notifier, &mut pending).map_err(FollowError::Broken)?;
            }
            busy = changed;
            if !away && let Some(batch) = self.batch(&mut pending) {
                send(stream, &batch).map_err(FollowError::Broken)?;
                away = true;
            }
        }
    }

    /// Reads all events there are.
    fn drain(&self, notifier: &dyn Notifier, pending: &mut Pending) -> Result<(), Errno> {
        let reading = self.ledger.begin_reading();
        let (mut moved, mut overflow) = (None, false);
        notifier.read(&mut |event| match event {
            Event::Name { token, name, happening, folder } => {
                let folders = self.nodes.watched_as(token, false);
                let spots = folders.into_iter().map(|number| (number, name.to_owned()));
                let spots: Vec<Spot> = spots.filter(|spot| !self.is_own(spot.0, name, happening)).collect();
                note(pending, &mut moved, spots, happening, folder);
            }
            Event::Gone { token } => drop(self.nodes.watched_as(token, true)),
            Event::Overflow => overflow = true,
        })?;
        settle(pending, moved);
        self.ledger.end_reading(reading);
        if overflow {
            tracing::warn!(
                "more changed at once in shared folders than the kernel remembers \
                 (fs.inotify.max_queued_events): containers are told that the folders changed, not how"
            );
            self.nodes.watched().into_iter().for_each(|folder| pending.lose(folder));
        }
        Ok(())
    }

    fn is_own(&self, folder: u64, name: &CStr, happening: Happening) -> bool {
        let appears = || self.ledger.has(&Own::Appears(folder, name.to_owned()));
        match happening {
            Happening::Created | Happening::MovedTo(_) => appears(),
            Happening::Removed | Happening::MovedFrom(_) => {
                self.ledger.has(&Own::Vanishes(folder, name.to_owned()))
            }
            Happening::Modified | Happening::Attributes => {
                let number = self.nodes.named(folder, name);
                number.is_some_and(|number| self.ledger.has(&Own::Data(number))) || appears()
            }
            // Told only of files that somebody else has written to.
            Happening::Closed => false,
        }
    }

    /// The next changes to repeat, with their length before them.
    fn batch(&self, pending: &mut Pending) -> Option<Vec<u8>> {
        let (mut batch, mut steps) = (vec![0; 4], Vec::new());
        while batch.len() < BATCH_BYTES
            && let Some(step) = pending.take()
        {
            if let Some(change) = self.describe(&step) {
                change.encode(&mut batch);
                steps.push(step);
            }
        }
        if steps.is_empty() {
            return None;
        }
        let length = (batch.len() - 4) as u32;
        batch[..4].copy_from_slice(&length.to_le_bytes());
        self.set_repeating(steps);
        Some(batch)
    }
}

/// Adds what happened to what is to be told.
fn note(
    pending: &mut Pending,
    moved: &mut Option<Moved>,
    spots: Vec<Spot>,
    happening: Happening,
    folder: bool,
) {
    // The two halves of a renaming follow each other.
    let before = moved.take();
    if let (Happening::MovedTo(cookie), Some(before)) = (happening, &before)
        && before.cookie == cookie
        && before.from.len() == spots.len()
    {
        for (from, to) in before.from.iter().zip(spots) {
            pending.renamed(from.clone(), to, folder);
        }
        return;
    }
    settle(pending, before);
    if let Happening::MovedFrom(cookie) = happening {
        if !spots.is_empty() {
            *moved = Some(Moved { cookie, from: spots, folder });
        }
        return;
    }
    let attributes = Touch { attributes: true, ..Touch::default() };
    let modified = Touch { modified: true, ..Touch::default() };
    for at in spots {
        match happening {
            // A file that comes from elsewhere has something in it.
            Happening::MovedTo(_) if !folder => {
                pending.appeared(at, Touch { closed: true, ..modified }, folder);
            }
            Happening::Created | Happening::MovedTo(_) => pending.appeared(at, Touch::default(), folder),
            Happening::Modified => pending.touched(at, modified),
            Happening::Attributes => pending.touched(at, attributes),
            Happening::Closed => pending.closed(at),
            Happening::Removed | Happening::MovedFrom(_) => pending.vanished(at, folder),
        }
    }
}

/// A renaming to a place that is not watched: the names have gone.
fn settle(pending: &mut Pending, moved: Option<Moved>) {
    let Some(Moved { from, folder, .. }) = moved else { return };
    from.into_iter().for_each(|at| pending.vanished(at, folder));
}

/// Waits until the guest says something, or events are queued.
fn wait(stream: BorrowedFd<'_>, events: BorrowedFd<'_>) -> Result<(bool, bool), Errno> {
    let mut polled =
        [PollFd::from_borrowed_fd(stream, PollFlags::IN), PollFd::from_borrowed_fd(events, PollFlags::IN)];
    loop {
        match poll(&mut polled, None) {
            Ok(_) => return Ok((!polled[0].revents().is_empty(), !polled[1].revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn wait_for(stream: BorrowedFd<'_>, flags: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(stream, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Waits for the end of the guest's thread. What it asks for until then, in the middle of a batch perhaps, must not be done
/// in earnest: a name that it removes may be there again.
fn outlast(stream: BorrowedFd<'_>) {
    // It hears that no more comes, and hangs up; or has done so.
    let _gone = rustix::net::shutdown(stream, rustix::net::Shutdown::Write);
    while let Ok(true) = receive(stream, &mut [0]) {}
    std::thread::sleep(LINGER);
}

/// Fills `bytes`; `false` when the other end has hung up.
fn receive(stream: BorrowedFd<'_>, mut bytes: &mut [u8]) -> Result<bool, Errno> {
    while !bytes.is_empty() {
        match rustix::io::read(stream, &mut *bytes) {
            Ok(0) | Err(Errno::CONNRESET) => return Ok(false),
            Ok(count) => bytes = &mut bytes[count..],
            Err(Errno::AGAIN) => wait_for(stream, PollFlags::IN)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn send(stream: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        // Who has hung up is noticed when the answer is read.
        match rustix::net::send(stream, bytes, rustix::net::SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::AGAIN) => wait_for(stream, PollFlags::OUT)?,
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
