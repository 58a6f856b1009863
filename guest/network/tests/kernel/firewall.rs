//! The firewall's table, as it is after many changes and beside other programs that change rules.

use std::process::Command;

use guest_network::{
    Firewall, FirewallLanding, FirewallLink, FirewallNetwork, FirewallPort, Protocol, Rules,
};

use crate::{in_namespaces, network, nft};

/// What a table says, but for the order in which sets tell their elements.
fn said(table: &str) -> Vec<String> {
    let text = nft(&format!("list table inet {table}")).replace(table, "");
    let mut words: Vec<String> =
        text.split([',', '{', '}', '\n', '\t']).map(|word| word.trim().to_owned()).collect();
    words.sort();
    words
}

/// Rules that follow from a number, so that neighbours have much in common.
fn rules_of(number: u32) -> Rules {
    let is = |bit: u32| number & (1 << bit) != 0;
    let networks = (0..6).filter(|index| is(*index)).map(|index| FirewallNetwork {
        internal: is(index + 1),
        direct: !is(index + 2),
        open: is(index + 3),
        trusted: if is(index + 2) { vec!["lo".to_owned()] } else { Vec::new() },
        // Neighbours, so that intervals touch.
        ..network(&format!("n{index}"), &format!("10.0.{index}.0/24"))
    });
    let ports = (0..6).filter(|index| is(index + 2)).flat_map(|index| {
        let port = |host: &str, container: &str| FirewallPort {
            protocol: if is(index) { Protocol::Tcp } else { Protocol::Udp },
            host: host.parse().unwrap(),
            host_port: 8000 + index as u16,
            container: container.parse().unwrap(),
            container_port: 80,
        };
        let last = if is(index + 3) { 2 } else { 3 };
        [
            port("0.0.0.0", &format!("10.0.{index}.{last}")),
            port("127.0.0.1", &format!("10.0.{index}.{last}")),
            port("::", &format!("fd00::{last}")),
        ]
    });
    let link = |index: u32| FirewallLink {
        bridge: "n0".to_owned(),
        from: [10, 0, 0, 2].into(),
        to: [10, 0, 0, 3].into(),
        protocol: Protocol::Tcp,
        port: 80 + index as u16,
    };
    let landing = |index: u32| {
        let last = if is(index) { 2 } else { 3 };
        [("198.18.0.3", format!("10.0.0.{last}")), ("[fd07::3]", format!("[fd00::{last}]"))].map(
            |(at, container)| FirewallLanding {
                at: format!("{at}:{}", 1024 + index).parse().unwrap(),
                container: format!("{container}:80").parse().unwrap(),
            },
        )
    };
    Rules {
        networks: networks.collect(),
        ports: ports.collect(),
        links: (0..4).filter(|index| is(index + 1)).map(link).collect(),
        landing: if is(5) {
            vec!["198.18.0.3".parse().unwrap(), "fd07::3".parse().unwrap()]
        } else {
            Vec::new()
        },
        landings: (0..4).filter(|index| is(index + 3)).flat_map(landing).collect(),
    }
}

#[test]
fn a_table_that_was_changed_says_what_one_written_at_once_says() {
    in_namespaces("firewall::a_table_that_was_changed_says_what_one_written_at_once_says", || async {
        let (changed, whole) = (Firewall::new("changed"), Firewall::new("whole"));
        // Rules that are written anew have new numbers.
        let numbers = || {
            let mut list = Command::new("nft");
            let output =
                list.args(["--handle", "list", "chain", "inet", "changed", "forward"]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            output.stdout
        };
        let mut number = 1u32;
        let mut last = rules_of(0);
        for _ in 0..24 {
            number = number.wrapping_mul(1_103_515_245).wrapping_add(12345);
            let rules = rules_of(number >> 16);
            let written = changed.apply(&last).await.unwrap();
            let before = numbers();
            let written = changed.change(written, &rules).await.unwrap();
            assert_eq!(numbers(), before, "only what is different was written");
            let again = changed.change(written.clone(), &rules).await.unwrap();
            assert_eq!(again, written);
            whole.apply(&rules).await.unwrap();
            assert_eq!(said("changed"), said("whole"), "{last:?} {rules:?}");
            last = rules;
        }
    });
}

#[test]
fn what_others_do_to_the_table_is_undone_by_the_next_change() {
    in_namespaces("firewall::what_others_do_to_the_table_is_undone_by_the_next_change", || async {
        let firewall = Firewall::new("engine");
        let (one, other) = (rules_of(0b1101), rules_of(0b1011));
        firewall.apply(&one).await.unwrap();
        let sound = said("engine");
        nft("add table inet neighbour; add set inet neighbour s { type ipv4_addr; }");
        for harm in [
            "flush ruleset",
            "delete table inet engine",
            "flush table inet engine",
            "flush chain inet engine forward",
            "flush set inet engine bridges",
            "insert rule inet engine forward accept",
        ] {
            let written = firewall.apply(&one).await.unwrap();
            nft(harm);
            let written = firewall.change(written, &other).await.unwrap();
            let written = firewall.change(written, &one).await.unwrap();
            assert_eq!(said("engine"), sound, "{harm}");
            nft(harm);
            firewall.change(written, &one).await.unwrap();
            assert_eq!(said("engine"), sound, "{harm}, and nothing new to say");
        }
    });
}

#[test]
fn a_change_that_is_refused_leaves_what_was_there() {
    in_namespaces("firewall::a_change_that_is_refused_leaves_what_was_there", || async {
        let firewall = Firewall::new("engine");
        let good = Rules { networks: vec![network("a0", "10.0.0.0/8")], ..Rules::default() };
        let written = firewall.apply(&good).await.unwrap();
        let before = nft("list ruleset");
        let networks = vec![network("a0", "10.0.0.0/8"), network("a0", "10.1.0.0/16")];
        let error = firewall.change(written, &Rules { networks, ..Rules::default() }).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot write firewall table `engine`: "), "{error}");
        assert_eq!(nft("list ruleset"), before, "all or nothing");
    });
}
