//! One layer on its way out.

use std::{
    io::{BufReader, Read, Write},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use flate2::write::GzEncoder;

use super::Push;
use crate::{
    Digest, Error, Hasher, ImageLayer, Kind, Progress, Result, UploadProgress,
    compression::Compression,
    download::blocking,
    manifest::{DOCKER_LAYER, Descriptor, OCI_LAYER},
    places::Place,
    registry::{Failure, Mount, Session},
};

/// Digests asked for before a layer is sent, and neighbours asked for one, at most: dockerd's numbers for large layers.
const EXISTENCE_CHECKS_MAX: usize = 3;
const MOUNTS_MAX: usize = 4;
/// Between two progress reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
const READ_BYTES: usize = 256 << 10;

/// One layer of a push.
pub(super) struct PushLayer<'a> {
    push: &'a Push,
    pub(super) layer: &'a ImageLayer,
}

/// What a try has reached, for the next.
#[derive(Default)]
struct Reached {
    /// The blob to send, once it is known that it must be.
    blob: Option<Descriptor>,
    session: Option<Session>,
}

impl<'a> PushLayer<'a> {
    pub(super) fn new(push: &'a Push, layer: &'a ImageLayer) -> Self {
        Self { push, layer }
    }

    pub(super) fn prepare(&self) {
        self.report(UploadProgress::Preparing);
    }

    fn report(&self, state: UploadProgress) {
        (self.push.listener)(Progress::Upload { id: self.layer.diff_id.short(), state });
    }

    fn is_there(&self, blob: &Descriptor) {
        let mut there = self.push.there.lock().unwrap_or_else(PoisonError::into_inner);
        there.insert(self.layer.diff_id, blob.clone());
    }

