//! `container prune`: removes what does not run.

use std::collections::BTreeMap;

use guest_api::Filters;
use guest_api::container::ContainersPruned;

use super::service::{Containers, RemoveQuery};
use super::table::Phase;
use crate::failure::Failure;
use crate::services::prune;

const KEYS: [&str; 3] = ["label", "label!", "until"];

impl Containers {
    /// Removes the containers that do not run and that the filters select.
    pub async fn prune(&self, filters: &Filters) -> Result<ContainersPruned, Failure> {
        let _turn = self.prune_turn().take()?;
        filters.expect_keys(&KEYS)?;
        let until = prune::until(filters)?;
        let mut pruned = ContainersPruned::default();
        for view in self.views() {
            let record = &view.record;
            if view.phase.is_live()
                || view.phase == Phase::Restarting
                || until.is_some_and(|until| record.created > until)
                || !filters.prunes_labels(&record.config.labels)
            {
                continue;
            }
            // Only told: it may be gone already.
            let written = self.written_bytes(&record.id).await.unwrap_or(0);
            match self.remove(&record.id, RemoveQuery::default()).await {
                Ok(()) => {
                    pruned.space_reclaimed += u64::try_from(written).unwrap_or(0);
                    pruned.containers_deleted.get_or_insert_default().push(record.id.clone());
                }
                // Started or removed meanwhile.
                Err(error) => tracing::warn!(container = record.short_id(), %error, "not pruned"),
            }
        }
        let attributes = BTreeMap::from([("reclaimed".to_owned(), pruned.space_reclaimed.to_string())]);
        self.context().events.publish("container", "prune", "", attributes);
        Ok(pruned)
    }
}
