//! The place of the name server inside a sandbox: 127.0.0.11.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use super::redirect;
use crate::blocking;
use crate::netlink::{NetlinkError, inside};
use crate::sandbox::{Sandbox, SandboxError};

/// What the kernel keeps of questions that were not read yet: some thousand, each of which costs it about 1 KiB. Its
/// default holds 200, and a busy container loses the rest.
const BUFFER_BYTES: usize = 4 << 20;

/// Sockets inside a sandbox that hear what it asks at 127.0.0.11.
#[derive(Debug)]
pub struct Listener {
    pub(super) udp: UdpSocket,
    pub(super) tcp: TcpListener,
    /// The sandbox's network namespace.
    pub(super) namespace: OwnedFd,
}

/// Why a sandbox cannot have a name server.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The sandbox is gone.
    #[error("cannot use the network namespace")]
    Sandbox(#[from] SandboxError),
    /// It cannot be entered.
    #[error("cannot use the network namespace {path}")]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: NetlinkError,
    },
    /// A step inside failed.
    #[error("cannot {step} for the name server of network namespace {path}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The namespace.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl Listener {
    /// The address containers find their name server at.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

    /// Makes the sockets, and leads port 53 to them. Done again (by an engine that was restarted), it takes over.
    ///
    /// # Errors
    /// When the sandbox is gone or the kernel refuses.
    pub async fn open(sandbox: &Sandbox) -> Result<Self, ListenerError> {
        let sandbox = sandbox.clone();
        let path = sandbox.path().to_owned();
        let opened = blocking(move || {
            let namespace = sandbox.file()?;
            let path = || sandbox.path().to_owned();
            let step = |step| move |source, path| ListenerError::Step { step, path, source };
            inside(namespace.as_fd(), || {
                let udp =
                    UdpSocket::bind((Self::ADDRESS, 0)).map_err(|e| step("bind a UDP socket")(e, path()))?;
                let tcp = TcpListener::bind((Self::ADDRESS, 0))
                    .map_err(|e| step("bind a TCP socket")(e, path()))?;
                let made = (|| {
                    setsockopt(&udp, RcvBufForce, &BUFFER_BYTES)?;
                    udp.set_nonblocking(true)?;
                    tcp.set_nonblocking(true)?;
                    redirect::write(Self::ADDRESS, udp.local_addr()?.port(), tcp.local_addr()?.port())
                })();
                made.map_err(|e| step("write the rules")(e, path()))?;
                Ok((udp, tcp))
            })
            .map_err(|source| ListenerError::Enter { path: path(), source })?
            .map(|(udp, tcp)| Self { udp, tcp, namespace: namespace.into() })
        });
        opened
            .await
            .unwrap_or_else(|source| Err(ListenerError::Step { step: "start a thread", path, source }))
    }
}