    /// Sees to it that the registry has the layer.
    pub(super) async fn run(&self) -> Result<()> {
        let inner = &self.push.images.0;
        let ended = |_| Error::new(Kind::Internal, "pushing has ended");
        let _permit = match inner.uploading.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                self.report(UploadProgress::Waiting);
                inner.uploading.acquire().await.map_err(ended)?
            }
        };
        let mut reached = Reached::default();
        let mut tries = 1;
        loop {
            match self.attempt(&mut reached).await {
                Ok(blob) => {
                    self.is_there(&blob);
                    return self.note(blob).await;
                }
                Err(Failure::Passing(error)) if tries < inner.options.upload_attempts => {
                    let pause = inner.options.retry_pause * 2u32.pow((tries - 1).min(10));
                    tracing::debug!(layer = %self.layer.diff_id, error = %error.chain(), ?pause, "upload is tried again");
                    self.report(UploadProgress::Retrying { seconds: pause.as_secs().max(1) });
                    tokio::time::sleep(pause).await;
                    tries += 1;
                }
                Err(failure) => return Err(self.push.repository.push_error(failure)),
            }
        }
    }

    async fn attempt(&self, reached: &mut Reached) -> Result<Descriptor, Failure> {
        let known =
            self.push.there.lock().unwrap_or_else(PoisonError::into_inner).get(&self.layer.diff_id).cloned();
        if let Some(blob) = known {
            self.report(UploadProgress::Exists);
            return Ok(blob);
        }
        if reached.blob.is_none() {
            let places = self.places().await.map_err(Failure::Final)?;
            if let Some(blob) = self.find(&places).await {
                self.report(UploadProgress::Exists);
                return Ok(blob);
            }
            if let Some((blob, from)) = self.mount(&places, reached).await {
                self.report(UploadProgress::Mounted { from });
                return Ok(blob);
            }
            reached.blob = Some(self.blob().await.map_err(Failure::Final)?);
        }
        let Some(blob) = reached.blob.clone() else {
            return Err(Failure::Final(Error::new(Kind::Internal, "there is nothing to send")));
        };
        self.send(&blob, reached).await?;
        self.report(UploadProgress::Pushed);
        Ok(blob)
    }

    /// Where the layer may be already: as the image says, then as earlier pulls and pushes found it.
    async fn places(&self) -> Result<Vec<Place>> {
        let (inner, diff_id) = (self.push.images.0.clone(), self.layer.diff_id);
        let target = self.push.repository.reference().name();
        let mut places = vec![Place {
            blob: self.layer.digest,
            size: self.layer.blob_size,
            media_type: self.layer.media_type.clone(),
            repository: String::new(),
        }];
        let mut noted = blocking(move || inner.places(&diff_id)).await?;
        noted.sort_by_key(|place| place.repository != target);
        places.extend(noted);
        Ok(places)
    }

    async fn find(&self, places: &[Place]) -> Option<Descriptor> {
        let mut asked: Vec<Digest> = Vec::new();
        for place in places {
            if asked.contains(&place.blob) || asked.len() == EXISTENCE_CHECKS_MAX {
                continue;
            }
            asked.push(place.blob);
            match self.push.repository.blob_size(&place.blob).await {
                // Some say nothing about the size; one that says another size has something else.
                Ok(Some(size)) if size == place.size || size == 0 => return Some(place.descriptor()),
                Ok(_) => {
                    if place.repository == self.push.repository.reference().name() {
                        self.forget(place).await;
                    }
                }
                // The upload will be told the same, and say so.
                Err(failure) => {
                    tracing::debug!(blob = %place.blob, ?failure, "cannot tell whether the layer is there")
                }
            }
        }
        None
    }

    /// Asks for the layer from the neighbours that have it. Answers the blob and where it came from.
    async fn mount(&self, places: &[Place], reached: &mut Reached) -> Option<(Descriptor, String)> {
        let target = self.push.repository.reference();
        let registry = format!("{}/", target.domain());
        let neighbours = places.iter().filter_map(|place| {
            let path = place.repository.strip_prefix(&registry)?;
            (path != target.path()).then_some((place, path))
        });
        for (place, path) in neighbours.take(MOUNTS_MAX) {
            match self.push.repository.mount(&place.blob, path).await {
                Ok(Mount::Mounted) => return Some((place.descriptor(), path.to_owned())),
                Ok(Mount::Upload(session)) => {
                    // It has it no longer, or may not lend it. The upload that was begun instead will do.
                    self.forget(place).await;
                    reached.session = Some(session);
                    return None;
                }
                Err(failure) => {
                    tracing::debug!(blob = %place.blob, from = path, ?failure, "the layer cannot be mounted")
                }
            }
        }
        None
    }

    async fn forget(&self, place: &Place) {
        let (inner, diff_id, place) = (self.push.images.0.clone(), self.layer.diff_id, place.clone());
        let forgotten = blocking(move || inner.forget_place(&diff_id, &place.blob, &place.repository)).await;
        if let Err(error) = forgotten {
            tracing::debug!(error = %error.chain(), "a hint about a layer stays, wrong as it is");
        }
    }

    async fn note(&self, blob: Descriptor) -> Result<()> {
        let (inner, diff_id, repository) =
            (self.push.images.0.clone(), self.layer.diff_id, self.push.repository.reference().name());
        blocking(move || inner.note_places(&repository, [(&diff_id, blob)])).await
    }

    async fn send(&self, blob: &Descriptor, reached: &mut Reached) -> Result<(), Failure> {
        let repository = &self.push.repository;
        // What an earlier try began goes on where the registry says it stopped.
        let resumed = match &reached.session {
            Some(session) => repository.resume(session).await?,
            None => None,
        };
        let session = match resumed {
            Some(session) => reached.session.insert(session),
            None => {
                reached.session = None;
                let session = repository.begin().await?;
                reached.session.insert(session)
            }
        };
        guest_fault::point("push-upload-begun");
        let sent = Arc::new(AtomicU64::new(0));
        let open = |offset: u64| {
            let mut file = self.push.images.0.content.open_blob(&blob.digest)?;
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(offset)).map_err(|source| {
                Error::io("read", &self.push.images.0.content.path(&blob.digest), source)
            })?;
            Ok(file)
        };
        let mut work = std::pin::pin!(repository.send_blob(session, &blob.digest, blob.size, &open, &sent));
        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        loop {
            tokio::select! {
                result = &mut work => return result,
                _ = ticks.tick() => {
                    let current = sent.load(Ordering::Relaxed).min(blob.size);
                    self.report(UploadProgress::Pushing { current, total: blob.size });
                }
            }
        }
    }

    /// The blob to send: as it came when it came compressed, else packed now.
    async fn blob(&self) -> Result<Descriptor> {
        let (inner, layer, lease) = (self.push.images.0.clone(), self.layer.clone(), self.push.lease.clone());
        let (at_work, failed) = (self.push.packing.token(), self.push.failed.clone());
        blocking(move || {
            let _at_work = at_work;
            let (digest, size) = inner.layer_blob(&layer)?;
            let file = inner.content.open_blob(&digest)?;
            let path = inner.content.path(&digest);
            let unreadable = |source| Error::io("read", &path, source);
            let (compression, mut plain) =
                Compression::decoder(BufReader::with_capacity(READ_BYTES, file)).map_err(unreadable)?;
            if matches!(compression, Compression::Gzip | Compression::Zstd) {
                let usual = if compression == Compression::Zstd {
                    format!("{OCI_LAYER}+zstd")
                } else {
                    DOCKER_LAYER.to_owned()
                };
                let media_type = if digest == layer.digest { layer.media_type.clone() } else { usual };
                return Ok(Descriptor::new(&media_type, digest, size));
            }
            // The same bytes in, the same bytes out: a layer that was pushed once is found again.
            let mut packed = GzEncoder::new(inner.content.ingest()?, flate2::Compression::default());
            let (mut hasher, mut piece) = (Hasher::default(), vec![0; READ_BYTES]);
            loop {
                let length = plain.read(&mut piece).map_err(unreadable)?;
                if length == 0 {
                    break;
                }
                if failed.is_cancelled() {
                    return Err(Error::new(Kind::Internal, "the push has ended"));
                }
                hasher.update(&piece[..length]);
                packed.write_all(&piece[..length]).map_err(|source| Error::io("pack", &path, source))?;
            }
            let packed = packed.finish().map_err(|source| Error::io("pack", &path, source))?;
            if hasher.finish() != layer.diff_id {
                return Err(Error::corrupt(format!(
                    "blob {digest} in `{}` is damaged: its content is not layer {}",
                    path.display(),
                    layer.diff_id
                )));
            }
            // Held before it has a name, so that the collector cannot come between.
            tokio::runtime::Handle::current().block_on(lease.hold([packed.digest()]));
            let (digest, size) = packed.finish(None)?;
            Ok(Descriptor::new(DOCKER_LAYER, digest, size))
        })
        .await
    }
}
