//! The NAT from the guest's side: against real sockets of the host, and in scripted exchanges.

mod host;
mod landing;
mod offloads;
mod played;
mod script;
mod six;
mod support;
mod weather;
