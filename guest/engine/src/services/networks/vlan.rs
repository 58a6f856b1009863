//! VLANs as parents of macvlan and ipvlan networks: `-o parent=eth0.10` is VLAN 10 of `eth0`, whose interface is made
//! with the network where it is not there, and goes with the last network on it.

use crate::failure::Failure;

/// IEEE 802.1Q has twelve bits for it, and keeps the first and the last value for itself.
const ID_MAX: u16 = 4094;

/// A VLAN of an interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vlan {
    pub parent: String,
    pub id: u16,
}

impl Vlan {
    /// Whether an interface of this name is a VLAN's.
    pub fn is_named(name: &str) -> bool {
        Self::of(name).is_ok_and(|vlan| vlan.is_some())
    }

    /// What the name of an interface stands for. `None` without a dot, in libnetwork's words where it is no VLAN.
    pub fn of(name: &str) -> Result<Option<Self>, Failure> {
        if !name.contains('.') {
            return Ok(None);
        }
        let (parent, id) = match name.split('.').collect::<Vec<_>>()[..] {
            [parent, id] if !parent.is_empty() => (parent, id),
            _ => {
                return Err(Failure::invalid(format!(
                    "required interface name format is: name.vlan_id, ex. eth0.10 for vlan 10, instead received {name}"
                )));
            }
        };
        let number: i64 = id.parse().map_err(|_| {
            Failure::invalid(format!("unable to parse a valid vlan id from: {id} (ex. eth0.10 for vlan 10)"))
        })?;
        match u16::try_from(number) {
            Ok(id @ 1..=ID_MAX) => Ok(Some(Self { parent: parent.to_owned(), id })),
            _ => Err(Failure::invalid(format!("vlan id must be between 1-4094, received: {number}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_number_are_a_vlan() {
        let vlan = |parent: &str, id| Some(Vlan { parent: parent.to_owned(), id });
        assert_eq!(Vlan::of("eth0.10"), Ok(vlan("eth0", 10)));
        assert_eq!(Vlan::of("eth0.4094"), Ok(vlan("eth0", 4094)));
        assert_eq!(Vlan::of("eth0"), Ok(None));
    }

    #[test]
    fn what_is_none_is_told() {
        let why = |name: &str| Vlan::of(name).unwrap_err().message;
        for name in ["eth0.10.20", ".10"] {
            assert!(why(name).ends_with(&format!("instead received {name}")));
        }
        for (name, id) in [("eth0.ten", "ten"), ("eth0.", "")] {
            assert!(why(name).starts_with(&format!("unable to parse a valid vlan id from: {id} ")));
        }
        for number in ["0", "4095", "-1", "70000"] {
            let said = why(&format!("eth0.{number}"));
            assert_eq!(said, format!("vlan id must be between 1-4094, received: {number}"));
        }
    }
}
