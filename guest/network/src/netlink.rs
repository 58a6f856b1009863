//! Conversations with the kernel by netlink, in the caller's network namespace or in another.
//!
//! Calls block, for microseconds: a request is one system call and its answer another. Requests that belong together
//! go out in one datagram ([`Netlink::batch`]). A netlink socket belongs to the namespace its thread was in when it
//! was made, and stays usable from any thread: entering another namespace needs a thread only for the making, thrown
//! away and never given back to a pool.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

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
    /// A refusal of our own making.
    pub(crate) fn refused(action: impl Into<String>, errno: i32) -> Self {
        Self::Refused { action: action.into(), source: io::Error::from_raw_os_error(errno) }
    }

    /// The kernel's error number, where it gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Open(source) | Self::Enter(source) | Self::Refused { source, .. } => source.raw_os_error(),
        }
    }
}

/// One thing asked of the kernel, and its sentence for when it is refused.
pub(crate) struct Request {
    action: String,
    message: RouteNetlinkMessage,
    flags: u16,
}

impl Request {
    /// Makes something that must not be there yet.
    pub(crate) fn create(action: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        Self { action: action.into(), message, flags: NLM_F_CREATE | NLM_F_EXCL }
    }

    /// Makes something, or changes what is there.
    pub(crate) fn replace(action: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        Self { action: action.into(), message, flags: NLM_F_CREATE | NLM_F_REPLACE }
    }

    /// Changes or removes something.
    pub(crate) fn change(action: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        Self { action: action.into(), message, flags: 0 }
    }

    /// Switches a link on.
    pub(crate) fn up(index: u32) -> Self {
        let message = LinkUnspec::new_with_index(index).up().build();
        Self::change(format!("switch on interface {index}"), RouteNetlinkMessage::SetLink(message))
    }
}

/// An open conversation.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Talks to the namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let socket = Socket::new(protocols::NETLINK_ROUTE).map_err(NetlinkError::Open)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(NetlinkError::Open)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for all of these at once. The kernel works through them in order, whatever became of the ones before; the
    /// first refusal is told.
    pub(crate) fn batch(&mut self, requests: &[Request]) -> Result<(), NetlinkError> {
        let (Some(first), start) = (requests.first(), self.sequence) else { return Ok(()) };
        let told = |source| NetlinkError::Refused { action: first.action.clone(), source };
        let mut bytes = Vec::new();
        for request in requests {
            self.append(&mut bytes, request.message.clone(), request.flags | NLM_F_ACK);
        }
        self.socket.send(&bytes, 0).map_err(told)?;
        let mut refusal = None;
        let mut missing = requests.len();
        while missing > 0 {
            for message in self.receive().map_err(told)? {
                // Answers to an earlier request that was given up.
                let Some(index) = message.header.sequence_number.checked_sub(start + 1) else { continue };
                let Some(request) = requests.get(index as usize) else { continue };
                if let NetlinkPayload::Error(error) = message.payload {
                    missing -= 1;
                    if let (Some(_), None) = (error.code, &refusal) {
                        let action = request.action.clone();
                        refusal = Some(NetlinkError::Refused { action, source: error.to_io() });
                    }
                }
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Asks for one thing.
    pub(crate) fn ask(&mut self, request: Request) -> Result<(), NetlinkError> {
        self.batch(&[request])
    }

    /// Asks for one thing that may be gone already. Returns whether it was there.
    pub(crate) fn ask_gone(&mut self, request: Request) -> Result<bool, NetlinkError> {
        match self.ask(request) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(nix::libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Everything that answers a question.
    pub(crate) fn list(
        &mut self,
        action: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.query(action, message, NLM_F_DUMP)
    }

    fn query(
        &mut self,
        action: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let told = |source| NetlinkError::Refused { action: action.to_owned(), source };
        let mut bytes = Vec::new();
        self.append(&mut bytes, message, flags);
        self.socket.send(&bytes, 0).map_err(told)?;
        let mut found = Vec::new();
        loop {
            for message in self.receive().map_err(told)? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(told(error.to_io())),
                    // The acknowledgement of a question about one thing follows its answer.
                    NetlinkPayload::Error(_) => return Ok(found),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    /// The messages of the next datagram.
    fn receive(&mut self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let (datagram, _) = self.socket.recv_from_full()?;
        let mut messages = Vec::new();
        let mut rest = datagram.as_slice();
        while rest.len() >= 4 {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let Some(one) = rest.get(..length).filter(|one| one.len() >= 16) else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message has no end"));
            };
            // What this crate's vocabulary has no word for is nothing we asked for.
            if let Ok(message) = NetlinkMessage::deserialize(one) {
                messages.push(message);
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(messages)
    }

    /// The link of this name, or `None`.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
        let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        let action = format!("look up interface `{name}`");
        match self.query(&action, RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Ok(found) => Ok(found.into_iter().find_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            })),
            Err(error) if error.errno() == Some(nix::libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every link.
    pub(crate) fn links(&mut self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let found = self.list("list the interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            })
            .collect())
    }

    /// Removes a link; one that is gone already is fine. Returns whether it was there.
    pub(crate) fn remove_link(&mut self, index: u32) -> Result<bool, NetlinkError> {
        let message = LinkUnspec::new_with_index(index).build();
        self.ask_gone(Request::change(
            format!("remove interface {index}"),
            RouteNetlinkMessage::DelLink(message),
        ))
    }
}

/// Runs `work` on a thread that has entered `namespace` and ends with it.
pub(crate) fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, NetlinkError> {
    in_own_thread(|| {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NetlinkError::Enter(errno.into()))?;
        Ok(work())
    })
    .map_err(NetlinkError::Open)?
}

/// Runs `work` on a thread that ends with it, so that a changed namespace cannot leak into a thread pool.
/// The outer error is the failure to make the thread. Blocks for as long as `work` does.
pub(crate) fn in_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("the namespace thread panicked"))
    })
}

/// The kernel's number of the link of this name, which has to be there.
pub(crate) fn index_of(netlink: &mut Netlink, name: &str) -> Result<u32, NetlinkError> {
    let link = netlink.link(name)?;
    link.map(|link| link.header.index)
        .ok_or_else(|| NetlinkError::refused(format!("find interface `{name}`"), nix::libc::ENODEV))
}

/// The name of a link.
pub(crate) fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}
