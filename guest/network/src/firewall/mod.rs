//! The engine's own nftables table, each change of it one transaction.
//!
//! What the table should say follows from the networks and the published ports. It is said as a whole at first, and
//! whenever anybody has changed any rules since we last wrote: no drift, no half state, and a table that somebody flushed
//! or that an engine left when it died is whole afterwards. While the kernel's count of changes tells that nobody has,
//! only what is different is said. The rules never change; they look things up in sets and maps, which hold the networks.
//! Starting a container without published ports writes nothing. No other table is read or touched.
//!
//! ```text
//! raw          what comes from a container for a loopback address of the host: dropped
//! prerouting   from outside, for an address at which connections land: to the container.
//!              For an address of the host and a published port: to the container, unless a relay is to carry it
//! output       the same, from the host itself, IPv4 loopback addresses included
//! input        what landed for a loopback address of the host: from there
//! forward      for an address at which connections land, but not led further: refused.
//!              Replies; between containers of a network, or what links of one open; published ports; trusted
//!              interfaces; out: accepted. Into or out of an internal network, between containers of a network whose
//!              containers are apart, and anything else that is for a container: dropped
//! postrouting  what leaves a network, what landed, and what a container sends to its own published port: from our
//!              address
//! ```

mod foreign;
mod generation;
mod script;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

pub use self::foreign::{Foreign, Incoming, dropped_by};
use self::generation::Generation;
pub use self::generation::GenerationError;
use self::script::Elements;
use crate::bridge::is_interface_name;

/// Longest a transaction may take; `nft` needs milliseconds, a hung one must not hold a container's start for ever.
const NFT_DEADLINE: Duration = Duration::from_secs(20);

/// The table of one engine. Engines on one computer use different names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firewall {
    table: String,
}

/// What the firewall knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// The networks.
    pub networks: Vec<FirewallNetwork>,
    /// The published ports.
    pub ports: Vec<FirewallPort>,
    /// What is open between containers of a network that are otherwise apart.
    pub links: Vec<FirewallLink>,
    /// Addresses at which connections from outside land, and which are nobody's: one of each family, or none.
    pub landing: Vec<IpAddr>,
    /// Where those connections go.
    pub landings: Vec<FirewallLanding>,
}

/// What a table was made to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    elements: Elements,
    /// The kernel's count of changes right after; `None` when others made some at the same time.
    generation: Option<Generation>,
}

/// What the firewall knows of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FirewallNetwork {
    /// The bridge's interface name.
    pub bridge: String,
    /// The network's addresses.
    pub subnets: Vec<IpNet>,
    /// Nothing goes in or out.
    pub internal: bool,
    /// Its containers reach each other.
    pub direct: bool,
    /// What its containers send to published ports is for a program of the host that carries it on.
    pub relayed: bool,
    /// Those of its addresses that hide behind the outgoing interface's.
    pub hidden: Vec<IpNet>,
    /// Its containers can be reached directly from everywhere.
    pub open: bool,
    /// Interfaces of the host from which its containers may be reached directly.
    pub trusted: Vec<String>,
}

/// One port of a container that is open to one other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirewallLink {
    /// The network's bridge.
    pub bridge: String,
    /// Who asks.
    pub from: Ipv4Addr,
    /// Who answers.
    pub to: Ipv4Addr,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirewallPort {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: Protocol,
    /// The host's address, or the unspecified one for all.
    pub host: IpAddr,
    /// The host's port.
    pub host_port: u16,
    /// The container's address, of the same family.
    pub container: IpAddr,
    /// The container's port.
    pub container_port: u16,
}

/// One port at which TCP connections from outside land, as if the host's own address in the container's network had made them,
/// or, for one of the host's loopback addresses, that.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirewallLanding {
    /// One of the addresses of [`Rules::landing`], and the port.
    pub at: SocketAddr,
    /// The container's address, of the same family, and its port. A loopback address of the host needs
    /// [`enable_loopback`](crate::forwarding::enable_loopback) for the interface to the outside.
    pub container: SocketAddr,
}

/// A transport with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// `tcp`, `udp` or `sctp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// The number in an IP header (IANA's protocol numbers).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

impl std::str::FromStr for Protocol {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Tcp, Self::Udp, Self::Sctp]
            .into_iter()
            .find(|protocol| text.eq_ignore_ascii_case(protocol.name()))
            .ok_or(())
    }
}

/// Why the rules could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// `nft` cannot be run.
    #[error("cannot run `nft` to write firewall table `{table}`")]
    Run {
        /// The table.
        table: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `nft` did not like the rules.
    #[error("cannot write firewall table `{table}`: {reason}")]
    Refused {
        /// The table.
        table: String,
        /// What `nft` printed.
        reason: String,
    },
    /// The kernel does not tell whether anybody changed rules.
    #[error("cannot write firewall table `{table}`")]
    Generation {
        /// The table.
        table: String,
        /// Why.
        #[source]
        source: GenerationError,
    },
    /// `nft` hangs.
    #[error("cannot write firewall table `{table}`: `nft` did not answer within {} s", NFT_DEADLINE.as_secs())]
    Deadline {
        /// The table.
        table: String,
    },
}

