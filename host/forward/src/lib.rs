//! Published ports on the host: listeners, and the streams that carry what arrives there into the machine.
//!
//! A [`Forwarder`] is what one container's lease holds: sockets bound before it is returned, all or none. Each accepted
//! TCP connection is handed on as it is, with a header in front ([`Sink`]); this process does not copy its bytes. UDP
//! is the exception: datagrams are framed onto a socket pair, one for each flow, whose other end is handed on.
//!
//! Does not own: which container may publish what, and what becomes of a stream beyond the sink.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod bind;
mod forwarder;
mod holder;
mod tcp;
mod udp;

pub use bind::BindError;
pub use forwarder::{Forwarder, Sink};
pub use holder::Holder;
