//! The NAT from the guest's side: against real sockets of the host, and in scripted exchanges.

mod host;
mod script;
mod support;
