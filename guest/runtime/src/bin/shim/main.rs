//! `shim`: the one parent a container has.
//!
//! Makes the container, holds its pipes or terminal, writes its log, passes its output on, keeps its exit status, and
//! answers the engine on a socket. One thread, one `poll` loop: libcontainer forks without `exec` and must never do so
//! in a threaded process. The engine may die and come back; nothing here notices.
//!
//! | module | owns |
//! |---|---|
//! | `server` | the loop, and which request is legal when |
//! | `client` | one connection: frames, or a stream with a bounded queue |
//! | `process` | one process: its descriptors, input queue and end |
//! | `container` | the container, by libcontainer or another runtime: create and start; what a spec needs corrected |
//! | `apart` | a place for making the container where the mounts of others are not |
//! | `external` | the calls of another runtime |
//! | `streams` | pipes and terminals, both ends |
//! | `enter` | running another process in the container |
//! | `filter` | seccomp profiles made into programs for the kernel |
//! | `mount` | what libcontainer leaves undone of a container's mounts |
//! | `program` | the last steps inside the container, up to `execve` |
//! | `log` | the json-file format and its rotation |
//! | `trace` | what libcontainer says about a failure |
//! | `init` | another program under another name: a container's first process, when asked for |

#![forbid(unsafe_code)]

mod apart;
mod client;
mod container;
mod enter;
mod external;
mod filter;
mod init;
mod log;
mod mount;
mod process;
mod program;
mod server;
mod streams;
mod trace;

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use guest_runtime::shim::record::{self, RecordError};
use guest_runtime::shim::{READY, SOCKET_FILE, SPEC_FILE, ShimSpec, socket};
use rustix::process::{chdir, setsid};
use thiserror::Error;

use crate::server::{Server, ServerError};

/// Docker's status for a failure of the engine rather than of the program.
const STATUS_FAILURE: u8 = 125;

#[derive(Debug, Error)]
enum ShimError {
    #[error("usage: shim --dir DIR")]
    Usage,
    #[error("there is no {}", .path.display())]
    NoSpec { path: PathBuf },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("cannot {step}")]
    Setup {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on {}", .path.display())]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Server(#[from] ServerError),
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if init::is_called(arguments.next().as_deref()) {
        return init::run(arguments.collect());
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(STATUS_FAILURE)
        }
    }
}

/// Writes a failure and its causes to standard error, the engine's log.
fn report(error: &dyn std::error::Error) {
    #[expect(clippy::print_stderr, reason = "standard error is where the engine looks for a shim's troubles")]
    {
        eprintln!("shim: {}", trace::chain(error));
    }
}

fn run() -> Result<(), ShimError> {
    let mut arguments = std::env::args_os().skip(1);
    let dir = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(flag), Some(dir), None) if flag == "--dir" => PathBuf::from(dir),
        _ => return Err(ShimError::Usage),
    };
    let setup = |step| move |source: io::Error| ShimError::Setup { step, source };
    let dir = dir.canonicalize().map_err(setup("find the folder given with --dir"))?;
    let spec: ShimSpec =
        record::read(&dir, SPEC_FILE)?.ok_or_else(|| ShimError::NoSpec { path: dir.join(SPEC_FILE) })?;
    // A new session, away from the engine's signals. It fails only for the leader of a process group, which then
    // already is away.
    if setsid().is_err() && rustix::process::getpgrp() != rustix::process::getpid() {
        return Err(setup("leave the engine's session")(io::Error::last_os_error()));
    }
    // libcontainer changes to the current folder and back; no other folder is certain to stay.
    chdir("/").map_err(|error| setup("change to the root folder")(error.into()))?;
    let events = trace::install().map_err(setup("collect the runtime's messages"))?;
    let listener = socket::bind(&dir, SOCKET_FILE)
        .map_err(|source| ShimError::Listen { path: dir.join(SOCKET_FILE), source })?;
    let server = Server::new(dir, spec, listener, events)?;
    announce().map_err(setup("tell the engine that the shim is ready"))?;
    Ok(server.run()?)
}

/// Says that the socket answers, and lets go of the engine's pipe.
fn announce() -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(READY)?;
    stdout.flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(&null)?)
}
