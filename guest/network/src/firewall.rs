//! The engine's own nftables table, written as a whole in one transaction.
//!
//! What the table should say follows from the list of networks, so every change is "replace the table": no drift, no
//! half state, and a table left by an engine that died is simply overwritten. No other table is read or touched.
//!
//! ```text
//! table inet engine {
//!     chain forward {
//!         type filter hook forward priority filter; policy accept;
//!         ct state established,related accept
//!         iifname "engine0" oifname "engine0" accept      containers of one network reach each other
//!         oifname "engine0" drop                          nobody else starts a conversation with them
//!         iifname "engine0" accept                        they may talk to the rest
//!     }
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr 172.17.0.0/16 oifname != "engine0" masquerade
//!     }
//! }
//! ```

use std::borrow::Cow;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use ipnet::Ipv4Net;
use nftables::batch::Batch;
use nftables::expr::{CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix};
use nftables::schema::{Chain, NfListObject, Rule, Table};
use nftables::stmt::{Match, Operator, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

/// Longest a transaction may take; `nft` needs milliseconds, a hung one must not hold a container's start for ever.
const NFT_DEADLINE: Duration = Duration::from_secs(20);
/// nftables' own numbers for the priorities `filter` and `srcnat`.
const PRIORITY_FILTER: i32 = 0;
const PRIORITY_SOURCE_NAT: i32 = 100;

/// The table of one engine. Engines on one computer use different names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firewall {
    table: String,
}

/// What the firewall knows of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallNetwork {
    /// The bridge's interface name.
    pub bridge: String,
    /// The addresses to hide behind the outgoing interface's.
    pub subnet: Ipv4Net,
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

    /// Replaces the table by the rules for `networks`, in one transaction: before it the old rules count, after it
    /// the new. Connections that exist go on. Dropped halfway, either nothing or everything is done.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs; then nothing has changed.
    pub async fn apply(&self, networks: &[FirewallNetwork]) -> Result<(), FirewallError> {
        let mut batch = self.removal();
        for object in self.rules(networks) {
            batch.add(object);
        }
        self.run(batch).await
    }

    /// Removes the table. One that is not there is fine.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs.
    pub async fn remove(&self) -> Result<(), FirewallError> {
        self.run(self.removal()).await
    }

    /// Deleting a table that is not there fails, adding one that is there does not: so add, then delete.
    fn removal(&self) -> Batch<'_> {
        let mut batch = Batch::new();
        batch.add(self.table());
        batch.delete(self.table());
        batch
    }

    fn table(&self) -> NfListObject<'_> {
        NfListObject::Table(Table { family: NfFamily::INet, name: Cow::from(&self.table), handle: None })
    }

    fn rules<'a>(&'a self, networks: &'a [FirewallNetwork]) -> Vec<NfListObject<'a>> {
        let mut objects = vec![
            self.table(),
            self.chain("forward", NfChainType::Filter, NfHook::Forward, PRIORITY_FILTER),
            self.chain("postrouting", NfChainType::NAT, NfHook::Postrouting, PRIORITY_SOURCE_NAT),
        ];
        let mut forward = |statements| objects.push(self.rule("forward", statements));
        forward(vec![is_reply(), Statement::Accept(None)]);
        for network in networks {
            forward(vec![
                interface(MetaKey::Iifname, Operator::EQ, network),
                interface(MetaKey::Oifname, Operator::EQ, network),
                Statement::Accept(None),
            ]);
        }
        for network in networks {
            forward(vec![interface(MetaKey::Oifname, Operator::EQ, network), Statement::Drop(None)]);
        }
        for network in networks {
            forward(vec![interface(MetaKey::Iifname, Operator::EQ, network), Statement::Accept(None)]);
        }
        for network in networks {
            objects.push(self.rule(
                "postrouting",
                vec![
                    from_subnet(network.subnet),
                    interface(MetaKey::Oifname, Operator::NEQ, network),
                    Statement::Masquerade(None),
                ],
            ));
        }
        objects
    }

    fn chain(&self, name: &'static str, kind: NfChainType, hook: NfHook, priority: i32) -> NfListObject<'_> {
        NfListObject::Chain(Chain {
            family: NfFamily::INet,
            table: Cow::from(&self.table),
            name: name.into(),
            _type: Some(kind),
            hook: Some(hook),
            prio: Some(priority),
            policy: Some(NfChainPolicy::Accept),
            ..Chain::default()
        })
    }

    fn rule<'a>(&'a self, chain: &'static str, statements: Vec<Statement<'a>>) -> NfListObject<'a> {
        NfListObject::Rule(Rule {
            family: NfFamily::INet,
            table: Cow::from(&self.table),
            chain: chain.into(),
            expr: statements.into(),
            ..Rule::default()
        })
    }

    async fn run(&self, batch: Batch<'_>) -> Result<(), FirewallError> {
        let table = || self.table.clone();
        let failed = |source| FirewallError::Run { table: table(), source };
        let json = serde_json::to_vec(&batch.to_nftables()).map_err(|error| failed(error.into()))?;
        let mut child = Command::new("nft")
            .args(["-j", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let mut stdin = child.stdin.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let conversation = async {
            // Should nft leave early, its exit status and message say more than the broken pipe.
            let written = stdin.write_all(&json).await;
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

fn is_reply() -> Statement<'static> {
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::CT(CT { key: "state".into(), family: None, dir: None })),
        right: Expression::List(vec![
            Expression::String("established".into()),
            Expression::String("related".into()),
        ]),
        op: Operator::IN,
    })
}

fn interface(key: MetaKey, op: Operator, network: &FirewallNetwork) -> Statement<'_> {
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::Meta(Meta { key })),
        right: Expression::String(Cow::from(&network.bridge)),
        op,
    })
}

fn from_subnet(subnet: Ipv4Net) -> Statement<'static> {
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::Payload(Payload::PayloadField(PayloadField {
            protocol: "ip".into(),
            field: "saddr".into(),
        }))),
        right: Expression::Named(NamedExpression::Prefix(Prefix {
            addr: Box::new(Expression::String(subnet.network().to_string().into())),
            len: subnet.prefix_len().into(),
        })),
        op: Operator::EQ,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_said_about_our_own_table_only() {
        let firewall = Firewall::new("engine-test");
        let network = FirewallNetwork { bridge: "engine0".into(), subnet: "172.17.0.0/16".parse().unwrap() };
        for object in firewall.rules(&[network]) {
            let table = match object {
                NfListObject::Table(table) => table.name,
                NfListObject::Chain(chain) => chain.table,
                NfListObject::Rule(rule) => rule.table,
                other => panic!("{other:?}"),
            };
            assert_eq!(table, "engine-test");
        }
    }

    #[test]
    fn containers_of_a_network_are_let_through_before_others_are_dropped() {
        let network = |bridge: &str, subnet: &str| FirewallNetwork {
            bridge: bridge.into(),
            subnet: subnet.parse().unwrap(),
        };
        let networks = [network("a0", "10.0.0.0/24"), network("b0", "10.0.1.0/24")];
        let firewall = Firewall::new("engine");
        let verdicts: Vec<char> = firewall
            .rules(&networks)
            .iter()
            .filter_map(|object| match object {
                NfListObject::Rule(rule) => rule.expr.last().map(|last| match last {
                    Statement::Accept(_) => 'a',
                    Statement::Drop(_) => 'd',
                    Statement::Masquerade(_) => 'm',
                    other => panic!("{other:?}"),
                }),
                _ => None,
            })
            .collect();
        assert_eq!(verdicts.iter().collect::<String>(), "aaaddaamm");
    }
}
