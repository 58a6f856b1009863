//! The control contract of the host daemon: what `engine` and the tray may ask `engined`, and where the two meet.
//!
//! Types only: no sockets, no clock, no file system. One request travels per connection as a line of JSON; the answer is
//! a stream of [`Reply`] lines that ends with `Done`, one of the data replies, or `Error`.
//!
//! The Docker API is *not* here: it has its own socket ([`Home::docker_socket`]) and its own crate (`guest-api`).
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod home;
mod message;

pub use home::{Home, HomeError, SOCKET_PATH_BYTES_MAX};
pub use message::{
    BackendChoice, GuestStatus, LaterSetting, LogSource, MachineInfo, MachineSettings, MachineState,
    MachineStatus, Reply, Request, VERSION,
};
