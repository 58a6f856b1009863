//! After an engine was killed between the steps of a connect or a disconnect: the container's record, its place on the
//! networks and the kernel's interfaces are made to agree.
//!
//! A connect makes the interface, then notes the place, then the record. A disconnect goes from the place to the
//! interface to the record. So only what both the record and the place have was connected, and stays.

use std::collections::BTreeSet;

use guest_network::{Endpoint, SLOTS_MAX, Sandbox};

use super::attach::lookup_key;
use super::record::is_predefined;
use super::service::Networks;
use super::state::Place;
use crate::failure::Failure;
use crate::services::containers::Record;

impl Networks {
    /// Lets the records of a container that has been taken over, and its interfaces, agree. Whether its own record has
    /// changed, and is to be kept.
    pub async fn settle(&self, record: &mut Record) -> Result<bool, Failure> {
        let mut networks = record.networks();
        let (half_made, slots) = {
            let state = self.state();
            let Some(member) = state.members.get(&record.id).filter(|member| member.place == Place::Own)
            else {
                return Ok(false);
            };
            let id = |name: &str, settings: &_| {
                state.find(lookup_key(name, settings)).ok().map(|net| net.record.id.clone())
            };
            let wanted: BTreeSet<String> =
                networks.iter().filter_map(|(name, settings)| id(name, settings)).collect();
            let half_made: Vec<_> = member
                .endpoints
                .iter()
                .filter(|endpoint| !wanted.contains(&endpoint.network_id))
                .cloned()
                .collect();
            // Without a note of its place nothing can be said.
            if self.member_path(&record.id).exists() {
                networks.retain(|name, settings| {
                    let is_there =
                        |id: String| member.endpoints.iter().any(|endpoint| endpoint.network_id == id);
                    is_predefined(name) || id(name, settings).is_none_or(is_there)
                });
            }
            let slots: BTreeSet<u8> = member.endpoints.iter().map(|endpoint| endpoint.slot).collect();
            (half_made, slots)
        };
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::internal(format!("cannot tidy the networks of {}", record.short_id()), error)
        };
        for endpoint in &half_made {
            let gateways = {
                let mut state = self.state();
                let rest = match state.members.get_mut(&record.id) {
                    Some(member) => {
                        member.endpoints.retain(|other| other.id != endpoint.id);
                        member.endpoints.clone()
                    }
                    None => Vec::new(),
                };
                super::attach::give_back(&mut state, std::slice::from_ref(endpoint));
                state.gateways(&rest)
            };
            let sandbox = Sandbox::open(&self.sandbox_path(&record.id)).map_err(|error| failed(&error))?;
            Endpoint::detach(&sandbox, &record.id, endpoint.slot, &endpoint.interface, gateways)
                .await
                .map_err(|error| failed(&error))?;
        }
        if !half_made.is_empty() {
            self.keep(&record.id)?;
        }
        let unknown: Vec<u8> = (0..SLOTS_MAX).filter(|slot| !slots.contains(slot)).collect();
        let ends = Endpoint::host_ends(&record.id, &unknown).await.map_err(|error| failed(&error))?;
        ends.remove().await.map_err(|error| failed(&error))?;
        let changed = networks.len() != record.networks().len();
        if changed {
            record.networks = Some(networks);
        }
        Ok(changed)
    }
}
