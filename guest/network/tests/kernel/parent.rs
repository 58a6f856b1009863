//! Interfaces that are made to be parents.

use guest_network::{ensure_vlan, remove_vlan};

use crate::{in_namespaces, interfaces, ip};

const MINE: &str = "made for networks of engine";

#[test]
fn a_vlan_is_made_once_and_removed_by_whom_it_belongs_to() {
    in_namespaces("parent::a_vlan_is_made_once_and_removed_by_whom_it_belongs_to", || async {
        ip(&["link", "add", "up0", "type", "bridge"]);
        let before = interfaces();
        let missing = ensure_vlan("none0", 10, "none0.10", MINE).await.unwrap_err();
        assert!(missing.to_string().contains("find interface `none0`"), "{missing}");
        if let Err(error) = ensure_vlan("up0", 10, "up0.10", MINE).await {
            let why = "create the interface `up0.10` for VLAN 10 of `up0`: this kernel has no 8021q driver (module \
                       `8021q`)";
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(interfaces(), before);
            return;
        }
        ensure_vlan("up0", 10, "up0.10", MINE).await.unwrap();
        let shown = ip(&["-d", "link", "show", "up0.10"]);
        for word in ["up0.10@up0", "id 10", MINE, ",UP"] {
            assert!(shown.contains(word), "{word} is not in {shown}");
        }
        assert!(!remove_vlan("up0.10", "somebody else").await.unwrap());
        assert!(!remove_vlan("up0", MINE).await.unwrap());
        assert!(remove_vlan("up0.10", MINE).await.unwrap());
        assert!(!remove_vlan("up0.10", MINE).await.unwrap());
        ip(&["link", "add", "link", "up0", "name", "up0.11", "type", "vlan", "id", "11"]);
        ensure_vlan("up0", 11, "up0.11", MINE).await.unwrap();
        assert!(!remove_vlan("up0.11", MINE).await.unwrap(), "the user made it");
    });
}
