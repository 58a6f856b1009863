//! Saving: images to an archive that is both, a `docker save` archive (`manifest.json`, `repositories`) and an OCI layout
//! (`index.json`), with one copy of everything.
//!
//! Nothing is made on the disk for it: the blobs are streamed as they are kept, so a manifest that came with an image leaves
//! with it, byte for byte. Only an image whose own blobs are not all here gets a manifest of those that are. The same images
//! give the same archive, always.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Write},
    sync::Arc,
};

use serde::Serialize;

use crate::{
    AnyReference, Digest, Error, Image, Images, Kind, Platform, Reference, Result,
    compression::Compression,
    database,
    download::blocking,
    images::Inner,
    lease::Lease,
    manifest::{self, Descriptor, Index, Manifest},
    tarball::{Entry, EntryKind, Writer},
};

const READ_BYTES: usize = 1 << 20;
/// containerd's annotation: the whole name.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// OCI's annotation: the tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Images that are about to be saved, kept from the collector.
#[derive(Debug)]
pub struct Saving {
    images: Vec<Chosen>,
    inner: Opaque,
    _lease: Arc<Lease>,
}

struct Opaque(Images);

impl std::fmt::Debug for Opaque {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Images")
    }
}

/// An image, and the names it is saved under.
#[derive(Debug)]
struct Chosen {
    image: Image,
    names: Vec<Reference>,
}

/// A line of `manifest.json`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    /// `null` when there is none, as Docker writes it.
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    layer_sources: BTreeMap<String, Descriptor>,
}

/// What goes into the archive under `blobs/sha256/`.
enum Blob {
    Kept(u64),
    Made(Vec<u8>),
}

impl Images {
    /// Finds what `names` mean: an id or the beginning of one is an image without a name, a repository is all its tags.
    pub async fn saving(&self, names: &[String], platform: Option<&Platform>) -> Result<Saving> {
        let lease = self.0.leases.lease();
        let mut chosen: Vec<Chosen> = Vec::new();
        for name in names {
            for (image, names) in self.chosen(name).await? {
                let config = &image.config;
                let offered = Platform {
                    os: config.os.clone(),
                    architecture: config.architecture.clone(),
                    variant: config.variant.clone(),
                };
                if let Some(platform) = platform
                    && platform.fit(&offered).is_none()
                {
                    return Err(Error::not_found(format!(
                        "no suitable export target found for platform {platform}"
                    )));
                }
                if image.layers.is_empty() {
                    return Err(Error::new(Kind::Internal, "empty export - not implemented"));
                }
                match chosen.iter_mut().find(|known| known.image.id == image.id) {
                    Some(known) => known.names.extend(names),
                    None => chosen.push(Chosen { image, names }),
                }
            }
        }
        for Chosen { image, names } in &mut chosen {
            names.sort_by_key(Reference::to_string);
            names.dedup();
            let layers = image.layers.iter().flat_map(|layer| [layer.digest, *layer.chain_id.digest()]);
            lease.hold(layers.chain([image.id, image.manifest_digest])).await;
        }
        chosen.sort_by_key(|chosen| chosen.image.id);
        Ok(Saving { images: chosen, inner: Opaque(self.clone()), _lease: lease })
    }

