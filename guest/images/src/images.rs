//! The index of images, and the operations on it that touch no network and no archive.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use redb::{ReadableTable, WriteTransaction};
use tokio::sync::Semaphore;

use crate::{
    AnyReference, ChainId, ContentStore, Digest, Error, Image, ImageId, ImageLayer, Kind, Reference, Result,
    Snapshotter,
    database::{self, ImageRecord, NAMES, RECORDS, Store},
    download::{Downloads, blocking},
    lease::Leases,
    manifest,
    registry::{Proxies, Registries},
};

/// How to keep images.
#[derive(Debug, Clone)]
pub struct Options {
    /// Registries that may be spoken to without TLS or without a known certificate: `host`, `host:port` or a network
    /// (`10.0.0.0/8`). `localhost` and 127.0.0.0/8 always are.
    pub insecure_registries: Vec<String>,
    /// Mirrors of Docker Hub, as URLs, asked in order before it.
    pub mirrors: Vec<String>,
    /// A folder of archives: `hello.tar` is the image `hello:latest`, found before any registry is asked.
    pub bundled: Option<PathBuf>,
    /// A folder with a folder for each registry that has certificates of its own: `<host:port>/ca.crt`, `client.cert` and
    /// `client.key`.
    pub certificates: Option<PathBuf>,
    /// The way out to registries that are not on this computer.
    pub proxies: Proxies,
    /// Downloads at a time, over all pulls.
    pub concurrent_downloads: usize,
    /// Uploads at a time, over all pushes.
    pub concurrent_uploads: usize,
    /// Tries in a row that bring nothing, before a download is given up.
    pub download_attempts: u32,
    /// Tries before an upload is given up.
    pub upload_attempts: u32,
    /// The pause before the second try; it doubles with each.
    pub retry_pause: Duration,
    /// What an image may cost at most.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        // The numbers are Docker's.
        Self {
            insecure_registries: Vec::new(),
            mirrors: Vec::new(),
            bundled: None,
            certificates: None,
            proxies: Proxies::from_environment(),
            concurrent_downloads: 3,
            concurrent_uploads: 5,
            download_attempts: 5,
            upload_attempts: 5,
            retry_pause: Duration::from_millis(500),
            limits: Limits::default(),
        }
    }
}

/// What an image may cost at most: the bound on decompression bombs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one uncompressed layer.
    pub layer_bytes_max: u64,
    /// Files, folders and links in one layer.
    pub layer_entries_max: u64,
    /// Bytes of one archive given to `load`, uncompressed.
    pub archive_bytes_max: u64,
}

impl Default for Limits {
    /// Several times the largest images in use (machine learning: 20 GB in a layer, a million files).
    fn default() -> Self {
        Self { layer_bytes_max: 64 << 30, layer_entries_max: 4_000_000, archive_bytes_max: 256 << 30 }
    }
}

/// What the store occupies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Bytes of all blobs.
    pub blobs: u64,
    /// Bytes of the files in all unpacked layers, each layer counted once.
    pub layers: u64,
}

/// The index of images, its store and its layers. Cheap to clone.
#[derive(Clone)]
pub struct Images(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) content: ContentStore,
    pub(crate) snapshotter: Snapshotter,
    pub(crate) leases: Leases,
    pub(crate) downloads: Downloads,
    pub(crate) registries: Registries,
    pub(crate) options: Options,
    /// One unpacking of a chain at a time.
    pub(crate) turns: Mutex<HashMap<ChainId, Arc<tokio::sync::Mutex<()>>>>,
    /// Unpackings at a time, over all pulls and loads.
    pub(crate) unpacking: Semaphore,
    /// Uploads at a time, over all pushes.
    pub(crate) uploading: Semaphore,
    problems: Vec<String>,
}

impl Images {
    /// Opens the store in `root` (made when absent), sweeping what a crash left. Blocks.
    pub fn open(root: &Path, database: Arc<redb::Database>, options: Options) -> Result<Self> {
        let store = Store::open(database)?;
        let content = ContentStore::open(root, store.clone())?;
        let snapshotter = Snapshotter::open(root, store.clone())?;
        let problems = crate::sweep::at_start(&store, &content, &snapshotter)?;
        let registries = Registries::new(
            &options.insecure_registries,
            &options.mirrors,
            options.certificates.clone(),
            options.proxies.clone(),
        )?;
        let downloads = Downloads::new(content.clone(), &options);
        let uploading = Semaphore::new(options.concurrent_uploads.max(1));
        // Each takes a thread that decompresses and one that writes.
        let unpacking = Semaphore::new(
            std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(2, 8),
        );
        let leases = Leases::default();
        Ok(Self(Arc::new(Inner {
            store,
            content,
            snapshotter,
            leases,
            downloads,
            registries,
            options,
            turns: Mutex::default(),
            unpacking,
            uploading,
            problems,
        })))
    }

