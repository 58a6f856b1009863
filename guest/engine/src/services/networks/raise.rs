//! The kernel's side of a network: its interface and its rules, made and taken away.

use guest_network::{
    Bridge, BridgeSpec, ensure_driver, ensure_dummy, ensure_vlan, forwarding, remove_dummy, remove_vlan,
};
use ipnet::IpNet;

use super::options::Kind;
use super::record::{Driver, NetworkRecord};
use super::service::Networks;
use super::vlan::Vlan;
use crate::failure::Failure;

/// Largest packet where nobody says otherwise.
const MTU_DEFAULT: u32 = 1500;

impl Networks {
    /// Makes sure that a network's interface is there and guarded, once.
    pub(super) async fn raise(&self, id: &str) -> Result<(), Failure> {
        let (raised, record) = {
            let state = self.state();
            let Some(net) = state.networks.get(id) else {
                return Err(Failure::not_found(guest_api::error::no_such_network(id)));
            };
            (net.raised.clone(), net.record.clone())
        };
        raised.get_or_try_init(|| self.raise_now(&record)).await.copied()
    }

    async fn raise_now(&self, record: &NetworkRecord) -> Result<(), Failure> {
        let setup = |error| Failure::internal(format!("cannot set up network {}", record.name), &error);
        match record.driver {
            Driver::Macvlan | Driver::Ipvlan => ensure_driver(record.driver.name()).await.map_err(setup)?,
            Driver::Bridge | Driver::Host | Driver::Null => {}
        }
        match record.driver {
            Driver::Bridge => self.raise_bridge(record).await,
            Driver::Macvlan | Driver::Ipvlan if has_own_parent(record) => self.raise_parent(record).await,
            Driver::Macvlan | Driver::Ipvlan => self.find_parent(record).await,
            Driver::Host | Driver::Null => Ok(()),
        }
    }

    /// The parent of a network that was given none: an interface that leads nowhere, as with dockerd.
    async fn raise_parent(&self, record: &NetworkRecord) -> Result<(), Failure> {
        ensure_dummy(&record.interface)
            .await
            .map_err(|error| Failure::internal(format!("cannot set up network {}", record.name), &error))?;
        if let Some(net) = self.state().networks.get_mut(&record.id) {
            net.guarded = true;
        }
        Ok(())
    }

    /// The parent that a network was given is an interface of the host, or a VLAN of one, which is made.
    async fn find_parent(&self, record: &NetworkRecord) -> Result<(), Failure> {
        if is_interface(&record.interface) {
            return Ok(());
        }
        let Some(Vlan { parent, id }) = Vlan::of(&record.interface)? else {
            return Err(Failure::invalid(format!(
                "there is no interface `{}` on this computer for the {} network {} to hang on; make it first, or name \
                 another one with `-o parent=`",
                record.interface,
                record.driver.name(),
                record.name
            )));
        };
        if !is_interface(&parent) {
            return Err(Failure::invalid(format!("-o parent interface was not found on the host: {parent}")));
        }
        ensure_vlan(&parent, id, &record.interface, &self.mark())
            .await
            .map_err(|error| Failure::internal(format!("cannot set up network {}", record.name), &error))
    }

    /// What interfaces that this engine made bear.
    pub(super) fn mark(&self) -> String {
        format!("made for networks of {}", self.choice.firewall_table)
    }

