//! Pulling: from a name to an image in the index.
//!
//! The steps, each of which may find its work done already: name to manifest (by way of an index and a platform), manifest to
//! configuration, then every layer on its own path: download, verify, unpack, wait for the layer below, take its place.
//! Last the disk is synced once, and one transaction makes the image part of the index.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use tokio::sync::{mpsc, watch};

use crate::{
    ChainId, Credentials, Digest, Error, Image, ImageConfig, ImageId, ImageLayer, Images, Kind,
    LayerProgress, Platform, Progress, PulledImage, Reference, Result,
    database::{ImageRecord, NAMES, RECORDS},
    download::{BlobSource, State, blocking},
    images::{names_by_id, now},
    lease::Lease,
    load::Wanted,
    manifest::{self, Descriptor, Document, Manifest},
    registry::{Fetched, Repository, SharedRepository},
    snapshot::Temporary,
    unpack::{self, Meter, Unpacked},
};

/// Between two progress reports of one layer.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Indexes within indexes.
const NESTING_MAX: usize = 3;

/// Who hears of progress.
pub(crate) type Listener = Arc<dyn Fn(Progress) + Send + Sync>;

/// An image whose manifest is known.
pub(crate) struct Plan {
    pub(crate) manifest_digest: Digest,
    pub(crate) manifest: Manifest,
    /// The indexes on the way to the manifest.
    pub(crate) indexes: Vec<Digest>,
    pub(crate) config: ImageConfig,
    /// Where blobs come from; `None` when all are here.
    pub(crate) source: Option<Arc<dyn BlobSource>>,
    pub(crate) names: Vec<Reference>,
    /// The image it was committed from.
    pub(crate) parent: Option<ImageId>,
}