    /// Sentences about damaged or missing pieces that were found at open.
    pub fn problems(&self) -> &[String] {
        &self.0.problems
    }

    /// The unpacked layers and the containers' folders on top of them.
    pub fn snapshotter(&self) -> &Snapshotter {
        &self.0.snapshotter
    }

    /// The blobs.
    pub fn content(&self) -> &ContentStore {
        &self.0.content
    }

    /// All images, newest first. One whose configuration is damaged is left out, with a warning in the log.
    pub async fn list(&self) -> Result<Vec<Image>> {
        let inner = self.0.clone();
        blocking(move || {
            let transaction = inner.store.read()?;
            let records = database::all::<ImageRecord>(&transaction.open_table(RECORDS)?)?;
            let mut names = names_by_id(&transaction.open_table(NAMES)?)?;
            let mut images = Vec::new();
            for (key, record) in records {
                let id = database::digest_of_key(&key)?;
                match inner.image(id, record, names.remove(&id).unwrap_or_default()) {
                    Ok(image) => images.push(image),
                    Err(error) => tracing::warn!(image = %id, error = %error.chain(), "image is damaged"),
                }
            }
            images.sort_by(|a: &Image, b: &Image| {
                b.config.created.cmp(&a.config.created).then_with(|| a.id.cmp(&b.id))
            });
            Ok(images)
        })
        .await
    }

    /// Finds an image by name, name with digest, id or the beginning of an id.
    pub async fn resolve(&self, name: &str) -> Result<Image> {
        let (inner, name) = (self.0.clone(), name.to_owned());
        blocking(move || {
            let found = inner.find(&name)?;
            let names =
                names_by_id(&inner.store.read()?.open_table(NAMES)?)?.remove(&found.id).unwrap_or_default();
            inner.image(found.id, found.record, names)
        })
        .await
    }

