//! Images that are made here: committed from a container's changes, or imported from the archive of a root.
//!
//! Either way the new layer enters the content store as a plain tar, whose digest is its diff id, and from there goes the way
//! of a pulled one: unpacked beside what is there, renamed into place, and part of the index with one transaction. A crash
//! before that leaves no image.

use std::{
    io::{BufReader, BufWriter, Read, Write},
    sync::Arc,
};

use crate::{
    Digest, Error, History, Image, ImageConfig, ImageId, Images, Kind, MountPoint, Reference, Result,
    compression::Compression,
    content::Ingest,
    database,
    download::blocking,
    image,
    lease::Lease,
    manifest::{self, Descriptor, Manifest},
    pull::{Listener, Plan, Stage},
};

const READ_BYTES: usize = 256 << 10;
/// The tar of no files at all: two blocks of zeroes. Such a layer is left out, as dockerd does.
const EMPTY_TAR: &str = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";

/// What a new image is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    /// Everything but its layers and history, which follow from `parent` and `step`.
    pub config: ImageConfig,
    /// How its layer came to be. Whether it is empty is found out.
    pub step: History,
    /// The image it stands on.
    pub parent: Option<ImageId>,
    /// What it is called; it may have no name.
    pub name: Option<Reference>,
}

impl Images {
    /// Makes an image of what was changed in the snapshot `key`, on top of `draft.parent`. The snapshot stays as it is, and may
    /// be mounted; what changes meanwhile is there or not.
    pub async fn commit(&self, key: &str, points: &'static [MountPoint], draft: Draft) -> Result<Image> {
        let key = key.to_owned();
        self.compose(draft, move |images, ingest| {
            let mut buffered = BufWriter::with_capacity(READ_BYTES, ingest);
            images.0.snapshotter.diff(&key, points, &mut buffered)?;
            let flushed = buffered.flush();
            flushed.map_err(|source| buffered.get_ref().failed(source))
        })
        .await
    }

    /// Makes an image of one layer: the archive of a root, plain or compressed.
    pub async fn import(&self, archive: impl Read + Send + 'static, draft: Draft) -> Result<Image> {
        let bytes_max = self.0.options.limits.layer_bytes_max;
        self.compose(draft, move |_, ingest| {
            let unreadable = |source| Error::because(Kind::Invalid, "the archive cannot be read", source);
            let input = BufReader::with_capacity(READ_BYTES, archive);
            let (_, mut decoder) = Compression::decoder(input).map_err(unreadable)?;
            let mut piece = vec![0; READ_BYTES];
            loop {
                let length = decoder.read(&mut piece).map_err(unreadable)?;
                if length == 0 {
                    return Ok(());
                }
                if ingest.length() + length as u64 > bytes_max {
                    return Err(Error::invalid(format!(
                        "the archive unpacks to more than the limit of {bytes_max} bytes"
                    )));
                }
                ingest.write_all(&piece[..length]).map_err(|source| ingest.failed(source))?;
            }
        })
        .await
    }

    async fn compose(
        &self,
        draft: Draft,
        fill: impl FnOnce(&Images, &mut Ingest) -> Result<()> + Send + 'static,
    ) -> Result<Image> {
        let result = self.compose_leased(draft, fill).await;
        // Of an image that could not be made, its parts; of one that is called as another was, nothing.
        if result.is_err() {
            self.collect().await?;
        }
        result
    }

