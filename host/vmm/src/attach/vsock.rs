//! The socket device: the guest's ports for the daemon's sockets, and the daemon's ports for the guest. One port is
//! the shared folders'.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use guest_protocol::forward::Header;
use guest_protocol::port;
use host_devices::virtio::vsock::{Backend, Cid, Counters, Handle, Vsock};
use host_hypervisor::qemu::Device;

use super::{Attached, Context};
use crate::confine::{Class, Confinement};
use crate::machine::Signal;

pub(super) struct Attachment;

/// Opens connections to the guest, from any thread.
#[derive(Clone)]
pub(crate) struct Connector {
    handle: Handle,
    counters: Arc<Counters>,
}

impl Connector {
    /// Connects a stream socket to a port of the guest; the socket is closed if that cannot be.
    pub(crate) fn connect(&self, port: u32, header: Option<&Header>, stream: OwnedFd) {
        let preface = match header.map(Header::encode).transpose() {
            Ok(preface) => preface.unwrap_or_default(),
            Err(error) => return tracing::warn!(port, %error, "cannot begin a connection to the guest"),
        };
        if let Err(error) = self.handle.connect(port, preface, stream) {
            tracing::warn!(port, %error, "cannot connect to the guest");
        }
    }

    /// How many streams are open, from either side.
    pub(crate) fn open_streams(&self) -> u64 {
        self.counters.open_streams()
    }
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn confinement(&self) -> Confinement {
        Confinement::without_files(Class::Device)
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let signals = context.signals.clone();
        let (followers, following) = std::sync::mpsc::channel();
        context.followers = Some(following);
        let accepted = move |port, stream| {
            if port == port::CHANGES {
                // Nobody who shares folders is left: dropping it closes it.
                return drop(followers.send(stream));
            }
            // Without a driver the connection has nobody to serve it: dropping it closes it.
            drop(signals.send(Signal::Accepted { port, stream }));
        };
        let ports = [port::SESSION, port::LOG, port::LEASES, port::CHANGES].into();
        let device =
            Vsock::new(Cid(u64::from(port::GUEST_CID)), Backend { ports, accepted: Box::new(accepted) })?;
        context.connector = Some(Connector { handle: device.handle(), counters: device.counters() });
        context.plug.serve("vsock", device, |fd| Device::VhostUserVsock { fd })
    }
}
