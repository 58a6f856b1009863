//! `engine-vmm`: the process that holds one virtual machine. Started by `engined`, not by people.
#![forbid(unsafe_code)]

use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use host_vmm::{Channel, confine, program};

/// Runs one virtual machine for the engine's daemon.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Number of the inherited socket over which the daemon gives its commands.
    #[arg(long, value_name = "NUMBER")]
    control_fd: RawFd,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("ENGINE_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let result = confine::process()
        .map_err(anyhow::Error::from)
        .and_then(|()| control_channel(arguments.control_fd))
        .and_then(program::run);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn control_channel(number: RawFd) -> anyhow::Result<Channel> {
    let fd = host_hypervisor::process::inherited(number)
        .with_context(|| format!("--control-fd {number} is not an open file descriptor"))?;
    Channel::new(UnixStream::from(fd)).with_context(|| format!("--control-fd {number} is not a socket"))
}
