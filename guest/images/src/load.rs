//! Loading: from an archive (`docker save`, or a tar of an OCI layout; plain, gzip or zstd) to images in the index.
//!
//! The archive is read once, as a stream: every file in it goes to the content store under its digest, and only then are its
//! tables read, which may come first or last. What the tables do not refer to is collected afterwards.

use std::{
    collections::HashMap,
    io::{BufReader, Read, Write},
    sync::Arc,
};

use serde::Deserialize;

use crate::{
    Digest, Error, Images, Kind, LoadedImage, Platform, Progress, Reference, Result,
    compression::Compression,
    download::blocking,
    image::nullable,
    lease::Lease,
    manifest::{self, Descriptor, Document, Manifest},
    pull::{Listener, Plan, Stage},
    tarball::{EntryKind, Reader, TarError},
};

const ENTRIES_MAX: u64 = 100_000;
const IMAGES_MAX: usize = 1000;
const READ_BYTES: usize = 256 << 10;
const LINKS_MAX: usize = 8;

/// The files of an archive by path, and links between them.
#[derive(Default)]
struct Files {
    blobs: HashMap<String, (Digest, u64)>,
    links: HashMap<String, String>,
}

/// What of an archive is loaded, and how.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Only images for it.
    pub(crate) platform: Option<Platform>,
    /// The name that the archive's only image gets instead of its own.
    pub(crate) name: Option<Reference>,
}

/// One image in `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SavedImage {
    pub(crate) config: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) layers: Vec<String>,
    /// The image it was committed from.
    #[serde(default)]
    pub(crate) parent: Option<String>,
}

/// Reads the table of a `docker save` archive.
pub(crate) fn parse_manifest_json(bytes: &[u8]) -> Result<Vec<SavedImage>> {
    let images: Vec<SavedImage> = serde_json::from_slice(bytes).map_err(|source| {
        Error::because(Kind::Invalid, "the archive's manifest.json is not of the expected form", source)
    })?;
    if images.len() > IMAGES_MAX || images.iter().any(|image| image.layers.len() > manifest::LAYERS_MAX) {
        return Err(Error::invalid(
            "the archive's manifest.json lists more images or layers than are supported",
        ));
    }
    Ok(images)
}

impl Images {
    /// Reads an archive of images. On failure, images of the archive that were complete before it stay.
    pub async fn load(
        &self,
        reader: impl Read + Send + 'static,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Vec<LoadedImage>> {
        self.load_for(reader, None, progress).await
    }

