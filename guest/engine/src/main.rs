//! `guest-engine`: the Docker-compatible server.
//!
//! It runs in our machine, listening on a vsock port, and as well natively on a Linux host with a socket and a data
//! root of its own. What it owns: containers, their records and their drivers, and the API. What others own: images
//! ([`guest_images`]), network objects ([`guest_network`]), and the processes of containers, whose parents are shims
//! ([`guest_runtime`]) that go on when this program ends.
#![forbid(unsafe_code)]

mod config;
mod engine;
mod failure;
mod fsck;
mod host;
mod http;
mod moment;
mod pieces;
mod plan;
mod relay;
mod run_root;
mod services;
mod store;

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::config::{Flags, Settings};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|first| first == "fsck").is_some() {
        return fsck::main(arguments);
    }
    match run(Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Log lines to standard error. The environment says how much, else the settings do.
fn start_log(level: Option<&str>) {
    let filter =
        EnvFilter::try_from_env("ENGINE_LOG").unwrap_or_else(|_| EnvFilter::new(level.unwrap_or("info")));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .init();
}

/// Last words without the trimmings of a log line: whoever started us repeats them to a person.
#[expect(clippy::print_stderr, reason = "the sentence a person reads")]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let settings = Settings::resolve(flags)?;
    start_log(settings.log_level);
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    // Before anything else opens a descriptor.
    let ready = settings.ready_fd.map(inherited).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(engine::run(settings, ready));
    // Blocking work that hangs must not keep us.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

/// A descriptor our parent left open for us; not passed on to shims.
fn inherited(number: i32) -> anyhow::Result<OwnedFd> {
    guest_runtime::sys::inherited(number)
        .with_context(|| format!("--ready-fd {number} is not an open descriptor"))
}
