//! Networks that are being made or removed. Between its interface and its record a network is in one place only; a note
//! in the run folder tells an engine that starts after another was killed there which interface belongs to nothing.

use std::path::PathBuf;

use guest_network::{Bridge, remove_dummy, remove_vlan};

use super::raise::{has_own_parent, is_interface};
use super::record::{Driver, NetworkRecord};
use super::service::Networks;
use super::state::Phase;
use super::vlan::Vlan;
use crate::failure::Failure;

impl Networks {
    fn note_path(&self, id: &str) -> PathBuf {
        self.unfinished.join(format!("{id}.json"))
    }

    /// Notes that a network's interface and its record part company for a while.
    pub(super) fn note_unfinished(&self, record: &NetworkRecord) -> Result<(), Failure> {
        let is_new = self.state().networks.get(&record.id).is_some_and(|net| net.phase == Phase::Making);
        if !matches!(record.driver, Driver::Bridge | Driver::Macvlan | Driver::Ipvlan)
            // Never taken for ours, but for a VLAN's: the note would have it removed.
            || (record.driver != Driver::Bridge
                && !has_own_parent(record)
                && !Vlan::is_named(&record.interface))
            || !record.owns_interface
            // Somebody else's.
            || (is_new && is_interface(&record.interface))
        {
            return Ok(());
        }
        let write = || {
            std::fs::create_dir_all(&self.unfinished)?;
            let path = self.note_path(&record.id);
            let new = path.with_extension("new");
            std::fs::write(&new, serde_json::to_vec(record)?)?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|error: std::io::Error| {
            Failure::internal(format!("cannot note that network {} is being changed", record.name), &error)
        })
    }

    /// They are together again, or both gone.
    pub(super) fn note_finished(&self, id: &str) {
        match std::fs::remove_file(self.note_path(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(network = &id[..12], %error, "a note stays behind");
            }
            _ => {}
        }
    }

    fn hangs_on(&self, interface: &str) -> bool {
        self.state().networks.values().any(|net| net.record.interface == interface)
    }

    /// Removes the interfaces of networks that an engine which was killed had not yet recorded, or not any more.
    pub(super) async fn sweep_unfinished(&self) -> Vec<Failure> {
        let mut failures = Vec::new();
        for entry in std::fs::read_dir(&self.unfinished).into_iter().flatten().flatten() {
            let swept = async {
                let bytes = std::fs::read(entry.path())?;
                // Half written: then nothing had been done yet.
                if let Ok(record) = serde_json::from_slice::<NetworkRecord>(&bytes)
                    && !self.state().networks.contains_key(&record.id)
                {
                    match record.driver {
                        Driver::Bridge => Bridge::remove(&record.interface)
                            .await
                            .map(drop)
                            .map_err(std::io::Error::other)?,
                        _ if has_own_parent(&record) => {
                            remove_dummy(&record.interface).await.map(drop).map_err(std::io::Error::other)?
                        }
                        _ if !self.hangs_on(&record.interface) => {
                            remove_vlan(&record.interface, &self.mark())
                                .await
                                .map(drop)
                                .map_err(std::io::Error::other)?
                        }
                        _ => {}
                    }
                }
                std::fs::remove_file(entry.path())
            };
            if let Err(error) = swept.await {
                failures.push(Failure::internal("cannot remove what is left of a network", &error));
            }
        }
        failures
    }
}
