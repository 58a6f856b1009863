//! One netlink conversation with the kernel, in the caller's namespace or in another.
//!
//! A netlink socket belongs to the network namespace its thread was in when it was made, so a conversation with
//! another namespace needs a thread that enters it once; the thread is thrown away, never given back to a pool.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

use futures_util::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::LinkUnspec;
use tokio::runtime;
use tokio::task::JoinHandle;

/// A request the kernel refused, or could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    /// The network namespace cannot be entered.
    #[error("cannot enter the network namespace")]
    Enter(#[source] io::Error),
    /// The kernel's answer.
    #[error("cannot {action}")]
    Refused {
        /// What was asked for.
        action: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl NetlinkError {
    /// The kernel's error number, where it gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Open(source) | Self::Enter(source) | Self::Refused { source, .. } => source.raw_os_error(),
        }
    }
}

/// An open conversation. Dropping it ends the task that drives the socket.
pub(crate) struct Netlink {
    pub(crate) handle: rtnetlink::Handle,
    driver: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Netlink {
    /// Talks to the namespace of the calling process.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        Ok(Self { handle, driver: tokio::spawn(connection) })
    }

    /// Talks to the namespace that `namespace` refers to.
    pub(crate) fn open_in(namespace: BorrowedFd<'_>) -> Result<Self, NetlinkError> {
        let runtime = runtime::Handle::current();
        in_own_thread(|| {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NetlinkError::Enter(errno.into()))?;
            let _guard = runtime.enter();
            Self::open()
        })
        .map_err(NetlinkError::Open)?
    }

    /// The link of this name, or `None`.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        match found.refused(|| format!("look up interface `{name}`")) {
            Err(error) if error.errno() == Some(nix::libc::ENODEV) => Ok(None),
            other => other,
        }
    }

    /// Every link's name and index.
    pub(crate) async fn links(&self) -> Result<Vec<(String, u32)>, NetlinkError> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .refused(|| "list the interfaces".into())?;
        Ok(links.into_iter().filter_map(|link| Some((name_of(&link)?, link.header.index))).collect())
    }

    /// Removes a link; one that is gone already is fine. Returns whether it was there.
    pub(crate) async fn remove_link(&self, index: u32) -> Result<bool, NetlinkError> {
        match self.handle.link().del(index).execute().await.refused(|| format!("remove interface {index}")) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(nix::libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Switches a link on.
    pub(crate) async fn up(&self, index: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().change(message).execute().await.refused(|| format!("switch on interface {index}"))
    }
}

/// Runs `work` on a thread that ends with it, so that a changed namespace cannot leak into a thread pool.
/// The outer error is the failure to make the thread. Blocks for as long as `work` does.
pub(crate) fn in_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("the namespace thread panicked"))
    })
}

fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

/// Gives rtnetlink's errors the sentence of what was asked.
pub(crate) trait Refused<T> {
    fn refused(self, action: impl FnOnce() -> String) -> Result<T, NetlinkError>;
}

impl<T> Refused<T> for Result<T, rtnetlink::Error> {
    fn refused(self, action: impl FnOnce() -> String) -> Result<T, NetlinkError> {
        self.map_err(|error| NetlinkError::Refused {
            action: action(),
            source: match error {
                rtnetlink::Error::NetlinkError(message) => message.to_io(),
                other => io::Error::other(other),
            },
        })
    }
}
