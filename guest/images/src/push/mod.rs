//! Pushing: from a name in the index to the registry that the name belongs to.
//!
//! Layers first, each on its own path ([`layer`]): found there, mounted from a neighbour, or sent. Then the configuration, then
//! the manifest under its tag ([`manifest`]). The manifest that the image came with is sent again, byte for byte, when the
//! layers went as it says; else one is made from what was sent.

mod layer;
mod manifest;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
};

use futures_util::future::try_join_all;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Credentials, Digest, Error, Image, ImageId, Images, Kind, Platform, Progress, Reference, Result,
    database::{self, NAMES, RECORDS},
    download::blocking,
    images::Inner,
    lease::Lease,
    manifest::{CONFIG_BYTES_MAX, DOCKER_CONFIG, Descriptor},
    pull::Listener,
    registry::{Failure, Repository},
};
use layer::PushLayer;

/// Tries for what is not a layer.
const TRIES: u32 = 3;

/// One push, of one or several tags of a repository.
struct Push {
    images: Images,
    repository: Repository,
    listener: Listener,
    lease: Arc<Lease>,
    /// Layers that are known to be there, by diff id.
    there: Mutex<HashMap<Digest, Descriptor>>,
    /// Threads that pack layers. Once this push has failed they have nothing to do.
    packing: TaskTracker,
    failed: CancellationToken,
}

impl Images {
    /// Sends the image that `reference` stands for to its registry; without a tag, every tag of the repository.
    ///
    /// Dropping the future stops the push. What the registry has by then, it has.
    pub async fn push(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        credentials: &Credentials,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<()> {
        let listener: Listener = Arc::new(progress);
        listener(Progress::PushingTo(reference.clone()));
        let (inner, wanted) = (self.0.clone(), reference.clone());
        let tagged = blocking(move || inner.to_push(&wanted)).await?;
        let repository = self.0.registries.to_push(reference, credentials).await?;
        let lease = self.0.leases.lease();
        let push = Push {
            images: self.clone(),
            repository,
            listener,
            lease,
            there: Mutex::default(),
            packing: TaskTracker::new(),
            failed: CancellationToken::new(),
        };
        let mut result = Ok(());
        for (name, id) in tagged {
            result = push.tag(&name, id, platform).await;
            if result.is_err() {
                break;
            }
        }
        // One layer's failure ends the push; what is being packed of another is cleared away before it is told.
        push.failed.cancel();
        push.packing.close();
        push.packing.wait().await;
        drop(push);
        // Layers that were packed on the way.
        self.collect().await?;
        result
    }
}

impl Inner {
    /// The tags that a push is about, and what they stand for. Blocks.
    fn to_push(&self, reference: &Reference) -> Result<Vec<(Reference, ImageId)>> {
        if reference.digest().is_some() {
            return Err(Error::invalid("cannot push a digest reference"));
        }
        let transaction = self.store.read()?;
        let names = transaction.open_table(NAMES)?;
        let repository = reference.name();
        let mut found = Vec::new();
        for row in names.range(repository.as_str()..)? {
            let (name, id) = row?;
            if !name.value().starts_with(&repository) {
                break;
            }
            match name.value().parse::<Reference>() {
                Ok(name) if name.name() == repository => {
                    found.push((name, database::digest_of_key(id.value())?))
                }
                _ => {}
            }
        }
        if found.is_empty() {
            return Err(Error::not_found(format!(
                "An image does not exist locally with the tag: {}",
                reference.familiar_name()
            )));
        }
        found.retain(|(name, _)| {
            name.tag().is_some() && (reference.tag().is_none() || name.tag() == reference.tag())
        });
        match (found.is_empty(), reference.tag()) {
            (true, Some(_)) => Err(Error::not_found(format!("tag does not exist: {}", reference.familiar()))),
            (true, None) => {
                Err(Error::not_found(format!("no tags to push for {}", reference.familiar_name())))
            }
            (false, _) => Ok(found),
        }
    }
}

impl Push {
    async fn tag(&self, name: &Reference, id: ImageId, platform: Option<&Platform>) -> Result<()> {
        let (inner, shown) = (self.images.0.clone(), name.clone());
        let (image, record) = blocking(move || {
            let record: database::ImageRecord = inner.store.get(RECORDS, &id.hex())?.ok_or_else(|| {
                Error::not_found(format!("could not find image from tag {}", shown.familiar()))
            })?;
            Ok((inner.image(id, record.clone(), Vec::new())?, record))
        })
        .await?;
        check_platform(name, &image, platform)?;
        self.lease
            .hold(
                [id, record.manifest]
                    .into_iter()
                    .chain(image.layers.iter().flat_map(|layer| [layer.digest, *layer.chain_id.digest()])),
            )
            .await;
        let layers = self.layers(&image).await?;
        guest_fault::point("push-layers-sent");
        let config = Descriptor::new(DOCKER_CONFIG, id, image.config_json.len() as u64);
        let sent = self.manifest_for(&image, &config, &layers).await?;
        self.send_config(&config).await?;
        guest_fault::point("push-config-sent");
        let tag = name.tag().unwrap_or("latest");
        self.persistently(|| self.repository.put_manifest(tag, &sent.media_type, &sent.bytes)).await?;
        guest_fault::point("push-manifest-sent");
        let digest = Digest::of(&sent.bytes);
        let (inner, digested) = (self.images.0.clone(), name.with_digest(digest));
        // The image cannot go while its new name is written.
        let _open = self.images.0.leases.open_gate().await;
        blocking(move || inner.add_name(&digested, id)).await?;
        (self.listener)(Progress::Pushed { tag: tag.to_owned(), digest, size: sent.bytes.len() as u64 });
        tracing::info!(image = %name, %digest, "pushed");
        Ok(())
    }

