//! Manifests, indexes and configurations: JSON from a registry or an archive, checked before anything believes it.

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, ImageConfig, Platform, Result, compression::Compression, image::nullable};

/// Bytes of a manifest or an index at most, as in containerd and the registry itself.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Bytes of a configuration at most.
pub const CONFIG_BYTES_MAX: u64 = 8 << 20;
/// Layers of an image at most: overlayfs takes 500 lower folders.
pub const LAYERS_MAX: usize = 400;
/// Manifests in one index at most.
const INDEX_ENTRIES_MAX: usize = 4096;

/// Docker's manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's list of manifests.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// OCI's manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI's index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI's configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI's plain layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Docker's configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker's compressed layer.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// What a request for a manifest accepts.
pub const ACCEPT: [&str; 4] = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST];

/// A pointer to a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default, deserialize_with = "nullable")]
    pub media_type: String,
    /// Which bytes.
    pub digest: Digest,
    /// How many.
    pub size: u64,
    /// For which machine, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Further words, such as the name in an archive.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "std::collections::BTreeMap::is_empty"
    )]
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl Descriptor {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            platform: None,
            annotations: Default::default(),
        }
    }
}

/// The manifest of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Docker's or OCI's.
    #[serde(default, deserialize_with = "nullable")]
    pub media_type: String,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, bottom first.
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<Descriptor>,
}

/// A list of manifests, one for each platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Docker's or OCI's.
    #[serde(default, deserialize_with = "nullable")]
    pub media_type: String,
    /// The manifests.
    #[serde(default, deserialize_with = "nullable")]
    pub manifests: Vec<Descriptor>,
}

/// A document that a name may stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// A choice of images.
    Index(Index),
}

/// What tells the documents apart, whatever the server says it sent.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    #[serde(rename = "fsLayers")]
    fs_layers: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a manifest or an index.
    ///
    /// The bytes decide what it is, not the header they came with, and a document that could be read as both is refused
    /// (CVE-2021-41190).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bad = |source| {
            Error::because(
                crate::Kind::Invalid,
                "the manifest is not valid JSON of the expected form",
                source,
            )
        };
        let outline: Outline = serde_json::from_slice(bytes).map_err(bad)?;
        if outline.schema_version == Some(1) || outline.fs_layers.is_some() {
            return Err(Error::invalid(
                "the image has a manifest of the old format (schema 1), which is no longer supported; push it again with a current tool",
            ));
        }
        if outline.schema_version != Some(2) {
            return Err(Error::invalid(format!(
                "the manifest has schema version {:?}; this engine reads version 2",
                outline.schema_version.unwrap_or(0)
            )));
        }
        let is_index = outline.manifests.is_some();
        if is_index && (outline.config.is_some() || outline.layers.is_some()) {
            return Err(Error::invalid("the manifest claims to be both an image and an index of images"));
        }
        let stated = outline.media_type.as_deref().unwrap_or("");
        let allowed: &[&str] =
            if is_index { &["", OCI_INDEX, DOCKER_LIST] } else { &["", OCI_MANIFEST, DOCKER_MANIFEST] };
        if !allowed.contains(&stated) {
            return Err(Error::invalid(format!(
                "the manifest has the media type `{stated}`, which does not describe an image"
            )));
        }
        if is_index {
            let index: Index = serde_json::from_slice(bytes).map_err(bad)?;
            if index.manifests.len() > INDEX_ENTRIES_MAX {
                return Err(Error::invalid(format!(
                    "the index lists {} images; the limit is {INDEX_ENTRIES_MAX}",
                    index.manifests.len()
                )));
            }
            Ok(Self::Index(index))
        } else {
            let manifest: Manifest = serde_json::from_slice(bytes).map_err(bad)?;
            manifest.check()?;
            Ok(Self::Manifest(manifest))
        }
    }
}

