//! Natively run engines set forwarding, firewall rules and mounts: tests give them namespaces of their own.

use anyhow::{Context, Result, bail};
use std::os::unix::process::CommandExt;
use std::process::Command;

const INSIDE: &str = "ENGINE_TEST_NAMESPACES";

/// Runs this very program again in network and mount namespaces of its own, with loopback up. Returns inside them.
///
/// In there a second network namespace plays the rest of the world: it is reached through the interface `uplink`, and
/// answers at 203.0.113.1 (TEST-NET-3, RFC 5737).
pub fn enter_private_namespaces() -> Result<()> {
    if std::env::var_os(INSIDE).is_none() {
        if !rustix::process::geteuid().is_root() {
            bail!("the native stage makes namespaces and mounts: run it as root");
        }
        let own = std::env::current_exe()?;
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(own)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .exec();
        return Err(error).context("cannot run `unshare`");
    }
    ip(&["link", "set", "lo", "up"])
}

/// Runs `ip` (Debian's iproute2).
pub(crate) fn ip(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments);
    crate::run(command)?.ok().map(drop)
}
