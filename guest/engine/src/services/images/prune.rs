//! `rmi` and `image prune`.

use std::collections::{BTreeMap, HashSet};

use guest_api::image::ImageDeleted;
use guest_api::usage::ImagesPruned;
use guest_api::{ErrorKind, Filters};
use guest_images::{Deleted, Image, ImageId, InUse, RemoveOptions};

use super::list::Shared;
use super::{ImagesService, convert};
use crate::failure::Failure;
use crate::services::prune;

const KEYS: [&str; 4] = ["dangling", "label", "label!", "until"];

impl ImagesService {
    /// Untags and deletes. `in_use` lists the containers made from an image.
    pub async fn remove(
        &self,
        name: &str,
        options: RemoveOptions,
        in_use: impl Fn(&str) -> Vec<InUse> + Send + Sync,
    ) -> Result<Vec<ImageDeleted>, Failure> {
        Ok(self.take_away(name, options, in_use).await?.into_iter().map(convert::deleted).collect())
    }

    async fn take_away(
        &self,
        name: &str,
        options: RemoveOptions,
        in_use: impl Fn(&str) -> Vec<InUse> + Send + Sync,
    ) -> Result<Vec<Deleted>, Failure> {
        // Only its labels are wanted, for events: an image whose configuration is damaged can be removed too.
        let labels = |image: Image| (image.id, image.config.config.labels);
        let known = self.resolve(name).await.ok().map(labels);
        let using = move |id: &ImageId| in_use(&id.to_string());
        let deleted =
            self.store().remove(name, options, using).await.map_err(|error| convert::failure(&error))?;
        let mut tags =
            deleted.iter().filter(|step| matches!(step, Deleted::Untagged(name) if name.digest().is_none()));
        if let Some((id, labels)) = known {
            for _ in &mut tags {
                self.publish("untag", &id, labels.clone());
            }
        }
        for step in &deleted {
            if let Deleted::Image(id) = step {
                self.publish("delete", id, BTreeMap::new());
            }
        }
        Ok(deleted)
    }

    /// dockerd names the image by its id in these events.
    fn publish(&self, action: &str, id: &ImageId, mut attributes: BTreeMap<String, String>) {
        let id = id.to_string();
        attributes.insert("name".to_owned(), id.clone());
        self.events().publish("image", action, &id, attributes);
    }

    /// Removes images that no container needs: those without a name, or with `dangling=false` all.
    pub async fn prune(
        &self,
        filters: &Filters,
        in_use: impl Fn(&str) -> Vec<InUse> + Send + Sync,
    ) -> Result<ImagesPruned, Failure> {
        let _turn = self.prune_turn().take()?;
        filters.expect_keys(&KEYS)?;
        let dangling = filters.boolean("dangling", true)?;
        let until = prune::until(filters)?;
        let images = self.store().list().await.map_err(|error| convert::failure(&error))?;
        let parents: HashSet<ImageId> = images.iter().filter_map(|image| image.parent).collect();
        let sizes = Shared::of(&images);
        let mut pruned = ImagesPruned::default();
        for image in &images {
            let is_parent = parents.contains(&image.id);
            let unnamed = image.repo_tags.is_empty() && image.repo_digests.is_empty();
            let young =
                until.is_some_and(|until| convert::created(image).is_none_or(|created| created > until));
            if (is_parent && (unnamed || dangling))
                || young
                || (dangling && !image.repo_tags.is_empty())
                || !filters.prunes_labels(&image.config.config.labels)
            {
                continue;
            }
            let names = if unnamed {
                vec![image.id.hex()]
            } else {
                image.repo_tags.iter().chain(&image.repo_digests).cloned().collect()
            };
            for name in names {
                let options = RemoveOptions { force: false, parents: true };
                match self.take_away(&name, options, &in_use).await {
                    Ok(deleted) => {
                        for step in deleted {
                            if let Deleted::Layer(chain) = &step {
                                pruned.space_reclaimed += sizes.layer(chain);
                            }
                            pruned.images_deleted.get_or_insert_default().push(convert::deleted(step));
                        }
                    }
                    // In use, or gone with the name before it.
                    Err(failure) if matches!(failure.kind, ErrorKind::Conflict | ErrorKind::NotFound) => {}
                    Err(failure) => tracing::warn!(image = name, error = %failure, "cannot be pruned"),
                }
            }
        }
        // Also what nobody listed: what pulls that failed had unpacked.
        pruned.space_reclaimed +=
            self.store().collect_garbage().await.map_err(|error| convert::failure(&error))?;
        let reclaimed = pruned.space_reclaimed.to_string();
        self.events().publish("image", "prune", "", [("reclaimed".to_owned(), reclaimed)].into());
        Ok(pruned)
    }
}