impl Images {
    /// Fetches an image. `platform` is that of this machine when not given.
    ///
    /// Dropping the future stops the pull; what has arrived by then is kept for the next one.
    pub async fn pull(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        credentials: &Credentials,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<PulledImage> {
        let listener: Listener = Arc::new(progress);
        self.pull_one(&reference.clone().with_default_tag(), platform, credentials, listener).await
    }

    /// Fetches every tag of a repository, one after the other. Ends at the first that fails.
    pub async fn pull_all_tags(
        &self,
        repository: &Reference,
        platform: Option<&Platform>,
        credentials: &Credentials,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Vec<PulledImage>> {
        let listener: Listener = Arc::new(progress);
        let mut failure = None;
        let mut tags = None;
        for place in self.0.registries.to_pull(repository, credentials).await {
            let found = match place {
                Ok(place) => place.tags().await.map_err(|failure| place.pull_error(failure)),
                Err(error) => Err(error),
            };
            match found {
                Ok(found) => {
                    tags = Some(found);
                    break;
                }
                Err(error) => failure = Some(error),
            }
        }
        let Some(tags) = tags else { return Err(failure.unwrap_or_else(nowhere)) };
        let within = listener.clone();
        // One last word is said for all of them.
        let quieter: Listener = Arc::new(move |progress| {
            if !matches!(progress, Progress::Downloaded(_) | Progress::UpToDate(_)) {
                within(progress);
            }
        });
        let mut pulled = Vec::new();
        for tag in tags {
            let reference = repository.with_tag(&tag).map_err(|_| {
                Error::invalid(format!(
                    "registry `{}` lists the tag `{tag}`, which cannot be one",
                    repository.domain()
                ))
            })?;
            pulled.push(self.pull_one(&reference, platform, credentials, quieter.clone()).await?);
        }
        let said = if pulled.iter().all(|pulled| pulled.up_to_date) {
            Progress::UpToDate
        } else {
            Progress::Downloaded
        };
        listener(said(repository.clone()));
        Ok(pulled)
    }

    async fn pull_one(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        credentials: &Credentials,
        listener: Listener,
    ) -> Result<PulledImage> {
        let reference = reference.clone();
        if let Some(archive) = self.bundled(&reference) {
            return self.pull_bundled(&reference, archive, listener).await;
        }
        let lease = self.0.leases.lease();
        let (repository, top) = self.reach(&reference, credentials).await?;
        listener(Progress::PullingFrom(reference.clone()));
        let digest = top.digest;
        let plan = self.plan(&reference, platform, repository, top, &lease).await?;
        let id = plan.manifest.config.digest;
        let up_to_date = self.is_complete(&plan, &reference).await?;
        let image = self.assemble(plan, lease, &listener, Stage::Pull { quiet: up_to_date }).await?;
        debug_assert_eq!(image.id, id);
        let (inner, layers, repository) = (self.0.clone(), image.layers.clone(), reference.name());
        blocking(move || {
            let blob = |layer: &ImageLayer| Descriptor::new(&layer.media_type, layer.digest, layer.blob_size);
            inner.note_places(&repository, layers.iter().map(|layer| (&layer.diff_id, blob(layer))))
        })
        .await?;
        listener(Progress::Digest(digest));
        listener(if up_to_date {
            Progress::UpToDate(reference.clone())
        } else {
            Progress::Downloaded(reference.clone())
        });
        tracing::info!(image = %reference, %digest, up_to_date, "pulled");
        Ok(PulledImage { image, reference, digest, up_to_date })
    }

    /// An archive that came with the engine, for names of Docker Hub's official images.
    fn bundled(&self, reference: &Reference) -> Option<PathBuf> {
        let folder = self.0.options.bundled.as_ref()?;
        let name = reference.familiar_name();
        let official = reference.is_default_domain()
            && !name.contains('/')
            && reference.digest().is_none()
            && reference.tag() == Some("latest");
        let archive = folder.join(format!("{name}.tar"));
        (official && archive.is_file()).then_some(archive)
    }

    async fn pull_bundled(
        &self,
        reference: &Reference,
        archive: PathBuf,
        listener: Listener,
    ) -> Result<PulledImage> {
        listener(Progress::PullingFrom(reference.clone()));
        let before = self.resolve(&reference.familiar()).await.ok().map(|image| image.id);
        let file = std::fs::File::open(&archive).map_err(|source| Error::io("open", &archive, source))?;
        let within = listener.clone();
        let quietly: Listener = Arc::new(move |progress| {
            if matches!(progress, Progress::Layer { .. }) {
                within(progress);
            }
        });
        let loaded =
            self.load_from(file, quietly, Wanted { platform: None, name: Some(reference.clone()) }).await?;
        let first = loaded.first().ok_or_else(|| {
            Error::corrupt(format!("the bundled archive `{}` holds no image", archive.display()))
        })?;
        let image = self.resolve(&first.id.to_string()).await?;
        let (digest, up_to_date) = (image.manifest_digest, before == Some(image.id));
        listener(Progress::Digest(digest));
        listener(if up_to_date {
            Progress::UpToDate(reference.clone())
        } else {
            Progress::Downloaded(reference.clone())
        });
        Ok(PulledImage { image, reference: reference.clone(), digest, up_to_date })
    }

    /// The first place that has the name, and what it says the name stands for.
    async fn reach(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<(SharedRepository, Fetched)> {
        let mut failure = None;
        for place in self.0.registries.to_pull(reference, credentials).await {
            let found = match place {
                Ok(place) => {
                    match place.manifest(reference.tag().unwrap_or("latest"), reference.digest()).await {
                        Ok(top) => return Ok((Arc::new(place), top)),
                        Err(failure) => place.pull_error(failure),
                    }
                }
                Err(error) => error,
            };
            tracing::debug!(image = %reference, error = %found.chain(), "no manifest here");
            failure = Some(found);
        }
        Err(failure.unwrap_or_else(nowhere))
    }

    /// Follows indexes to the manifest for the platform, and fetches the configuration.
    async fn plan(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        repository: SharedRepository,
        top: Fetched,
        lease: &Arc<Lease>,
    ) -> Result<Plan> {
        let wanted = platform.cloned().unwrap_or_else(Platform::host);
        let mut names = vec![reference.with_digest(top.digest)];
        if reference.digest().is_none() {
            names.push(reference.clone());
        }
        let (mut fetched, mut indexes) = (top, Vec::new());
        let manifest = loop {
            lease.hold([fetched.digest]).await;
            let (content, bytes) = (self.0.content.clone(), fetched.bytes.clone());
            blocking(move || content.insert(&bytes)).await?;
            match Document::parse(&fetched.bytes)? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(_) if indexes.len() == NESTING_MAX => {
                    return Err(Error::invalid("the image is an index of indexes of indexes: refused"));
                }
                Document::Index(index) => {
                    let entry = index.choose(&wanted).ok_or_else(|| {
                        Error::not_found(format!(
                            "no matching manifest for {wanted} in the manifest list entries"
                        ))
                    })?;
                    indexes.push(fetched.digest);
                    let found = repository.manifest("", Some(&entry.digest)).await;
                    fetched = found.map_err(|failure| repository.pull_error(failure))?;
                }
            }
        };
        let config = self.fetch_config(&manifest.config, &repository, lease).await?;
        let config = manifest::parse_config(&config, Some(manifest.layers.len()))?;
        let offered = Platform {
            os: config.os.clone(),
            architecture: config.architecture.clone(),
            variant: config.variant.clone(),
        };
        if platform.is_some() && !offered.os.is_empty() && wanted.fit(&offered).is_none() {
            return Err(Error::not_found(format!(
                "image with reference {} was found but its platform ({offered}) does not match the specified platform ({wanted})",
                reference.familiar()
            )));
        }
        if !offered.os.is_empty() && offered.os != "linux" {
            return Err(Error::invalid(format!(
                "image operating system \"{}\" cannot be used on this platform: it runs linux",
                offered.os
            )));
        }
        Ok(Plan {
            manifest_digest: fetched.digest,
            manifest,
            indexes,
            config,
            source: Some(repository as Arc<dyn BlobSource>),
            names,
            parent: None,
        })
    }

    async fn fetch_config(
        &self,
        descriptor: &Descriptor,
        repository: &Arc<Repository>,
        lease: &Arc<Lease>,
    ) -> Result<Vec<u8>> {
        lease.hold([descriptor.digest]).await;
        let source: Arc<dyn BlobSource> = repository.clone();
        self.0.downloads.fetch(descriptor.digest, descriptor.size, &source, |_| {}).await?;
        let (content, digest) = (self.0.content.clone(), descriptor.digest);
        blocking(move || content.read(&digest, manifest::CONFIG_BYTES_MAX)).await
    }

    /// Whether the name stands for this image already, with every piece in place.
    async fn is_complete(&self, plan: &Plan, reference: &Reference) -> Result<bool> {
        let (inner, id, chains) =
            (self.0.clone(), plan.manifest.config.digest, ChainId::all(&plan.config.rootfs.diff_ids));
        let name = plan.names.iter().find(|name| *name == reference).unwrap_or(&plan.names[0]).to_string();
        blocking(move || {
            let named = inner
                .store
                .read()?
                .open_table(NAMES)?
                .get(name.as_str())?
                .is_some_and(|named| named.value() == id.hex());
            let complete = || -> Result<bool> {
                for chain in &chains {
                    if inner.snapshotter.layer(chain)?.is_none() {
                        return Ok(false);
                    }
                }
                Ok(inner.store.get::<ImageRecord>(RECORDS, &id.hex())?.is_some())
            };
            Ok(named && complete()?)
        })
        .await
    }

    /// Brings every layer of a plan into place and the image into the index.
    pub(crate) async fn assemble(
        &self,
        plan: Plan,
        lease: Arc<Lease>,
        listener: &Listener,
        stage: Stage,
    ) -> Result<Image> {
        let chains = ChainId::all(&plan.config.rootfs.diff_ids);
        lease
            .hold(
                chains
                    .iter()
                    .map(|chain| *chain.digest())
                    .chain(plan.manifest.layers.iter().map(|layer| layer.digest)),
            )
            .await;
        let (alive, mut ended) = mpsc::channel::<()>(1);
        let works: Vec<LayerWork> = (0..chains.len())
            .map(|index| LayerWork {
                images: self.clone(),
                blob: plan.manifest.layers[index].clone(),
                diff_id: plan.config.rootfs.diff_ids[index],
                chain: chains[index],
                parent: index.checked_sub(1).map(|below| chains[below]),
                source: plan.source.clone(),
                lease: lease.clone(),
                listener: listener.clone(),
                stage,
                alive: alive.clone(),
            })
            .collect();
        if let Stage::Pull { quiet: false } = stage {
            for work in &works {
                if work.in_place().await?.is_none() {
                    work.report(LayerProgress::PullingFsLayer);
                }
            }
        }
        // A layer takes its place after the one below it; the first finds the ground ready.
        let (ground, mut below) = watch::channel(true);
        let mut runs = Vec::new();
        for work in &works {
            let (done, above) = watch::channel(false);
            runs.push(work.run(std::mem::replace(&mut below, above), done));
        }
        let sizes = match try_join_all(runs).await {
            Ok(sizes) => sizes,
            Err(error) => {
                // The other layers' threads have been told to give up. Until they have, they hold what they work on.
                drop((works, alive));
                let _all_ended = ended.recv().await;
                return Err(error);
            }
        };
        drop(ground);
        guest_fault::point("pull-layers-placed");

        let layers = works
            .iter()
            .zip(sizes)
            .map(|(work, size)| ImageLayer {
                digest: work.blob.digest,
                media_type: work.blob.media_type.clone(),
                blob_size: work.blob.size,
                diff_id: work.diff_id,
                chain_id: work.chain,
                size,
            })
            .collect();
        let id = plan.manifest.config.digest;
        let record = ImageRecord {
            manifest: plan.manifest_digest,
            manifest_media_type: plan.manifest.stated_media_type().to_owned(),
            indexes: plan.indexes,
            layers,
            parent: plan.parent,
            last_tagged: if plan.names.is_empty() { 0 } else { now() },
        };
        // From here to the end of the lease the collector waits, so the image is never without either.
        let _open = self.0.leases.open_gate().await;
        let (inner, names) = (self.0.clone(), plan.names);
        blocking(move || {
            let _lease = lease;
            inner.commit(id, &record, &names)?;
            guest_fault::point("pull-committed");
            let names = names_by_id(&inner.store.read()?.open_table(NAMES)?)?.remove(&id).unwrap_or_default();
            inner.image(id, record, names)
        })
        .await
    }
}

fn nowhere() -> Error {
    Error::new(Kind::Internal, "there is no registry to ask")
}

/// What an assembly is part of: it decides what is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Pull { quiet: bool },
    Load,
}

/// One layer on its way.
struct LayerWork {
    images: Images,
    blob: Descriptor,
    diff_id: Digest,
    chain: ChainId,
    parent: Option<ChainId>,
    source: Option<Arc<dyn BlobSource>>,
    lease: Arc<Lease>,
    listener: Listener,
    stage: Stage,
    /// Dropped last by every thread that works for this layer.
    alive: mpsc::Sender<()>,
}

impl LayerWork {
    fn report(&self, state: LayerProgress) {
        if self.stage != (Stage::Pull { quiet: true }) {
            (self.listener)(Progress::Layer { id: self.blob.digest.short(), state });
        }
    }