    async fn raise_bridge(&self, record: &NetworkRecord) -> Result<(), Failure> {
        let settings = super::options::Settings::of(record);
        let inhibit = settings.bridge().is_some_and(|bridge| bridge.inhibit_ipv4);
        let addresses: Vec<IpNet> = record
            .pools
            .iter()
            .filter(|pool| !(inhibit && pool.subnet.addr().is_ipv4()))
            .filter_map(|pool| Some(IpNet::new_assert(pool.gateway?, pool.subnet.prefix_len())))
            .collect();
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::internal(format!("cannot set up network {}", record.name), error)
        };
        let spec = BridgeSpec {
            name: record.interface.clone(),
            addresses,
            mtu: settings.mtu.unwrap_or(MTU_DEFAULT),
            owned: record.owns_interface && self.is_ours(record),
        };
        let bridge = Bridge::ensure(&spec).await.map_err(|error| failed(&error))?;
        {
            let mut state = self.state();
            if let Some(net) = state.networks.get_mut(&record.id) {
                net.guarded = true;
                // One that was there before somebody named it is not ours to remove.
                if net.phase == super::state::Phase::Making && !bridge.was_made() {
                    let mut record = NetworkRecord::clone(&net.record);
                    record.owns_interface = false;
                    net.record = record.into();
                }
            }
        }
        forwarding::enable().map_err(|error| failed(&error))?;
        if spec.owned && settings.bridge().is_some_and(|bridge| !bridge.direct) {
            forwarding::answer_for_neighbours(&spec.name).map_err(|error| failed(&error))?;
        }
        if record.ipv6 {
            forwarding::enable_ipv6().map_err(|error| failed(&error))?;
        }
        self.firewall.refresh().await
    }

    /// Whether a bridge of this name can only have been made by us: it is named after the network's id, or it is the
    /// default one.
    fn is_ours(&self, record: &NetworkRecord) -> bool {
        record.interface == self.choice.name || record.interface == format!("br-{}", &record.id[..12])
    }

    /// Takes a network's rules and interface away. What is not there is fine.
    pub(super) async fn lower(&self, id: &str) -> Result<(), Failure> {
        let (record, was_made, is_shared) = {
            let mut state = self.state();
            let Some(net) = state.networks.get_mut(id) else { return Ok(()) };
            // One that has a record was made once, perhaps before this engine was started and not looked at since.
            let was_made = std::mem::take(&mut net.guarded) || net.phase != super::state::Phase::Making;
            net.raised = std::sync::Arc::default();
            let record = net.record.clone();
            let same =
                |net: &super::state::Net| net.record.id != id && net.record.interface == record.interface;
            let is_shared = state.networks.values().any(same);
            (record, was_made, is_shared)
        };
        let hangs = matches!(record.driver, Driver::Macvlan | Driver::Ipvlan) && !has_own_parent(&record);
        if hangs && !is_shared && Vlan::is_named(&record.interface) {
            remove_vlan(&record.interface, &self.mark()).await.map_err(|error| {
                Failure::internal(format!("cannot remove the interface of network {}", record.name), &error)
            })?;
        }
        if !was_made {
            return Ok(());
        }
        if record.driver == Driver::Bridge && record.owns_interface {
            Bridge::remove(&record.interface).await.map_err(|error| {
                Failure::internal(format!("cannot remove the interface of network {}", record.name), &error)
            })?;
        }
        if has_own_parent(&record) {
            remove_dummy(&record.interface).await.map_err(|error| {
                Failure::internal(format!("cannot remove the interface of network {}", record.name), &error)
            })?;
        }
        self.firewall.refresh().await
    }

    /// Makes the networks that are to be there from the start: those of the user, and the default one in the machine,
    /// or where it is there from before.
    pub async fn raise_early(&self) {
        let wanted: Vec<(String, String)> = {
            let state = self.state();
            let early = |record: &NetworkRecord| {
                !record.is_predefined()
                    || (record.driver == Driver::Bridge
                        && (self.choice.early || is_interface(&record.interface)))
            };
            let nets = state.networks.values().filter(|net| !matches!(net.settings.kind, Kind::None));
            nets.filter(|net| early(&net.record))
                .map(|net| (net.record.id.clone(), net.record.name.clone()))
                .collect()
        };
        for (id, name) in wanted {
            if let Err(error) = self.raise(&id).await {
                tracing::warn!(network = name, %error, "the network is not there yet; the first container tries again");
            }
        }
    }
}

/// Whether this computer has an interface. Not by /sys/class/net, which shows the namespace sysfs was mounted in.
pub(super) fn is_interface(wanted: &str) -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    table.lines().filter_map(|line| line.split_once(':')).any(|(name, _)| name.trim() == wanted)
}

/// A macvlan or ipvlan network without an interface of the host.
pub(super) fn has_own_parent(record: &NetworkRecord) -> bool {
    matches!(record.driver, Driver::Macvlan | Driver::Ipvlan)
        && record.options.get("parent").is_none_or(String::is_empty)
}
