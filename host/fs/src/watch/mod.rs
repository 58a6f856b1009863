//! What programs on the host change in shared folders, for the guest's kernel to tell of.
//!
//! A container that watches a folder asks its own kernel, which knows nothing of changes on the host, and a stock kernel
//! takes no such news over virtio-fs. So the guest repeats each change: a thread of its engine makes, removes or renames the
//! same name once more, and the server, which knows that thread by its number, answers as if the change were still to come
//! and does nothing. Then the guest's kernel makes every kind of event by itself.
//!
//! ```text
//! host's kernel ──▶ Notifier ──▶ minus what the guest did (own) ──▶ Pending ──▶ stream ──▶ repeating thread
//!                                                                                             │ mknod, unlink, …
//!                                            server: answers from what the guest knows ◀──────┘
//! ```
//!
//! Watched are the folders that the repeating thread has open and, of what is below them, those that the guest knows: a
//! folder that is watched inside is known for as long as it is. Files: `folders` which are watched, `inotify` the host's
//! kernel, `own` what the guest does itself, `pending` what is to be told, `follow` the stream. What the repeating thread
//! asks is answered in `server/repeat`.

mod folders;
mod follow;
mod inotify;
mod own;
mod pending;

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;

pub use folders::Folders;
pub use follow::FollowError;
pub use own::{Ledger, Own};
pub use pending::{Spot, Step};

/// One watched folder, for a notifier.
pub type Token = i32;

/// Tells of changes in folders. What the host's kernel has for it differs between systems.
pub trait Notifier: Send + Sync {
    /// Watches the names in a folder, and the files they lead to. A folder that is watched already keeps its token.
    fn add(&self, folder: &OwnedFd) -> Result<Token, Errno>;

    /// Watches it no longer.
    fn remove(&self, token: Token);

    /// Calls `each` for all events that are queued by now.
    fn read(&self, each: &mut dyn FnMut(Event<'_>)) -> Result<(), Errno>;

    /// Readable when events are queued.
    fn ready(&self) -> BorrowedFd<'_>;
}

/// What happened to a name, as the host's kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    Created,
    Removed,
    /// The two ends of a renaming have the same number.
    MovedFrom(u32),
    MovedTo(u32),
    Modified,
    Closed,
    Attributes,
}

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Something happened in a folder.
    Name {
        token: Token,
        name: &'a CStr,
        happening: Happening,
        /// The name is a folder's.
        folder: bool,
    },
    /// A folder is watched no longer: it has gone.
    Gone { token: Token },
    /// There were more than the kernel keeps.
    Overflow,
}
