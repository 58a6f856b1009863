//! The computer outside the machine: what containers hold there, and the connections that come from it.
//!
//! Only in the machine; natively the engine publishes ports itself. `leases` is the session on which ports are asked
//! for, `shares` finds what containers bind from there, `changes` has our kernel tell what changes in it, `forward` takes
//! connections to them. `relay` copies, natively too.

mod changes;
mod forward;
mod leases;
pub mod relay;
mod shares;

pub use changes::Changes;
pub use forward::{Targets, serve};
pub use leases::HostLeases;
pub use shares::{Place, Shares};
