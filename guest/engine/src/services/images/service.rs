//! The image service: inspects, loads, tags and removes, and tells what happened.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest_api::ErrorKind;
use guest_api::image::{HistoryItem, ImageInspect};
use guest_images::{Image, Images, Reference, ReferenceError};

use super::convert;
use crate::failure::Failure;
use crate::services::events::Events;
use crate::services::prune::Turn;

/// The image service. Cheap to clone.
#[derive(Clone)]
pub struct ImagesService {
    pub(super) images: Images,
    events: Events,
    prune_turn: Arc<Turn>,
}

impl ImagesService {
    pub fn new(images: Images, events: Events) -> Self {
        Self { images, events, prune_turn: Arc::default() }
    }

    pub fn store(&self) -> &Images {
        &self.images
    }

    pub(super) fn events(&self) -> &Events {
        &self.events
    }

    pub(super) fn prune_turn(&self) -> &Turn {
        &self.prune_turn
    }

    pub async fn resolve(&self, name: &str) -> Result<Image, Failure> {
        self.images.resolve(name).await.map_err(|error| convert::failure(&error))
    }

    /// Bytes of an image's layers; 0 when the image has gone from under its containers.
    pub async fn bytes(&self, id: &str) -> Result<i64, Failure> {
        match self.resolve(id).await {
            Ok(image) => Ok(i64::try_from(image.size).unwrap_or(i64::MAX)),
            Err(failure) if failure.kind == ErrorKind::NotFound => Ok(0),
            Err(failure) => Err(failure),
        }
    }

    pub async fn inspect(&self, name: &str) -> Result<ImageInspect, Failure> {
        let image = self.resolve(name).await?;
        let snapshotter = self.images.snapshotter().clone();
        let top = image.layers.last().map(|layer| layer.chain_id);
        let folders = tokio::task::spawn_blocking(move || snapshotter.layer_folders(top)).await;
        let folders = folders.map_err(|error| Failure::internal("looking at an image failed", &error))?;
        // Of a damaged image the rest is still told.
        let folders = folders.inspect_err(|error| tracing::warn!(image = %image.id, %error, "damaged"));
        Ok(convert::inspect(&image, &folders.unwrap_or_default()))
    }

    pub async fn history(&self, name: &str) -> Result<Vec<HistoryItem>, Failure> {
        Ok(convert::history(&self.resolve(name).await?))
    }

    pub async fn tag(&self, source: &str, repository: &str, tag: &str) -> Result<(), Failure> {
        let target = reference(repository, tag)?.with_default_tag();
        let image = self.resolve(source).await?;
        self.images.tag(source, &target).await.map_err(|error| convert::failure(&error))?;
        self.event("tag", &image.id.to_string(), &target.familiar(), Some(&image));
        Ok(())
    }

    pub(super) fn event(&self, action: &str, id: &str, name: &str, image: Option<&Image>) {
        let mut attributes: BTreeMap<String, String> =
            image.map(|image| image.config.config.labels.clone()).unwrap_or_default();
        attributes.insert("name".to_owned(), name.to_owned());
        self.events.publish("image", action, id, attributes);
    }
}

pub(super) fn reference(name: &str, tag: &str) -> Result<Reference, Failure> {
    let invalid = |error: ReferenceError| Failure::invalid(error.to_string());
    let text = match tag {
        "" => name.to_owned(),
        digest if digest.contains(':') => format!("{name}@{digest}"),
        tag => {
            // A name that has a tag already keeps it unless another is given apart.
            let bare: Reference = name.parse().map_err(invalid)?;
            return bare.with_tag(tag).map_err(|_| Failure::invalid("invalid tag format"));
        }
    };
    text.parse().map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_given_apart_are_put_on() {
        assert_eq!(reference("busybox", "1.36").unwrap().familiar(), "busybox:1.36");
        assert_eq!(reference("busybox:2", "").unwrap().familiar(), "busybox:2");
        let digest = format!("sha256:{}", "ab".repeat(32));
        assert!(reference("busybox", &digest).unwrap().digest().is_some());
        let refused = |name: &str, tag: &str| reference(name, tag).unwrap_err().message;
        let capitals = "invalid reference format: repository name (library/UPPER) must be lowercase";
        assert_eq!(refused("UPPER", "one"), capitals);
        assert_eq!(refused("a", "b/c"), "invalid tag format");
    }
}