    /// Every layer on its way, at most a few at a time. Answers what they are there, bottom first.
    async fn layers(&self, image: &Image) -> Result<Vec<Descriptor>> {
        let mut works: Vec<PushLayer<'_>> = Vec::new();
        // dockerd begins at the top.
        for layer in image.layers.iter().rev() {
            let work = PushLayer::new(self, layer);
            work.prepare();
            if !works.iter().any(|other| other.layer.diff_id == layer.diff_id) {
                works.push(work);
            }
        }
        try_join_all(works.iter().map(PushLayer::run)).await?;
        let there = self.there.lock().unwrap_or_else(PoisonError::into_inner);
        let found = image.layers.iter().map(|layer| there.get(&layer.diff_id).cloned());
        found
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::new(Kind::Internal, "a layer was pushed and is not known to be"))
    }

    async fn send_config(&self, config: &Descriptor) -> Result<()> {
        let here = self.persistently(|| self.repository.blob_size(&config.digest)).await;
        if matches!(here, Ok(Some(_))) {
            return Ok(());
        }
        let (content, digest) = (self.images.0.content.clone(), config.digest);
        // Verified once more: a registry that checks less than we do would keep what is damaged.
        blocking(move || content.read(&digest, CONFIG_BYTES_MAX)).await?;
        let sent = Arc::new(AtomicU64::new(0));
        self.persistently(|| async {
            let mut session = self.repository.begin().await?;
            let open = |_| self.images.0.content.open_blob(&config.digest);
            self.repository.send_blob(&mut session, &config.digest, config.size, &open, &sent).await
        })
        .await
    }

    async fn persistently<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        work: impl Fn() -> F,
    ) -> Result<T> {
        let mut tries = 1;
        loop {
            match work().await {
                Err(Failure::Passing(error)) if tries < TRIES => {
                    tracing::debug!(error = %error.chain(), "tried again");
                    tokio::time::sleep(self.images.0.options.retry_pause * 2u32.pow(tries - 1)).await;
                    tries += 1;
                }
                result => return result.map_err(|failure| self.repository.push_error(failure)),
            }
        }
    }
}

fn check_platform(name: &Reference, image: &Image, wanted: Option<&Platform>) -> Result<()> {
    let offered = Platform {
        os: image.config.os.clone(),
        architecture: image.config.architecture.clone(),
        variant: image.config.variant.clone(),
    };
    match wanted {
        Some(wanted) if wanted.fit(&offered).is_none() => Err(Error::not_found(format!(
            "image with reference {} was found but its platform ({offered}) does not match the specified platform ({wanted})",
            name.familiar()
        ))),
        _ => Ok(()),
    }
}
