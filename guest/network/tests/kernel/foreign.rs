//! Firewalls of other programs, as they are really listed.

use guest_network::{Firewall, Incoming, Protocol, Rules};

use crate::{in_namespaces, network, nft};

#[test]
fn a_foreign_chain_that_drops_is_found_and_one_that_may_not_is_not() {
    in_namespaces("foreign::a_foreign_chain_that_drops_is_found_and_one_that_may_not_is_not", || async {
        let firewall = Firewall::new("engine");
        let sealed = network("br0", "10.0.0.0/24");
        firewall.apply(&Rules { networks: vec![sealed], ..Rules::default() }).await.unwrap();
        let packet = Incoming {
            from: "up0".into(),
            bridge: "br0".into(),
            address: [10, 0, 0, 2].into(),
            protocol: Protocol::Tcp,
            port: 80,
            published: true,
        };
        assert_eq!(firewall.dropped_by_others(&packet).await.unwrap(), None, "our own is not foreign");
        for (rules, drops) in [
            ("", Some(true)),
            ("ct state established,related accept; ip daddr 10.0.1.0/24 accept", Some(true)),
            ("ip daddr { 10.0.0.0/24, 10.9.0.1 } accept", None),
            ("ip daddr 10.0.0.0/24 tcp dport 79-81 accept", None),
            ("udp dport 80 accept; tcp dport { 81, 443 } accept; iifname \"docker0\" accept", Some(true)),
            ("oifname \"br*\" accept", None),
            ("ct status dnat accept", None),
            ("oifname != \"br0\" accept; jump there", Some(false)),
            ("ip saddr 192.0.2.0/24 accept", None),
            ("ip saddr 192.0.2.0/24 drop; meta mark 1 jump there", Some(true)),
            ("meta l4proto tcp return; accept", Some(true)),
            ("ip protocol udp accept; ip protocol tcp return; accept", Some(true)),
            ("iifname \"up0\" goto other; accept", Some(true)),
            ("tcp dport 80 jump accepting", None),
        ] {
            nft("add table ip filter; delete table ip filter; add table ip filter");
            nft(&format!(
                "table ip filter {{ chain there {{ reject; }}; chain other {{ oifname \"lo\" accept; }}; chain accepting {{ \
                 accept; }}; chain FORWARD {{ type filter hook forward priority 0; policy drop; {rules}; }}; }}"
            ));
            let found = firewall.dropped_by_others(&packet).await.unwrap();
            assert_eq!(found.as_ref().map(|found| found.by_policy), drops, "{rules}");
            if let Some(found) = found {
                let place = (found.family.as_str(), found.table.as_str(), found.chain.as_str());
                assert_eq!(place, ("ip", "filter", "FORWARD"));
                assert!(found.chains.contains(&"there".to_owned()), "{found:?}");
            }
        }
        nft("delete table ip filter");
        nft("table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }");
        assert_eq!(firewall.dropped_by_others(&packet).await.unwrap(), None, "another family's");
        nft("table inet x { chain c { type filter hook forward priority 5; policy accept; reject; }; }");
        let found = firewall.dropped_by_others(&packet).await.unwrap().unwrap();
        assert_eq!((found.table.as_str(), found.by_policy), ("x", false));
    });
}