    async fn chosen(&self, name: &str) -> Result<Vec<(Image, Vec<Reference>)>> {
        let any = AnyReference::parse(name).map_err(|source| Error::invalid(source.to_string()))?;
        let reference = match any {
            AnyReference::Named(reference) => reference,
            AnyReference::Id(_) => return Ok(vec![(self.resolve(name).await?, Vec::new())]),
        };
        if reference.digest().is_some() || reference.familiar_name() == "sha256" {
            return Ok(vec![(self.resolve(name).await?, Vec::new())]);
        }
        if reference.tag().is_some() {
            let found = self.resolve(name).await.map_err(|error| match error.kind() {
                Kind::NotFound => Error::not_found("reference does not exist"),
                _ => error,
            })?;
            return Ok(vec![(found, vec![reference])]);
        }
        let (inner, repository) = (self.0.clone(), reference.name());
        let tags = blocking(move || inner.tags(&repository)).await?;
        if tags.is_empty() {
            let found = self.resolve(name).await.map_err(|error| match error.kind() {
                Kind::NotFound => Error::not_found(format!("No such image: {name}")),
                _ => error,
            })?;
            return Ok(vec![(found, Vec::new())]);
        }
        let mut chosen = Vec::new();
        for tag in tags {
            chosen.push((self.resolve(&tag.familiar()).await?, vec![tag]));
        }
        Ok(chosen)
    }
}

impl Inner {
    /// The tags of a repository. Blocks.
    fn tags(&self, repository: &str) -> Result<Vec<Reference>> {
        let table = self.store.read()?.open_table(database::NAMES)?;
        let mut tags = Vec::new();
        for names in crate::images::names_by_id(&table)?.into_values() {
            tags.extend(names.into_iter().filter(|name| name.tag().is_some() && name.name() == repository));
        }
        tags.sort_by_key(Reference::to_string);
        Ok(tags)
    }

    /// A blob of a layer that is here, and how it is packed. Blocks.
    fn kept_layer(&self, layer: &crate::ImageLayer) -> Result<Descriptor> {
        let (digest, size) = self.layer_blob(layer)?;
        if digest == layer.digest {
            return Ok(Descriptor::new(&layer.media_type, digest, size));
        }
        let mut start = [0; 4];
        let mut file = self.content.open_blob(&digest)?;
        let length =
            file.read(&mut start).map_err(|source| Error::io("read", &self.content.path(&digest), source))?;
        Ok(Descriptor::new(&manifest::packed_layer_type(Compression::detect(&start[..length])), digest, size))
    }
}

