//! The store from outside: pulls from honest and hostile registries, archives, snapshots, crashes.
//!
//! Registries listen on loopback on ports of the system's choice; everything lies in private temporary folders; what
//! mounts runs in a mount namespace of its own.

mod check;
mod crash;
mod docker_registry;
#[cfg(debug_assertions)]
mod faults;
mod full;
mod hostile;
mod load;
mod maker;
mod pull;
mod push;
mod registries;
mod remove;
mod server;
mod shelf;
mod snapshot;
mod stress;
mod tls;
