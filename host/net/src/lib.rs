//! User-space NAT: the virtual machine's way out, without root.
//!
//! The guest's Ethernet frames come in on a stream socket; ordinary host sockets go out. So the user's routes, VPN
//! and resolvers apply, and nobody needs privileges.
//!
//! | module | job |
//! |---|---|
//! | [`stack`] | the pure machine: frames and socket events in, frames and socket operations out |
//! | `flow` | the one table of conversations, their keys and states |
//! | `tcp`, `udp`, `dns`, `icmp` | one conversation each |
//! | `arp`, `neighbour`, `dhcp` | questions answered on the spot |
//! | `wire`, `ipv6` | bytes, by smoltcp where it has them |
//! | `offload` | what the two ends of the link leave to each other |
//! | [`io`] | the loop that does what the stack says: one thread, no timers while idle |
//!
//! Both families alike: where the host has no way, the guest hears so at once. Fragments are put together
//! (`reassembly`), and datagrams to the guest are fragmented where the link needs it.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod arp;
mod config;
mod counters;
mod dhcp;
mod dns;
mod flow;
mod fuzz;
mod icmp;
pub mod io;
mod ipv6;
mod neighbour;
mod neighbours;
mod offload;
mod random;
mod reassembly;
mod resolv;
mod seq;
pub mod stack;
mod tcp;
mod timer;
mod udp;
mod wire;

pub use config::Config;
pub use counters::{Counters, DropReason};
pub use flow::{FLOW_CAPACITY, FlowId};
pub use fuzz::fuzz_nat_frames;
pub use icmp::{Reason, Trouble};
pub use io::{Handle, Opener, Teller, spawn, spawn_asking};
pub use offload::Offload;
pub use resolv::Asked;
pub use stack::{Failure, Operation, Stack};