impl Manifest {
    fn check(&self) -> Result<()> {
        if self.layers.len() > LAYERS_MAX {
            return Err(Error::invalid(format!(
                "the image has {} layers; the limit is {LAYERS_MAX}",
                self.layers.len()
            )));
        }
        if self.config.size > CONFIG_BYTES_MAX {
            return Err(Error::invalid(format!(
                "the configuration of the image has {} bytes; the limit is {CONFIG_BYTES_MAX}",
                self.config.size
            )));
        }
        let total = self.layers.iter().try_fold(0u64, |total, layer| total.checked_add(layer.size));
        if total.is_none_or(|total| total > i64::MAX as u64) {
            return Err(Error::invalid(
                "the sizes of the image's layers add up to more than a disk can hold",
            ));
        }
        let image = self.config.media_type.is_empty()
            || matches!(
                self.config.media_type.as_str(),
                OCI_CONFIG | DOCKER_CONFIG | "application/octet-stream" | "application/json" | "text/html"
            );
        let unknown = self.layers.iter().find(|layer| !is_layer(&layer.media_type));
        if let (true, Some(layer)) = (image, unknown) {
            return Err(Error::invalid(format!(
                "layer {} has the media type `{}`: it is not a file system that this engine can unpack",
                layer.digest, layer.media_type
            )));
        }
        if !image {
            return Err(Error::invalid(format!(
                "the manifest describes something of the type `{}`, not an image that can run",
                self.config.media_type
            )));
        }
        Ok(())
    }

    /// The manifest's own media type; OCI's may leave it out.
    pub fn stated_media_type(&self) -> &str {
        if self.media_type.is_empty() { OCI_MANIFEST } else { &self.media_type }
    }
}

/// Whether a layer is a tar in a form that is known. What it is in truth is told by its first bytes.
fn is_layer(media_type: &str) -> bool {
    let tar = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
    let packed = ["tar", "tar+gzip", "tar.gzip", "tar+zstd", "tar.zstd"];
    matches!(media_type, "" | "application/octet-stream")
        || (tar.iter().any(|start| media_type.starts_with(start))
            && packed.iter().any(|end| media_type.ends_with(end)))
}