    /// Gives the image `source` (anything [`resolve`](Self::resolve) takes) the further name `target`.
    pub async fn tag(&self, source: &str, target: &Reference) -> Result<()> {
        let (inner, source, target) = (self.0.clone(), source.to_owned(), target.clone().with_default_tag());
        if target.digest().is_some() {
            return Err(Error::invalid("refusing to create a tag with a digest reference"));
        }
        if target.familiar_name() == "sha256" {
            return Err(Error::invalid("refusing to create an ambiguous tag using digest algorithm as name"));
        }
        blocking(move || {
            let found = inner.find(&source)?;
            let transaction = inner.store.write()?;
            {
                let mut records = transaction.open_table(RECORDS)?;
                let key = found.id.hex();
                let record =
                    database::get::<ImageRecord>(&records, &key)?.ok_or_else(|| no_such_image(&source))?;
                records.insert(
                    key.as_str(),
                    database::encode(&ImageRecord { last_tagged: now(), ..record })?.as_slice(),
                )?;
                transaction.open_table(NAMES)?.insert(target.to_string().as_str(), key.as_str())?;
            }
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Removes what nothing refers to; answers the bytes freed.
    pub async fn collect_garbage(&self) -> Result<u64> {
        Ok(self.collect().await?.bytes)
    }

    /// The same, if the image `id` is gone: for when a container that was made from it goes.
    pub async fn collect_orphans(&self, id: &str) -> Result<()> {
        let (inner, key) = (self.0.clone(), id.trim_start_matches("sha256:").to_owned());
        let known =
            blocking(move || Ok(inner.store.read()?.open_table(RECORDS)?.get(key.as_str())?.is_some()));
        if !known.await? {
            self.collect().await?;
        }
        Ok(())
    }

    /// What the store occupies.
    pub async fn disk_usage(&self) -> Result<DiskUsage> {
        let inner = self.0.clone();
        blocking(move || {
            let transaction = inner.store.read()?;
            let blobs = ContentStore::rows(&transaction.open_table(database::BLOBS)?)?
                .iter()
                .map(|(_, size)| size)
                .sum();
            let layers = database::all::<database::LayerRecord>(&transaction.open_table(database::LAYERS)?)?
                .iter()
                .map(|(_, layer)| layer.size)
                .sum();
            Ok(DiskUsage { blobs, layers })
        })
        .await
    }
}

/// What a name or id stands for.
pub(crate) struct Found {
    pub(crate) id: ImageId,
    pub(crate) record: ImageRecord,
    /// The name as it is in the index, when it was found by one.
    pub(crate) by_name: Option<Reference>,
}

impl Inner {
    /// Docker's order: an id in full, a name, the beginning of an id.
    pub(crate) fn find(&self, text: &str) -> Result<Found> {
        let any = AnyReference::parse(text).map_err(|source| Error::invalid(source.to_string()))?;
        let transaction = self.store.read()?;
        let records = transaction.open_table(RECORDS)?;
        let reference = match any {
            AnyReference::Id(id) => {
                let record = database::get(&records, &id.hex())?
                    .ok_or_else(|| Error::not_found(format!("No such image: {id}")))?;
                return Ok(Found { id, record, by_name: None });
            }
            AnyReference::Named(reference) => index_name(&reference),
        };
        let named = transaction
            .open_table(NAMES)?
            .get(reference.to_string().as_str())?
            .map(|id| id.value().to_owned());
        if let Some(key) = named {
            let record = database::get(&records, &key)?.ok_or_else(|| {
                Error::corrupt(format!(
                    "the name {} stands for the image {key}, which is gone: remove the name",
                    reference.familiar()
                ))
            })?;
            return Ok(Found { id: database::digest_of_key(&key)?, record, by_name: Some(reference) });
        }
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        let hexadecimal = !prefix.is_empty()
            && prefix.len() <= 64
            && prefix.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !hexadecimal {
            return Err(no_such_image(text));
        }
        let matching = records
            .range(prefix..)?
            .take_while(|row| row.as_ref().map_or(true, |(key, _)| key.value().starts_with(prefix)))
            .take(2)
            .map(|row| Ok(row?.0.value().to_owned()))
            .collect::<Result<Vec<String>>>()?;
        match &matching[..] {
            [] => Err(no_such_image(text)),
            [key] => {
                let record = database::get(&records, key)?.ok_or_else(|| no_such_image(text))?;
                Ok(Found { id: database::digest_of_key(key)?, record, by_name: None })
            }
            [first, second, ..] => Err(Error::invalid(format!(
                "the image id `{text}` is ambiguous: it begins both sha256:{first} and sha256:{second}"
            ))),
        }
    }

    pub(crate) fn image(&self, id: ImageId, record: ImageRecord, names: Vec<Reference>) -> Result<Image> {
        let bytes = self.content.read(&id, manifest::CONFIG_BYTES_MAX)?;
        let config = manifest::parse_config(&bytes, None)?;
        let config_json = String::from_utf8(bytes).map_err(|source| {
            Error::because(Kind::Corrupt, format!("the configuration of image {id} is not text"), source)
        })?;
        let (digests, tags): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.digest().is_some());
        let familiar = |names: Vec<Reference>| names.iter().map(Reference::familiar).collect();
        Ok(Image {
            id,
            manifest_digest: record.manifest,
            manifest_size: self.content.size(&record.manifest)?.unwrap_or_default(),
            manifest_media_type: record.manifest_media_type,
            config,
            config_json,
            repo_tags: familiar(tags),
            repo_digests: familiar(digests),
            size: record.layers.iter().map(|layer| layer.size).sum(),
            layers: record.layers,
            parent: record.parent,
            last_tagged: record.last_tagged,
        })
    }

    /// Writes an image and its names into the index. The caller has synced the disk and holds a lease.
    pub(crate) fn index(
        &self,
        transaction: &WriteTransaction,
        id: ImageId,
        record: &ImageRecord,
        names: &[Reference],
    ) -> Result<()> {
        let mut blobs = vec![id, record.manifest];
        blobs.extend(&record.indexes);
        for layer in &record.layers {
            // Absent when the unpacked layer was here first.
            if self.content.size(&layer.digest)?.is_some() {
                blobs.push(layer.digest);
            }
        }
        blobs.extend(self.layer_blobs(record)?);
        let chains: Vec<ChainId> = record.layers.iter().map(|layer| layer.chain_id).collect();
        self.content.record(transaction, &blobs)?;
        self.snapshotter.record_layers(transaction, &chains)?;
        let mut records = transaction.open_table(RECORDS)?;
        // What comes again from elsewhere was still made here.
        let known = database::get::<ImageRecord>(&records, &id.hex())?;
        let parent = record.parent.or(known.and_then(|known| known.parent));
        let record = ImageRecord { parent, ..record.clone() };
        records.insert(id.hex().as_str(), database::encode(&record)?.as_slice())?;
        let mut table = transaction.open_table(NAMES)?;
        for name in names {
            table.insert(name.to_string().as_str(), id.hex().as_str())?;
        }
        Ok(())
    }

    /// Makes an image part of the index, durably.
    pub(crate) fn commit(&self, id: ImageId, record: &ImageRecord, names: &[Reference]) -> Result<()> {
        self.snapshotter.sync()?;
        let transaction = self.store.write()?;
        self.index(&transaction, id, record, names)?;
        transaction.commit()?;
        let blobs: Vec<Digest> = [id, record.manifest]
            .into_iter()
            .chain(record.indexes.iter().copied())
            .chain(record.layers.iter().map(|layer| layer.digest))
            .chain(self.layer_blobs(record)?)
            .collect();
        let chains: Vec<ChainId> = record.layers.iter().map(|layer| layer.chain_id).collect();
        self.content.recorded(&blobs);
        self.snapshotter.recorded(&chains);
        Ok(())
    }

    /// The blobs that an image's layers were unpacked from, as far as they are here.
    fn layer_blobs(&self, record: &ImageRecord) -> Result<Vec<Digest>> {
        let mut blobs = Vec::new();
        for layer in &record.layers {
            if let Some(blob) = self.snapshotter.layer(&layer.chain_id)?.and_then(|record| record.blob)
                && self.content.size(&blob)?.is_some()
            {
                blobs.push(blob);
            }
        }
        Ok(blobs)
    }

    /// A blob, with its size, that unpacks to exactly this layer: the image's own, or the one that another image brought.
    pub(crate) fn layer_blob(&self, layer: &ImageLayer) -> Result<(Digest, u64)> {
        if let Some(size) = self.content.size(&layer.digest)? {
            return Ok((layer.digest, size));
        }
        let other = self.snapshotter.layer(&layer.chain_id)?.and_then(|record| record.blob);
        if let Some(blob) = other
            && let Some(size) = self.content.size(&blob)?
        {
            return Ok((blob, size));
        }
        Err(Error::corrupt(format!(
            "layer {} is here only unpacked: pull or load the image again to have its archive",
            layer.diff_id
        )))
    }

    /// Gives an image a further name, durably, and touches nothing else.
    pub(crate) fn add_name(&self, name: &Reference, id: ImageId) -> Result<()> {
        let transaction = self.store.write()?;
        {
            let known = transaction.open_table(RECORDS)?.get(id.hex().as_str())?.is_some();
            if known {
                transaction.open_table(NAMES)?.insert(name.to_string().as_str(), id.hex().as_str())?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// The lock under which one chain is unpacked.
    pub(crate) fn turn(&self, chain: ChainId) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(chain).or_default().clone()
    }
}

/// A name as the index has it: with a tag or with a digest. A digest says more than a tag beside it.
fn index_name(reference: &Reference) -> Reference {
    match reference.digest() {
        Some(digest) => reference.with_digest(*digest),
        None => reference.clone().with_default_tag(),
    }
}

pub(crate) fn no_such_image(text: &str) -> Error {
    let shown = text
        .parse::<Reference>()
        .map_or_else(|_| text.to_owned(), |reference| reference.with_default_tag().familiar());
    Error::not_found(format!("No such image: {shown}"))
}

pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// The names of every image, sorted, as the table is.
pub(crate) fn names_by_id(
    table: &impl ReadableTable<&'static str, &'static str>,
) -> Result<HashMap<ImageId, Vec<Reference>>> {
    let mut names: HashMap<ImageId, Vec<Reference>> = HashMap::new();
    for row in table.iter()? {
        let (name, id) = row?;
        let reference = name.value().parse().map_err(|source| {
            Error::because(Kind::Corrupt, format!("the index has the name `{}`", name.value()), source)
        })?;
        names.entry(database::digest_of_key(id.value())?).or_default().push(reference);
    }
    Ok(names)
}