    async fn compose_leased(
        &self,
        draft: Draft,
        fill: impl FnOnce(&Images, &mut Ingest) -> Result<()> + Send + 'static,
    ) -> Result<Image> {
        let lease = self.0.leases.lease();
        let parent = match &draft.parent {
            Some(id) => Some(self.resolve(&id.to_string()).await?),
            None => None,
        };
        if let Some(parent) = &parent {
            lease.hold(parent.layers.iter().flat_map(|layer| [layer.digest, *layer.chain_id.digest()])).await;
        }
        let (images, held) = (self.clone(), lease.clone());
        let plan = blocking(move || {
            let mut ingest = images.0.content.ingest()?;
            fill(&images, &mut ingest)?;
            guest_fault::point("compose.after-read");
            let digest = ingest.digest();
            tokio::runtime::Handle::current().block_on(held.hold([digest]));
            let (digest, size) = ingest.finish(None)?;
            let layer = (digest.hex() != EMPTY_TAR || parent.is_none())
                .then(|| Descriptor::new(manifest::OCI_LAYER, digest, size));
            guest_fault::point("compose.after-layer");
            images.plan_of(draft, parent.as_ref(), layer, &held)
        })
        .await?;
        let listener: Listener = Arc::new(|_| {});
        let image = self.assemble(plan, lease, &listener, Stage::Load).await?;
        tracing::info!(image = %image.id, names = ?image.repo_tags, "made");
        Ok(image)
    }

    /// Writes configuration and manifest into the content store. Blocks.
    fn plan_of(
        &self,
        draft: Draft,
        parent: Option<&Image>,
        layer: Option<Descriptor>,
        lease: &Arc<Lease>,
    ) -> Result<Plan> {
        let mut config = draft.config;
        config.rootfs = parent.map(|parent| parent.config.rootfs.clone()).unwrap_or_default();
        config.rootfs.kind = "layers".to_owned();
        config.history = parent.map(|parent| parent.config.history.clone()).unwrap_or_default();
        config.history.push(History { empty_layer: layer.is_none(), ..draft.step });
        let mut layers: Vec<Descriptor> = parent
            .map(|parent| {
                let known = |layer: &crate::ImageLayer| {
                    Descriptor::new(
                        &manifest::oci_layer_type(&layer.media_type),
                        layer.digest,
                        layer.blob_size,
                    )
                };
                parent.layers.iter().map(known).collect()
            })
            .unwrap_or_default();
        if let Some(layer) = layer {
            config.rootfs.diff_ids.push(layer.digest);
            layers.push(layer);
        }
        if layers.len() > manifest::LAYERS_MAX {
            return Err(Error::invalid(format!(
                "the image would have {} layers; the limit is {}",
                layers.len(),
                manifest::LAYERS_MAX
            )));
        }
        let store = |bytes: &[u8]| {
            tokio::runtime::Handle::current().block_on(lease.hold([Digest::of(bytes)]));
            self.0.content.insert(bytes)
        };
        let bytes = image::encode_config(&config)?;
        let size = bytes.len() as u64;
        let digest = store(&bytes)?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: manifest::OCI_MANIFEST.to_owned(),
            config: Descriptor::new(manifest::OCI_CONFIG, digest, size),
            layers,
        };
        let manifest_digest = store(&database::encode(&manifest)?)?;
        Ok(Plan {
            manifest_digest,
            manifest,
            indexes: Vec::new(),
            config,
            source: None,
            names: draft.name.map(Reference::with_default_tag).into_iter().collect(),
            parent: draft.parent,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rootfs;

    #[test]
    fn a_made_configuration_says_only_what_it_has_to_say() {
        let mut config =
            ImageConfig { architecture: "amd64".to_owned(), os: "linux".to_owned(), ..Default::default() };
        config.config.labels.insert("empty".to_owned(), String::new());
        config.config.cmd = Some(vec![String::new()]);
        config.rootfs = Rootfs { kind: "layers".to_owned(), diff_ids: Vec::new() };
        config.history.push(History { created_by: "x".to_owned(), ..Default::default() });
        let bytes = image::encode_config(&config).expect("encoded");
        assert_eq!(
            String::from_utf8(bytes).expect("text"),
            r#"{"architecture":"amd64","config":{"Cmd":[""],"Labels":{"empty":""}},"history":[{"created_by":"x"}],"os":"linux","rootfs":{"diff_ids":[],"type":"layers"}}"#
        );
    }
}
