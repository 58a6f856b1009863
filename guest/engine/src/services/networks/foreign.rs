//! A link of the way to a container: whether another program's firewall drops what the host passes on to it.

use std::net::IpAddr;

use guest_api::network::WayLink;
use guest_network::{Foreign, Incoming};

use super::routes;
use super::service::Networks;
use super::state::{Member, State};
use super::why::{Port, broken, holds};

const LINK: &str = "firewall";

impl Networks {
    /// Natively: the rules of others that packets from outside have to pass. `None` where that is nobody's matter: in the
    /// machine, and where nothing leads outside.
    pub(super) async fn foreign_rules(
        &self,
        way: Option<(String, IpAddr)>,
        port: Port,
        published: bool,
    ) -> Option<WayLink> {
        let (bridge, address) = way.filter(|_| self.outside.is_none())?;
        let from = routes::uplink()?;
        let packet = Incoming { from, bridge, address, protocol: port.0, port: port.1, published };
        Some(match self.firewall.dropped_by_others(&packet).await {
            Ok(None) => holds(LINK, format!("no other program's rules drop packets to {}", packet.bridge)),
            Ok(Some(foreign)) => told(&foreign, &packet),
            Err(failure) => holds(
                LINK,
                format!("whether another program's rules drop packets is not known: {}", failure.message),
            ),
        })
    }
}

/// The bridge by which a container is reached from outside, and its address there.
pub(super) fn way_in(state: &State, member: &Member) -> Option<(String, IpAddr)> {
    member.endpoints.iter().find_map(|endpoint| {
        let net = state.networks.get(&endpoint.network_id)?;
        net.settings.bridge().filter(|_| !net.record.internal)?;
        Some((net.record.interface.clone(), endpoint.ipv4()?.addr()))
    })
}

fn told(foreign: &Foreign, packet: &Incoming) -> WayLink {
    let Foreign { family, table, chain, by_policy, chains } = foreign;
    let Incoming { bridge, from, .. } = packet;
    let how = if *by_policy { "drops what none of its rules accepts (policy drop)" } else { "refuses" };
    let (who, cure) = match (family.as_str(), table.as_str(), chain.as_str()) {
        (_, "firewalld", _) => (
            "firewalld",
            format!(
                "`firewall-cmd --permanent --zone=trusted --add-interface={bridge}`, then `firewall-cmd --reload`"
            ),
        ),
        (_, _, _) if chains.iter().any(|name| name.starts_with("ufw")) => {
            ("ufw", format!("`ufw route allow out on {bridge}`, and `ufw route allow in on {bridge}`"))
        }
        ("ip", "filter", "FORWARD") => (
            "iptables",
            format!(
                "`iptables -I FORWARD -o {bridge} -j ACCEPT`, and `iptables -I FORWARD -i {bridge} -j ACCEPT`"
            ),
        ),
        _ => (
            "another program",
            format!(
                "`nft insert rule {family} {table} {chain} oifname {bridge} accept`, and the same with iifname; `nft list \
                 table {family} {table}` shows whose it is"
            ),
        ),
    };
    let says = format!(
        "the firewall of {who} (chain {chain} of table {family} {table}) {how}: packets from {from} to {bridge} are lost"
    );
    broken(LINK, says, cure)
}

#[cfg(test)]
mod tests {
    use guest_network::Protocol;

    use super::*;

    #[test]
    fn the_cure_is_the_programs_own() {
        let packet = Incoming {
            from: "eth0".to_owned(),
            bridge: "engine0".to_owned(),
            address: [172, 17, 0, 2].into(),
            protocol: Protocol::Tcp,
            port: 80,
            published: true,
        };
        let link = |family: &str, table: &str, chain: &str, other: &str| {
            let [family, table, chain] = [family, table, chain].map(str::to_owned);
            let chains = vec![chain.clone(), other.to_owned()];
            told(&Foreign { family, table, chain, by_policy: true, chains }, &packet)
        };
        for (place, other, who, cure) in [
            (["inet", "firewalld", "filter_FORWARD"], "", "of firewalld ", "--add-interface=engine0"),
            (["ip", "filter", "FORWARD"], "ufw-user-forward", "of ufw ", "ufw route allow out on engine0"),
            (["ip", "filter", "FORWARD"], "DOCKER", "of iptables ", "iptables -I FORWARD -o engine0"),
            (["inet", "mine", "f"], "", "of another program ", "nft insert rule inet mine f oifname engine0"),
        ] {
            let link = link(place[0], place[1], place[2], other);
            assert!(!link.holds && link.says.contains(who) && link.cure.contains(cure), "{link:?}");
            assert!(link.says.contains("packets from eth0 to engine0 are lost"), "{link:?}");
        }
    }
}