    /// Answers the size of the unpacked layer.
    async fn run(&self, mut below: watch::Receiver<bool>, done: watch::Sender<bool>) -> Result<u64> {
        let size = match self.in_place().await? {
            Some(size) => {
                if self.stage != Stage::Load {
                    self.report(LayerProgress::AlreadyExists);
                }
                size
            }
            None => {
                // Pulls that want the same blob share its download; then one of them unpacks.
                self.fetch().await?;
                let turn = self.images.0.turn(self.chain);
                let _turn = turn.lock().await;
                let size = match self.in_place().await? {
                    Some(size) => size,
                    None => {
                        let unpacked = self.unpack().await?;
                        // The one below fails or finishes; when it fails, this future is dropped.
                        let stopped =
                            |source| Error::because(Kind::Internal, "the layer below was given up", source);
                        below.wait_for(|ready| *ready).await.map_err(stopped)?;
                        self.place(unpacked).await?
                    }
                };
                self.report(LayerProgress::PullComplete);
                size
            }
        };
        done.send_replace(true);
        Ok(size)
    }

    async fn in_place(&self) -> Result<Option<u64>> {
        let (snapshotter, chain) = (self.images.0.snapshotter.clone(), self.chain);
        blocking(move || Ok(snapshotter.layer(&chain)?.map(|record| record.size))).await
    }