impl Firewall {
    /// The table called `table` in the family `inet`. Nothing is written yet.
    pub fn new(table: impl Into<String>) -> Self {
        Self { table: table.into() }
    }

    /// Makes the table say exactly these rules, in one transaction: before it the old ones count, after it the new.
    /// Connections that exist go on. Dropped halfway, either nothing or everything is done.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs; then nothing has changed.
    pub async fn apply(&self, rules: &Rules) -> Result<Written, FirewallError> {
        self.check(rules)?;
        let elements = script::elements(rules);
        let before = self.generation().await?;
        self.run(script::whole(&self.table, &elements)).await?;
        let after = self.generation().await?;
        Ok(Written { elements, generation: (after == before.next()).then_some(after) })
    }

    /// The same, where this is what the table was last made to say: what is different is written, or everything when
    /// anybody has changed any rules since, be it only while we wrote.
    ///
    /// # Errors
    /// As [`Firewall::apply`].
    pub async fn change(&self, written: Written, rules: &Rules) -> Result<Written, FirewallError> {
        self.check(rules)?;
        let before = self.generation().await?;
        if written.generation != Some(before) {
            return self.apply(rules).await;
        }
        let elements = script::elements(rules);
        let script = script::difference(&self.table, &written.elements, &elements);
        if script.is_empty() {
            return Ok(written);
        }
        match self.run(script).await {
            Ok(()) => {}
            // By whom the table was made smaller at the last moment, or why it cannot be done, the whole tells.
            Err(FirewallError::Refused { .. }) => return self.apply(rules).await,
            Err(error) => return Err(error),
        }
        let after = self.generation().await?;
        if after == before.next() {
            return Ok(Written { elements, generation: Some(after) });
        }
        self.apply(rules).await
    }

    fn check(&self, rules: &Rules) -> Result<(), FirewallError> {
        let trusted = rules.networks.iter().flat_map(|network| &network.trusted);
        let bridges = rules.networks.iter().map(|network| &network.bridge);
        let refused = trusted
            .chain(bridges)
            .chain(rules.links.iter().map(|link| &link.bridge))
            .find(|name| !is_interface_name(name))
            .map(|name| format!("`{name}` cannot name an interface"));
        match refused {
            Some(reason) => Err(FirewallError::Refused { table: self.table.clone(), reason }),
            None => Ok(()),
        }
    }

    async fn generation(&self) -> Result<Generation, FirewallError> {
        let failed = |source| FirewallError::Generation { table: self.table.clone(), source };
        crate::blocking(Generation::now).await.map_err(|error| failed(error.into()))?.map_err(failed)
    }

    /// Removes the table. One that is not there is fine.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs.
    pub async fn remove(&self) -> Result<(), FirewallError> {
        let table = &self.table;
        self.run(format!("add table inet {table}\ndelete table inet {table}\n")).await
    }

    /// Whether the table is there; what it says is not looked at.
    ///
    /// # Errors
    /// When `nft` is missing or hangs.
    pub async fn stands(&self) -> Result<bool, FirewallError> {
        match self.run(format!("list table inet {}\n", self.table)).await {
            Ok(()) => Ok(true),
            Err(FirewallError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The chain of another program that drops such packets, if one does.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs.
    pub async fn dropped_by_others(&self, packet: &Incoming) -> Result<Option<Foreign>, FirewallError> {
        let table = || self.table.clone();
        let mut nft = Command::new("nft");
        let list = nft.args(["--json", "list", "ruleset"]).stdin(Stdio::null()).kill_on_drop(true).output();
        let output = timeout(NFT_DEADLINE, list)
            .await
            .map_err(|_| FirewallError::Deadline { table: table() })?
            .map_err(|source| FirewallError::Run { table: table(), source })?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(FirewallError::Refused { table: table(), reason });
        }
        Ok(dropped_by(&output.stdout, &self.table, packet))
    }

    async fn run(&self, script: String) -> Result<(), FirewallError> {
        let table = || self.table.clone();
        let failed = |source| FirewallError::Run { table: table(), source };
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let mut stdin = child.stdin.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let conversation = async {
            // Should nft leave early, its exit status and message say more than the broken pipe.
            let written = stdin.write_all(script.as_bytes()).await;
            drop(stdin);
            let output = child.wait_with_output().await?;
            if output.status.success() { written.map(|()| output) } else { Ok(output) }
        };
        let output = timeout(NFT_DEADLINE, conversation)
            .await
            .map_err(|_| FirewallError::Deadline { table: table() })?
            .map_err(failed)?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let reason = match text.trim() {
            "" => output.status.to_string(),
            text => text.to_owned(),
        };
        Err(FirewallError::Refused { table: table(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_that_would_be_rules_are_refused() {
        let firewall = Firewall::new("engine");
        let network = FirewallNetwork { bridge: "a\" drop".into(), ..FirewallNetwork::default() };
        let rules = Rules { networks: vec![network], ..Rules::default() };
        assert!(matches!(firewall.apply(&rules).await, Err(FirewallError::Refused { .. })));
    }
}
