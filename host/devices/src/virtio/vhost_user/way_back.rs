//! The way back to the front end: a socket on which we may ask (`VHOST_USER_SET_BACKEND_REQ_FD`), and the one thing we have
//! to say, that configuration space has changed (`VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`; QEMU
//! `docs/interop/vhost-user.rst`, "Back-end message types"). The front end then reads it again.
//!
//! The protocol crate takes the socket and has no word for this request. So whoever reads the front end's messages looks
//! at each before the crate does, and keeps a duplicate of the socket in the one that brings it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use tracing::debug;

/// `VHOST_USER_SET_BACKEND_REQ_FD`, in a message's first word.
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// The version of the protocol, in a message's flags. Another flag would ask for an answer.
const VERSION: u32 = 1;

/// The socket, once the front end has given one.
#[derive(Default)]
pub(super) struct WayBack(Mutex<Option<OwnedFd>>);

impl WayBack {
    /// Waits for the front end's next message, without taking it, and keeps the socket that it may bring.
    pub fn look_at_next(&self, connection: &UnixStream) {
        match peek(connection) {
            Ok(None) => {}
            Ok(socket) => *self.0.lock().unwrap_or_else(PoisonError::into_inner) = socket,
            // Whoever reads the message meets it again.
            Err(error) => debug!(%error, "cannot look at the front end's next message"),
        }
    }

    /// Tells the front end that configuration space has changed. Does not wait: a front end that does not read loses the
    /// way back. Without one nothing happens.
    pub fn config_changed(&self) -> io::Result<()> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = &*socket else { return Ok(()) };
        let request = [CONFIG_CHANGE, VERSION, 0].map(u32::to_ne_bytes).concat();
        match send(open, &request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) if count == request.len() => Ok(()),
            result => {
                *socket = None;
                Err(result.err().map_or(io::ErrorKind::WriteZero.into(), io::Error::from))
            }
        }
    }
}

/// A duplicate of the socket in the next message, if it is one that brings it.
fn peek(connection: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut word = [0; 4];
    // Without room for them no descriptors are made of those that other messages bring.
    let mut none = RecvAncillaryBuffer::new(&mut []);
    let slices = &mut [IoSliceMut::new(&mut word)];
    let message = recvmsg(connection, slices, &mut none, RecvFlags::PEEK)?;
    if message.bytes < word.len() || u32::from_ne_bytes(word) != SET_BACKEND_REQ_FD {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    recvmsg(connection, &mut [IoSliceMut::new(&mut word)], &mut ancillary, flags)?;
    let mut rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(rights.next().and_then(|mut descriptors| descriptors.next()))
}
