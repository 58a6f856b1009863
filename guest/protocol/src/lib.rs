//! The contract between host and guest: what crosses the wall of the virtual machine, and how.
//!
//! Host and guest programs meet in this crate only. It holds the vsock ports ([`port`]), the messages of the
//! control session ([`message`]), what containers hold on the host ([`lease`]) and bind from it ([`share`]), what changes there
//! ([`changes`]), how a connection to a published port begins ([`forward`]), their framing ([`frame`]) and the session itself as a pure state machine
//! ([`session`]); and the two foreign formats that both halves read: DNS questions ([`dns`]) and the kernel's tables of
//! sockets ([`sockets`]). It does no I/O, spawns nothing and reads no clock: bytes and a time go in, bytes and events
//! come out. The daemon on the host and the agent in the guest each drive one end.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod changes;
pub mod dns;
pub mod forward;
pub mod frame;
pub mod lease;
pub mod message;
pub mod port;
pub mod session;
pub mod share;
pub mod sockets;

pub use lease::{GrantedPort, LANDING_V4, LANDING_V6, Landing, Lease, PortRequest, Transport};
pub use message::{
    EngineSettings, EngineState, Failure, FailureKind, GuestInfo, Hello, HostProxies, Notice,
    PROTOCOL_VERSION, Request, Response,
};
pub use session::{RequestId, Role, Session, SessionError, SessionEvent, State};
pub use share::{BindPlace, BindSource};