impl Saving {
    /// The ids of the images, as `sha256:…`.
    pub fn ids(&self) -> impl Iterator<Item = String> + '_ {
        self.images.iter().map(|chosen| chosen.image.id.to_string())
    }

    /// Writes the archive. Blocks.
    pub fn write(&self, output: impl Write) -> Result<()> {
        let inner = &self.inner.0.0;
        let mut blobs: BTreeMap<Digest, Blob> = BTreeMap::new();
        let mut saved = Vec::new();
        let mut index =
            Index { schema_version: 2, media_type: manifest::OCI_INDEX.to_owned(), manifests: Vec::new() };
        let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        let ids: BTreeSet<Digest> = self.images.iter().map(|chosen| chosen.image.id).collect();
        for Chosen { image, names } in &self.images {
            let layers =
                image.layers.iter().map(|layer| inner.kept_layer(layer)).collect::<Result<Vec<_>>>()?;
            blobs.insert(image.id, Blob::Kept(image.config_json.len() as u64));
            blobs.extend(layers.iter().map(|layer| (layer.digest, Blob::Kept(layer.size))));
            let own = layers.iter().zip(&image.layers).all(|(found, own)| found.digest == own.digest);
            let manifest = self.manifest(image, &layers, own, &mut blobs)?;
            let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
            if names.is_empty() {
                index.manifests.push(manifest.clone());
            }
            for name in names {
                let tag = name.tag().unwrap_or("latest").to_owned();
                let mut named = manifest.clone();
                named.annotations.insert(IMAGE_NAME.to_owned(), name.to_string());
                named.annotations.insert(REF_NAME.to_owned(), tag.clone());
                index.manifests.push(named);
                if let Some(top) = layers.last() {
                    repositories.entry(name.familiar_name()).or_default().insert(tag, top.digest.hex());
                }
            }
            let sources = image.layers.iter().zip(&layers);
            saved.push(SavedImage {
                config: path(&image.id),
                repo_tags: (!names.is_empty()).then(|| names.iter().map(Reference::familiar).collect()),
                layers: layers.iter().map(|layer| path(&layer.digest)).collect(),
                parent: image.parent.filter(|parent| ids.contains(parent)).map(|parent| parent.to_string()),
                layer_sources: sources
                    .map(|(layer, blob)| (layer.diff_id.to_string(), blob.clone()))
                    .collect(),
            });
        }
        let mut archive = Archive(Writer::new(output));
        archive.folder("blobs/")?;
        archive.folder("blobs/sha256/")?;
        for (digest, blob) in &blobs {
            let path = format!("blobs/sha256/{}", digest.hex());
            match blob {
                Blob::Made(bytes) => archive.file(&path, bytes)?,
                Blob::Kept(size) => {
                    let file = inner.content.open_blob(digest)?;
                    archive.stream(&path, *size, file, &inner.content.path(digest))?;
                }
            }
        }
        guest_fault::point("save.after-blobs");
        archive.file("index.json", &database::encode(&index)?)?;
        archive.file("manifest.json", &database::encode(&saved)?)?;
        archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        if !repositories.is_empty() {
            archive.file("repositories", &database::encode(&repositories)?)?;
        }
        archive.0.finish().map(drop).map_err(unwritten)
    }

    /// The manifest that the image came with, or, when its blobs are not all here, one of those that are.
    fn manifest(
        &self,
        image: &Image,
        layers: &[Descriptor],
        own: bool,
        blobs: &mut BTreeMap<Digest, Blob>,
    ) -> Result<Descriptor> {
        if own {
            let digest = image.manifest_digest;
            blobs.insert(digest, Blob::Kept(image.manifest_size));
            return Ok(Descriptor::new(&image.manifest_media_type, digest, image.manifest_size));
        }
        let config = Descriptor::new(manifest::OCI_CONFIG, image.id, image.config_json.len() as u64);
        let made = Manifest {
            schema_version: 2,
            media_type: manifest::OCI_MANIFEST.to_owned(),
            config,
            layers: layers
                .iter()
                .map(|layer| Descriptor {
                    media_type: manifest::oci_layer_type(&layer.media_type),
                    ..layer.clone()
                })
                .collect(),
        };
        let bytes = database::encode(&made)?;
        let digest = Digest::of(&bytes);
        let described = Descriptor::new(manifest::OCI_MANIFEST, digest, bytes.len() as u64);
        blobs.insert(digest, Blob::Made(bytes));
        Ok(described)
    }
}

/// An archive without owners and times.
struct Archive<W>(Writer<W>);

impl<W: Write> Archive<W> {
    fn entry(&mut self, kind: EntryKind, path: &str, size: u64) -> Result<()> {
        let entry = Entry {
            kind,
            path: path.as_bytes().to_vec(),
            link: Vec::new(),
            mode: if kind == EntryKind::Directory { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            device: (0, 0),
            xattrs: Vec::new(),
            size,
            sparse: None,
        };
        self.0.entry(&entry).map_err(unwritten)
    }

    fn folder(&mut self, path: &str) -> Result<()> {
        self.entry(EntryKind::Directory, path, 0)
    }

    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.entry(EntryKind::File, path, bytes.len() as u64)?;
        self.0.data(bytes).map_err(unwritten)
    }

    fn stream(
        &mut self,
        path: &str,
        size: u64,
        mut file: std::fs::File,
        from: &std::path::Path,
    ) -> Result<()> {
        self.entry(EntryKind::File, path, size)?;
        let mut piece = vec![0; READ_BYTES];
        loop {
            let length = file.read(&mut piece).map_err(|source| Error::io("read", from, source))?;
            if length == 0 {
                return Ok(());
            }
            self.0.data(&piece[..length]).map_err(unwritten)?;
        }
    }
}

fn unwritten(source: io::Error) -> Error {
    Error::because(Kind::Internal, "the archive could not be written", source)
}
