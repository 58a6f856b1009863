//! The words between the engine and a shim.
//!
//! The engine makes a folder DIR, writes `DIR/shim.json` ([`ShimSpec`]) and runs `shim --dir DIR` with its standard
//! output connected to a pipe. The shim listens on `DIR/shim.sock`, writes [`READY`] to that pipe and closes it; when it
//! cannot, it writes a sentence to standard error and ends with status 125. From then on the two talk in frames
//! ([`wire`]): a request, its reply, in order, on as many connections as the engine likes. `Attach` turns a connection
//! into a stream.
//!
//! Files a shim leaves in DIR: `state.json` ([`StateRecord`], what [`crate::reap()`] needs), `exit.json` ([`Exit`], once
//! init has ended and its output has drained). Both appear whole or not at all.

pub mod connection;
pub mod record;
pub mod socket;
pub mod spec;
pub mod wire;

pub use connection::{AttachedStream, Connection, ConnectionError, LaunchError, launch};
pub use record::{EXIT_FILE, RecordError, STATE_FILE, StateRecord, shim_process};
pub use spec::{ConsoleSize, ExternalRuntime, Forward, Log, LogDriver, SPEC_FILE, ShimSpec, Stdin, Syslog};
pub use wire::{
    ErrorKind, Exit, FRAME_LEN_MAX, Frame, FrameBuffer, FrameError, ProcessId, Reply, Request, ShimState,
    Status,
};

/// What a shim writes to its standard output once it listens.
pub const READY: &[u8] = b"ready\n";

/// The name of a shim's socket in its folder.
pub const SOCKET_FILE: &str = "shim.sock";
