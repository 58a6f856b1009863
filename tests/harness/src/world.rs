//! `World`: the rest of the world as a natively run engine sees it: a network namespace behind a veth pair, which knows
//! no way back to container addresses. Namespaces of other uses are made here too.

use crate::command::wait_until;
use crate::namespace::ip;
use anyhow::{Context, Result};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

/// TEST-NET-3 (RFC 5737).
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// A network namespace that lives as long as this.
pub struct World {
    /// Holds the namespace.
    holder: Child,
}

impl World {
    /// A namespace with nothing in it.
    pub fn empty() -> Result<Self> {
        let holder = Command::new("unshare")
            .args(["--net", "--", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run `unshare`")?;
        let world = Self { holder };
        let pid = world.holder.id().to_string();
        wait_until("the namespace of the test world is there", || {
            let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
            // `unshare` has moved once the two differ, and has become `sleep`.
            Ok((namespace(&pid)? != namespace("self")?).then_some(()))
        })?;
        Ok(world)
    }

    /// Makes the world and points the default route of this process's own namespace at it.
    pub(crate) fn create() -> Result<Self> {
        let world = Self::empty()?;
        let pid = world.holder.id().to_string();
        ip(&["link", "add", "uplink", "type", "veth", "peer", "name", "world", "netns", &pid])?;
        ip(&["address", "add", "203.0.113.2/24", "dev", "uplink"])?;
        ip(&["link", "set", "uplink", "up"])?;
        ip(&["route", "add", "default", "via", &ADDRESS.to_string()])?;
        for arguments in [
            &["address", "add", "203.0.113.1/24", "dev", "world"][..],
            &["link", "set", "world", "up"],
            &["link", "set", "lo", "up"],
        ] {
            let mut command = world.enter("ip");
            command.args(arguments);
            crate::run(command)?.ok()?;
        }
        Ok(world)
    }

    /// The process that holds the namespace, for `ip link … netns`.
    pub fn id(&self) -> u32 {
        self.holder.id()
    }

    /// A command that runs in the world.
    pub fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.holder.id())).arg("--").arg(program);
        command
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