/// The media type of a layer that is packed so.
pub(crate) fn packed_layer_type(compression: Compression) -> String {
    let suffix = match compression {
        Compression::None | Compression::Bzip2 | Compression::Xz => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    format!("{OCI_LAYER}{suffix}")
}

/// The media type that a layer has in an OCI manifest.
pub(crate) fn oci_layer_type(media_type: &str) -> String {
    let packed = ["gzip", "zstd"].into_iter().find(|packed| media_type.ends_with(packed));
    packed.map_or_else(|| OCI_LAYER.to_owned(), |packed| format!("{OCI_LAYER}+{packed}"))
}

impl Index {
    /// The index's own media type; OCI's may leave it out.
    pub fn stated_media_type(&self) -> &str {
        if self.media_type.is_empty() { OCI_INDEX } else { &self.media_type }
    }

    /// The entries that run on `platform`, best first. Attestations (platform `unknown/unknown`) never do.
    pub fn choose(&self, platform: &Platform) -> Option<&Descriptor> {
        let fitting = self.manifests.iter().filter_map(|entry| {
            let offered = entry.platform.as_ref()?;
            Some((platform.fit(offered)?, entry))
        });
        // The first of equals wins, as in Docker; `max_by_key` would take the last.
        let best = fitting.fold(None::<(u32, &Descriptor)>, |best, (fit, entry)| match best {
            Some((most, _)) if most >= fit => best,
            _ => Some((fit, entry)),
        });
        // A list of one that says nothing about its platform leaves no choice.
        best.map(|(_, entry)| entry).or_else(|| match &self.manifests[..] {
            [only] if only.platform.is_none() => Some(only),
            _ => None,
        })
    }
}

/// Reads a configuration and checks that it describes `layers` layers (when that is known).
pub fn parse_config(bytes: &[u8], layers: Option<usize>) -> Result<ImageConfig> {
    let config: ImageConfig = serde_json::from_slice(bytes).map_err(|source| {
        Error::because(
            crate::Kind::Invalid,
            "the configuration of the image is not valid JSON of the expected form",
            source,
        )
    })?;
    let diff_ids = config.rootfs.diff_ids.len();
    if diff_ids > LAYERS_MAX {
        return Err(Error::invalid(format!("the image has {diff_ids} layers; the limit is {LAYERS_MAX}")));
    }
    if let Some(layers) = layers
        && layers != diff_ids
    {
        return Err(Error::invalid(format!(
            "the manifest of the image has {layers} layers, its configuration {diff_ids}"
        )));
    }
    Ok(config)
}

/// Fuzz entry: reads arbitrary bytes as every kind of document.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(Document::Index(index)) = Document::parse(bytes) {
        let _chosen = index.choose(&Platform::host());
    }
    let _config = parse_config(bytes, None);
    let _names = crate::load::parse_manifest_json(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn refused(text: &str) -> String {
        Document::parse(text.as_bytes()).expect_err(text).to_string()
    }

    #[test]
    fn the_right_platform_is_chosen_and_attestations_are_not() {
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[
            {{"digest":"{A}","size":1,"platform":{{"os":"unknown","architecture":"unknown"}}}},
            {{"digest":"{B}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}},
            {{"digest":"{A}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
        );
        let Ok(Document::Index(index)) = Document::parse(text.as_bytes()) else { panic!("an index") };
        let amd64 = "linux/amd64".parse().expect("a platform");
        assert_eq!(index.choose(&amd64).map(|entry| entry.digest.to_string()).as_deref(), Some(B));
        assert_eq!(index.choose(&"linux/s390x".parse().expect("a platform")), None);
        assert_eq!(
            index.choose(&"unknown/unknown".parse().expect("a platform")).map(|entry| entry.size),
            Some(1),
            "only when asked for by that name"
        );
    }

    #[test]
    fn documents_that_are_not_images_are_refused_with_a_sentence() {
        assert!(refused("{").contains("not valid JSON"));
        assert!(refused(r#"{"schemaVersion":1,"fsLayers":[]}"#).contains("schema 1"));
        assert!(refused("{}").contains("version 2"));
        assert!(refused(r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#).contains("both"));
        assert!(
            refused(r#"{"schemaVersion":2,"mediaType":"text/plain","config":{}}"#).contains("`text/plain`")
        );
        assert!(refused(&format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":"{A}","size":1}},"layers":[]}}"#)).contains("not an image"));
        let many = vec![format!(r#"{{"digest":"{A}","size":1}}"#); LAYERS_MAX + 1].join(",");
        assert!(
            refused(&format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"{A}","size":1}},"layers":[{many}]}}"#
            ))
            .contains("401 layers")
        );
        let sizes = vec![format!(r#"{{"digest":"{A}","size":{}}}"#, u64::MAX); 2].join(",");
        assert!(
            refused(&format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"{A}","size":1}},"layers":[{sizes}]}}"#
            ))
            .contains("add up")
        );
        assert!(
            refused(&format!(r#"{{"schemaVersion":2,"config":{{"digest":"{A}","size":-1}},"layers":[]}}"#))
                .contains("not valid JSON")
        );
        assert!(
            refused(
                r#"{"schemaVersion":2,"config":{"digest":"sha256:../../etc/passwd","size":1},"layers":[]}"#
            )
            .contains("not valid JSON")
        );
    }

    #[test]
    fn a_configuration_must_match_its_manifest() {
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{A}"]}}}}"#
        );
        assert!(parse_config(text.as_bytes(), Some(1)).is_ok());
        let error = parse_config(text.as_bytes(), Some(2)).expect_err("two layers");
        assert_eq!(error.to_string(), "the manifest of the image has 2 layers, its configuration 1");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            fuzz(&bytes);
        }
    }
}
