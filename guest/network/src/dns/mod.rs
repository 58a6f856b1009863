//! Name resolution for containers: a server at 127.0.0.11 inside each sandbox, all of them served by one process.
//!
//! [`answer`] is the wire: bytes and a table of names in, bytes out. [`Listener`] is the place: sockets made inside a
//! sandbox, and the sandbox's own rules that lead port 53 to them, which stays free for the container to listen on.
//! [`Server`] runs between them, and forwards what is not ours to the host's name servers.

mod answer;
mod listener;
mod redirect;
mod server;

pub use answer::{Answer, Names, Resolution, answer, read_hostile};
pub use listener::{Listener, ListenerError};
pub use server::{Resolver, Server, Upstream};