    async fn fetch(&self) -> Result<()> {
        let Some(source) = &self.source else { return Ok(()) };
        let total = self.blob.size;
        let mut last = None::<Instant>;
        let mut verified = false;
        self.images
            .0
            .downloads
            .fetch(self.blob.digest, total, source, |state| match state {
                State::Waiting => self.report(LayerProgress::Waiting),
                State::Downloading(current) => {
                    if last.is_none_or(|last| last.elapsed() >= REPORT_INTERVAL) {
                        last = Some(Instant::now());
                        self.report(LayerProgress::Downloading { current: *current, total });
                    }
                }
                State::Retrying(pause) => {
                    self.report(LayerProgress::Retrying { seconds: pause.as_secs().max(1) });
                }
                State::Verifying => {
                    verified = true;
                    self.report(LayerProgress::VerifyingChecksum);
                }
                // A small blob may have been verified between two looks.
                State::Done(Ok(())) if !verified => self.report(LayerProgress::VerifyingChecksum),
                State::Done(_) => {}
            })
            .await?;
        self.report(LayerProgress::DownloadComplete);
        Ok(())
    }

    async fn unpack(&self) -> Result<Written> {
        let _permit = self
            .images
            .0
            .unpacking
            .acquire()
            .await
            .map_err(|_| Error::new(Kind::Internal, "unpacking has ended"))?;
        let meter = Arc::new(Meter::default());
        // Should this future be dropped, the thread gives up at its next read.
        let _stop = Stop(meter.clone());
        let (inner, lease, within) = (self.images.0.clone(), self.lease.clone(), meter.clone());
        let (blob, diff_id, alive) = (self.blob.digest, self.diff_id, self.alive.clone());
        let mut work = std::pin::pin!(blocking(move || {
            let alive = alive;
            let _lease = lease;
            let file = inner.content.open_blob(&blob)?;
            let temporary = inner.snapshotter.layer_temporary()?;
            let unpacked = unpack::unpack_blob(
                &blob.to_string(),
                &file,
                blob,
                temporary.path(),
                &inner.options.limits,
                &within,
            )?;
            if unpacked.diff_id != diff_id {
                return Err(Error::invalid(format!(
                    "layer {blob} unpacks to {}, but the configuration of the image says {diff_id}: refused",
                    unpacked.diff_id
                )));
            }
            Ok(Written { temporary, unpacked, _alive: alive })
        }));
        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        loop {
            tokio::select! {
                result = &mut work => return result,
                _ = ticks.tick() => {
                    let (current, total) = (meter.read.load(Ordering::Relaxed), self.blob.size);
                    self.report(if self.stage == Stage::Load { LayerProgress::Loading { current, total } } else { LayerProgress::Extracting { current, total } });
                }
            }
        }
    }

    async fn place(&self, written: Written) -> Result<u64> {
        let (snapshotter, parent) = (self.images.0.snapshotter.clone(), self.parent);
        let (lease, blob) = (self.lease.clone(), self.blob.digest);
        blocking(move || {
            let Written { temporary, unpacked, _alive } = written;
            let _lease = lease;
            guest_fault::point("pull-layer-unpacked");
            snapshotter.place(temporary, &unpacked, blob, parent).map(|(_, record)| record.size)
        })
        .await
    }
}

/// A layer that is unpacked and not yet in its place. Fields are dropped in this order.
struct Written {
    temporary: Temporary,
    unpacked: Unpacked,
    _alive: mpsc::Sender<()>,
}

/// Asks an unpacking thread to give up when dropped.
struct Stop(Arc<Meter>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }
}