    /// Like [`load`](Self::load), but leaves out what is not for `platform`.
    pub async fn load_for(
        &self,
        reader: impl Read + Send + 'static,
        platform: Option<Platform>,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Vec<LoadedImage>> {
        let wanted = Wanted { platform, name: None };
        self.load_from(reader, Arc::new(progress), wanted).await
    }

    pub(crate) async fn load_from(
        &self,
        reader: impl Read + Send + 'static,
        listener: Listener,
        wanted: Wanted,
    ) -> Result<Vec<LoadedImage>> {
        let result = self.load_images(reader, &listener, wanted).await;
        // Tables, legacy files, and everything of an archive that was refused.
        self.collect().await?;
        result
    }

    async fn load_images(
        &self,
        reader: impl Read + Send + 'static,
        listener: &Listener,
        wanted: Wanted,
    ) -> Result<Vec<LoadedImage>> {
        let lease = self.0.leases.lease();
        let (images, held) = (self.clone(), lease.clone());
        let files = blocking(move || images.spill(reader, &held)).await?;
        guest_fault::point("load.after-archive");
        let (images, held) = (self.clone(), lease.clone());
        let Wanted { platform, name: rename } = wanted;
        let plans = blocking(move || images.plans(&files, platform.as_ref(), &held)).await?;
        let mut loaded = Vec::new();
        if rename.is_some() && plans.len() != 1 {
            return Err(Error::invalid(format!(
                "the archive was to hold one image, but holds {}",
                plans.len()
            )));
        }
        for mut plan in plans {
            if let Some(name) = &rename {
                plan.names = vec![name.clone()];
            }
            let names: Vec<String> = plan.names.iter().map(Reference::familiar).collect();
            let image = self.assemble(plan, lease.clone(), listener, Stage::Load).await?;
            let said = if names.is_empty() { vec![image.id.to_string()] } else { names.clone() };
            said.into_iter().for_each(|name| listener(Progress::Loaded(name)));
            tracing::info!(image = %image.id, ?names, "loaded");
            loaded.push(LoadedImage { id: image.id, names });
        }
        Ok(loaded)
    }

    /// Reads the stream to its end, each file into the content store.
    fn spill(&self, reader: impl Read + Send, lease: &Arc<Lease>) -> Result<Files> {
        let runtime = tokio::runtime::Handle::current();
        let unreadable =
            |source: TarError| Error::because(Kind::Invalid, "the archive cannot be read", source);
        let input = BufReader::with_capacity(READ_BYTES, reader);
        let (_, decoder) =
            Compression::decoder(input).map_err(|source| unreadable(TarError::from(source)))?;
        let mut archive = Reader::new(BufReader::with_capacity(READ_BYTES, decoder));
        let mut files = Files::default();
        let (mut entries, mut total) = (0u64, 0u64);
        while let Some(entry) = archive.next().map_err(unreadable)? {
            entries += 1;
            let limits = &self.0.options.limits;
            total = total.saturating_add(entry.size);
            if entries > ENTRIES_MAX || total > limits.archive_bytes_max {
                return Err(Error::invalid(format!(
                    "the archive is larger than the limit of {} bytes in {ENTRIES_MAX} files",
                    limits.archive_bytes_max
                )));
            }
            let path = plain_path(&entry.path).ok_or_else(|| {
                Error::invalid(format!(
                    "the archive is refused: it has an entry `{}`",
                    String::from_utf8_lossy(&entry.path)
                ))
            })?;
            match entry.kind {
                EntryKind::File if entry.sparse.is_none() => {
                    let mut ingest = self.0.content.ingest()?;
                    let mut piece = vec![0; READ_BYTES];
                    loop {
                        let length =
                            archive.read(&mut piece).map_err(|source| unreadable(TarError::from(source)))?;
                        if length == 0 {
                            break;
                        }
                        ingest.write_all(&piece[..length]).map_err(|source| ingest.failed(source))?;
                    }
                    // Held before it has a name, so that the collector cannot come between.
                    runtime.block_on(lease.hold([ingest.digest()]));
                    files.blobs.insert(path, ingest.finish(None)?);
                    guest_fault::point("load.after-file");
                }
                EntryKind::Symlink | EntryKind::HardLink => {
                    let target = String::from_utf8_lossy(&entry.link).into_owned();
                    let from = if entry.kind == EntryKind::Symlink {
                        path.rsplit_once('/').map_or("", |(folder, _)| folder)
                    } else {
                        ""
                    };
                    if let Some(target) = plain_path(format!("{from}/{target}").as_bytes()) {
                        files.links.insert(path, target);
                    }
                }
                EntryKind::Directory => {}
                _ => {
                    return Err(Error::invalid(format!(
                        "the archive is refused: entry `{path}` is neither a file, nor a folder, nor a link"
                    )));
                }
            }
        }
        Ok(files)
    }

    /// What the archive's tables say is in it.
    fn plans(&self, files: &Files, platform: Option<&Platform>, lease: &Arc<Lease>) -> Result<Vec<Plan>> {
        if let Some((table, _)) = files.find("manifest.json") {
            let table = self.0.content.read(&table, manifest::MANIFEST_BYTES_MAX)?;
            let manifests = self.manifests(files)?;
            let saved = parse_manifest_json(&table)?;
            let parents: Vec<Option<String>> = saved.iter().map(|saved| saved.parent.clone()).collect();
            let mut plans = saved
                .into_iter()
                .map(|saved| self.plan_saved(files, saved, &manifests, lease))
                .collect::<Result<Vec<_>>>()?;
            for (index, parent) in parents.into_iter().enumerate() {
                let claimed = |plan: &&Plan| Some(plan.manifest.config.digest.to_string()) == parent;
                let found = plans.iter().find(claimed).filter(|parent| stands_on(&plans[index], parent));
                plans[index].parent = found.map(|parent| parent.manifest.config.digest);
            }
            return Ok(plans.into_iter().filter(|plan| is_for(plan, platform)).collect());
        }
        if let Some((index, _)) = files.find("index.json") {
            let Document::Index(index) =
                Document::parse(&self.0.content.read(&index, manifest::MANIFEST_BYTES_MAX)?)?
            else {
                return Err(Error::invalid("the archive's index.json is not an index"));
            };
            if index.manifests.len() > IMAGES_MAX {
                return Err(Error::invalid("the archive's index.json lists more images than are supported"));
            }
            // One name may stand for several platforms, and for what was noted about their making.
            let host = platform.cloned().unwrap_or_else(Platform::host);
            let fits = |entry: &&Descriptor| {
                entry.platform.as_ref().is_none_or(|offered| host.fit(offered).is_some())
            };
            let mut entries: Vec<&Descriptor> = index.manifests.iter().filter(fits).collect();
            if entries.is_empty() {
                entries = index.manifests.iter().collect();
            }
            let plans = entries
                .into_iter()
                .map(|entry| self.plan_laid_out(files, entry, platform))
                .collect::<Result<Vec<_>>>()?;
            return Ok(plans.into_iter().filter(|plan| is_for(plan, platform)).collect());
        }
        Err(Error::invalid("the archive holds no image: it has neither a manifest.json nor an index.json"))
    }

    /// The manifests that an archive of both kinds has for its images, where they can be read: the digests they had elsewhere
    /// are worth keeping.
    fn manifests(&self, files: &Files) -> Result<Vec<(Digest, Manifest)>> {
        let Some((index, _)) = files.find("index.json") else { return Ok(Vec::new()) };
        let bytes = self.0.content.read(&index, manifest::MANIFEST_BYTES_MAX)?;
        let Ok(Document::Index(index)) = Document::parse(&bytes) else { return Ok(Vec::new()) };
        let mut manifests = Vec::new();
        for entry in index.manifests.iter().take(IMAGES_MAX) {
            let Some((found, _)) = files.find(&format!("blobs/sha256/{}", entry.digest.hex())) else {
                continue;
            };
            if found != entry.digest {
                continue;
            }
            let bytes = self.0.content.read(&found, manifest::MANIFEST_BYTES_MAX)?;
            if let Ok(Document::Manifest(manifest)) = Document::parse(&bytes) {
                manifests.push((found, manifest));
            }
        }
        Ok(manifests)
    }

    /// An image of a `docker save` archive. It gets one of `manifests`, or a new one.
    fn plan_saved(
        &self,
        files: &Files,
        saved: SavedImage,
        manifests: &[(Digest, Manifest)],
        lease: &Arc<Lease>,
    ) -> Result<Plan> {
        let missing = |path: &str| {
            Error::invalid(format!(
                "the archive is incomplete: its manifest.json names `{path}`, which is not in it"
            ))
        };
        let (config, size) = files.find(&saved.config).ok_or_else(|| missing(&saved.config))?;
        let bytes = self.0.content.read(&config, manifest::CONFIG_BYTES_MAX)?;
        let parsed = manifest::parse_config(&bytes, Some(saved.layers.len()))?;
        let mut layers = Vec::new();
        for path in &saved.layers {
            let (digest, size) = files.find(path).ok_or_else(|| missing(path))?;
            let mut start = [0; 4];
            let length = self
                .0
                .content
                .open_blob(&digest)?
                .read(&mut start)
                .map_err(|source| Error::io("read", &self.0.content.path(&digest), source))?;
            let media_type = manifest::packed_layer_type(Compression::detect(&start[..length]));
            layers.push(Descriptor::new(&media_type, digest, size));
        }
        let config = Descriptor::new(manifest::OCI_CONFIG, config, size);
        let fits = |manifest: &Manifest| {
            manifest.config.digest == config.digest
                && manifest.layers.len() == layers.len()
                && manifest
                    .layers
                    .iter()
                    .zip(&layers)
                    .all(|(theirs, found)| (theirs.digest, theirs.size) == (found.digest, found.size))
        };
        let (manifest_digest, manifest) = match manifests.iter().find(|(_, manifest)| fits(manifest)) {
            Some((digest, manifest)) => (*digest, manifest.clone()),
            None => {
                let media_type = manifest::OCI_MANIFEST.to_owned();
                let manifest = Manifest { schema_version: 2, media_type, config, layers };
                let bytes = crate::database::encode(&manifest)?;
                tokio::runtime::Handle::current().block_on(lease.hold([Digest::of(&bytes)]));
                (self.0.content.insert(&bytes)?, manifest)
            }
        };
        let names = saved.repo_tags.iter().map(|name| {
            name.parse::<Reference>().map(Reference::with_default_tag).map_err(|source| {
                Error::because(Kind::Invalid, format!("the archive names an image `{name}`"), source)
            })
        });
        Ok(Plan {
            manifest_digest,
            manifest,
            indexes: Vec::new(),
            config: parsed,
            source: None,
            names: names.collect::<Result<_>>()?,
            parent: None,
        })
    }

    /// An image of an OCI layout.
    fn plan_laid_out(&self, files: &Files, entry: &Descriptor, platform: Option<&Platform>) -> Result<Plan> {
        let missing = |digest: &Digest| {
            Error::invalid(format!("the archive is incomplete: blob {digest} is not in it"))
        };
        let have = |digest: &Digest| {
            files
                .find(&format!("blobs/sha256/{}", digest.hex()))
                .filter(|(found, _)| found == digest)
                .ok_or_else(|| missing(digest))
        };
        let (mut digest, mut indexes) = (entry.digest, Vec::new());
        let manifest = loop {
            have(&digest)?;
            match Document::parse(&self.0.content.read(&digest, manifest::MANIFEST_BYTES_MAX)?)? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(_) if indexes.len() > 2 => {
                    return Err(Error::invalid("the image is an index of indexes of indexes: refused"));
                }
                Document::Index(index) => {
                    let wanted = platform.cloned().unwrap_or_else(Platform::host);
                    let chosen = index.choose(&wanted).ok_or_else(|| {
                        Error::not_found(format!("no matching manifest for {wanted} in the archive"))
                    })?;
                    indexes.push(digest);
                    digest = chosen.digest;
                }
            }
        };
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            let (_, size) = have(&blob.digest)?;
            if size != blob.size {
                return Err(Error::invalid(format!(
                    "blob {} of the archive has {size} bytes, but its manifest says {}: refused",
                    blob.digest, blob.size
                )));
            }
        }
        let config = manifest::parse_config(
            &self.0.content.read(&manifest.config.digest, manifest::CONFIG_BYTES_MAX)?,
            Some(manifest.layers.len()),
        )?;
        // containerd's word has the whole name; the specification's is often a tag only, which names nothing.
        let name = entry.annotations.get("io.containerd.image.name").or_else(|| {
            entry
                .annotations
                .get("org.opencontainers.image.ref.name")
                .filter(|name| name.contains([':', '/']))
        });
        let name = name
            .map(|name| {
                name.parse::<Reference>().map_err(|source| {
                    Error::because(Kind::Invalid, format!("the archive names an image `{name}`"), source)
                })
            })
            .transpose()?;
        Ok(Plan {
            manifest_digest: digest,
            manifest,
            indexes,
            config,
            source: None,
            names: name.map(Reference::with_default_tag).into_iter().collect(),
            parent: None,
        })
    }
}

