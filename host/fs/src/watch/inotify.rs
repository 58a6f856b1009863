//! Changes as Linux tells of them (`inotify(7)`).

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use super::{Event, Happening, Notifier, Token};
use crate::owner::path_of;

/// Events are read in pieces of this size.
const BUFFER_BYTES: usize = 16 << 10;

const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::EXCL_UNLINK);

/// An instance of inotify.
pub struct Inotify(OwnedFd);

impl Inotify {
    pub fn new() -> Result<Self, Errno> {
        Ok(Self(inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?))
    }
}

impl Notifier for Inotify {
    fn add(&self, folder: &OwnedFd) -> Result<Token, Errno> {
        inotify::add_watch(&self.0, path_of(folder), EVENTS)
    }

    fn remove(&self, token: Token) {
        // A folder that has gone took its watch with it.
        if let Err(error) = inotify::remove_watch(&self.0, token)
            && error != Errno::INVAL
        {
            tracing::debug!(%error, "a folder stays watched");
        }
    }

    fn read(&self, each: &mut dyn FnMut(Event<'_>)) -> Result<(), Errno> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut reader = Reader::new(&self.0, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            };
            let (token, happened) = (event.wd(), event.events());
            if happened.contains(ReadFlags::QUEUE_OVERFLOW) {
                each(Event::Overflow);
            } else if happened.contains(ReadFlags::IGNORED) {
                each(Event::Gone { token });
            } else if let (Some(name), Some(happening)) =
                (event.file_name(), happening(happened, event.cookie()))
            {
                each(Event::Name { token, name, happening, folder: happened.contains(ReadFlags::ISDIR) });
            }
        }
    }

    fn ready(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn happening(happened: ReadFlags, cookie: u32) -> Option<Happening> {
    let kinds = [
        (ReadFlags::CREATE, Happening::Created),
        (ReadFlags::DELETE, Happening::Removed),
        (ReadFlags::MOVED_FROM, Happening::MovedFrom(cookie)),
        (ReadFlags::MOVED_TO, Happening::MovedTo(cookie)),
        (ReadFlags::MODIFY, Happening::Modified),
        (ReadFlags::CLOSE_WRITE, Happening::Closed),
        (ReadFlags::ATTRIB, Happening::Attributes),
    ];
    kinds.into_iter().find(|(kind, _)| happened.contains(*kind)).map(|(_, happening)| happening)
}