/// Whether an image can have been committed from another, whatever the archive says: it has one step more.
fn stands_on(image: &Plan, parent: &Plan) -> bool {
    let (image, parent) = (&image.config, &parent.config);
    let one_more = image.history.len() == parent.history.len() + 1
        || (image.history.is_empty() && parent.history.is_empty());
    one_more
        && image.history.starts_with(&parent.history)
        && image.rootfs.diff_ids.starts_with(&parent.rootfs.diff_ids)
}

/// Whether an image is what was asked for.
fn is_for(plan: &Plan, platform: Option<&Platform>) -> bool {
    let config = &plan.config;
    let offered = Platform {
        os: config.os.clone(),
        architecture: config.architecture.clone(),
        variant: config.variant.clone(),
    };
    platform.is_none_or(|platform| platform.fit(&offered).is_some())
}

impl Files {
    /// A file, through links.
    fn find(&self, path: &str) -> Option<(Digest, u64)> {
        let mut path = plain_path(path.as_bytes())?;
        for _ in 0..LINKS_MAX {
            if let Some(found) = self.blobs.get(&path) {
                return Some(*found);
            }
            path = self.links.get(&path)?.clone();
        }
        None
    }
}

/// A path without `.` and `..`; `None` when it leads out or is not text.
fn plain_path(path: &[u8]) -> Option<String> {
    let mut parts = Vec::new();
    for part in std::str::from_utf8(path).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_plain() {
        assert_eq!(plain_path(b"./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(plain_path(b"../x"), None);
        assert_eq!(plain_path(&[0xff]), None);
    }

    #[test]
    fn the_table_of_a_saved_archive_is_read() {
        let images =
            parse_manifest_json(br#"[{"Config":"c.json","RepoTags":null,"Layers":["a/layer.tar"]}]"#)
                .expect("a table");
        assert_eq!(
            images,
            [SavedImage {
                config: "c.json".to_owned(),
                repo_tags: Vec::new(),
                layers: vec!["a/layer.tar".to_owned()],
                parent: None,
            }]
        );
        assert!(parse_manifest_json(b"{}").is_err());
    }

    #[test]
    fn links_in_circles_lead_nowhere() {
        let mut files = Files::default();
        files.links.insert("a".to_owned(), "b".to_owned());
        files.links.insert("b".to_owned(), "a".to_owned());
        assert_eq!(files.find("a"), None);
    }
}
