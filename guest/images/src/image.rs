//! An image as callers see it: names, configuration, layers; and what pull, load and remove answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ChainId, Digest, Reference};

/// The id of an image: the digest of its configuration, as in Docker.
pub type ImageId = Digest;

/// An image in the index.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of the configuration.
    pub id: ImageId,
    /// The digest of the manifest.
    pub manifest_digest: Digest,
    /// The manifest's media type.
    pub manifest_media_type: String,
    /// Bytes of the manifest.
    pub manifest_size: u64,
    /// The configuration, decoded. [`Image::config_json`] has every field.
    pub config: ImageConfig,
    /// The configuration as it is stored: its digest is the id.
    pub config_json: String,
    /// Names with a tag in familiar form (`debian:latest`), sorted.
    pub repo_tags: Vec<String>,
    /// Names with a digest in familiar form (`debian@sha256:…`), sorted.
    pub repo_digests: Vec<String>,
    /// Bytes of the unpacked layers.
    pub size: u64,
    /// The layers, bottom first.
    pub layers: Vec<ImageLayer>,
    /// The image it was committed from, on this engine.
    pub parent: Option<ImageId>,
    /// When the image was pulled, loaded or last tagged, in seconds since 1970.
    pub last_tagged: i64,
}

impl Image {
    /// The chain to [prepare](crate::Snapshotter::prepare) a container on; `None` for an image without layers.
    pub fn chain(&self) -> Option<ChainId> {
        self.layers.last().map(|layer| layer.chain_id)
    }
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// The blob's digest. The blob itself may be absent when the unpacked layer was here first.
    pub digest: Digest,
    /// The blob's media type.
    pub media_type: String,
    /// The blob's size in bytes.
    pub blob_size: u64,
    /// The digest of the uncompressed tar.
    pub diff_id: Digest,
    /// The snapshot of this layer and all below.
    pub chain_id: ChainId,
    /// Bytes of the files in this layer, unpacked.
    pub size: u64,
}

/// The configuration of an image: the OCI specification's fields and Docker's.
///
/// `null` counts as absent everywhere, because every builder writes it somewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// RFC 3339 time.
    #[serde(deserialize_with = "nullable")]
    pub created: String,
    /// Who made it.
    #[serde(deserialize_with = "nullable")]
    pub author: String,
    /// A comment.
    #[serde(deserialize_with = "nullable")]
    pub comment: String,
    /// Docker's version that built it.
    #[serde(deserialize_with = "nullable")]
    pub docker_version: String,
    /// `amd64`, `arm64`, …
    #[serde(deserialize_with = "nullable")]
    pub architecture: String,
    /// `v8`, …
    #[serde(deserialize_with = "nullable")]
    pub variant: String,
    /// `linux`.
    #[serde(deserialize_with = "nullable")]
    pub os: String,
    /// A version of the operating system (Windows).
    #[serde(rename = "os.version", deserialize_with = "nullable")]
    pub os_version: String,
    /// How to run it.
    #[serde(deserialize_with = "nullable")]
    pub config: Config,
    /// The layers.
    #[serde(deserialize_with = "nullable")]
    pub rootfs: Rootfs,
    /// How it was built, oldest first.
    #[serde(deserialize_with = "nullable")]
    pub history: Vec<History>,
}

/// How to run an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Config {
    /// `uid`, `user`, `uid:gid`, …
    #[serde(deserialize_with = "nullable")]
    pub user: String,
    /// `80/tcp` and so on; the values are empty objects.
    #[serde(deserialize_with = "nullable")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// `NAME=value`.
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// The start of the command line. `None` and empty differ in Docker's inspect.
    pub entrypoint: Option<Vec<String>>,
    /// The rest of the command line.
    pub cmd: Option<Vec<String>>,
    /// Whether the arguments are already escaped (Windows).
    #[serde(deserialize_with = "nullable")]
    pub args_escaped: bool,
    /// Paths that get a volume; the values are empty objects.
    #[serde(deserialize_with = "nullable")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// Where the process starts.
    #[serde(deserialize_with = "nullable")]
    pub working_dir: String,
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks it to stop.
    #[serde(deserialize_with = "nullable")]
    pub stop_signal: String,
    /// Seconds before it is killed.
    pub stop_timeout: Option<i64>,
    /// Instructions for images built on this one.
    #[serde(deserialize_with = "nullable")]
    pub on_build: Vec<String>,
    /// The shell of the shell forms.
    #[serde(deserialize_with = "nullable")]
    pub shell: Vec<String>,
    /// How to tell that it is healthy.
    pub healthcheck: Option<Healthcheck>,
}

/// How to tell that a container is healthy. Durations in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Healthcheck {
    /// `["CMD", …]`, `["CMD-SHELL", …]` or `["NONE"]`.
    #[serde(deserialize_with = "nullable")]
    pub test: Vec<String>,
    /// Between two checks.
    #[serde(deserialize_with = "nullable")]
    pub interval: i64,
    /// For one check.
    #[serde(deserialize_with = "nullable")]
    pub timeout: i64,
    /// Failures before it is unhealthy.
    #[serde(deserialize_with = "nullable")]
    pub retries: i64,
    /// Before failures count.
    #[serde(deserialize_with = "nullable")]
    pub start_period: i64,
    /// Between two checks while starting.
    #[serde(deserialize_with = "nullable")]
    pub start_interval: i64,
}

/// The layers in the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rootfs {
    /// `layers`.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// Digests of the uncompressed tars, bottom first.
    #[serde(deserialize_with = "nullable")]
    pub diff_ids: Vec<Digest>,
}

/// One step of the build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// RFC 3339 time.
    #[serde(deserialize_with = "nullable")]
    pub created: String,
    /// The command.
    #[serde(deserialize_with = "nullable")]
    pub created_by: String,
    /// Who.
    #[serde(deserialize_with = "nullable")]
    pub author: String,
    /// A comment.
    #[serde(deserialize_with = "nullable")]
    pub comment: String,
    /// The step made no layer.
    #[serde(deserialize_with = "nullable")]
    pub empty_layer: bool,
}

/// A configuration as it is stored: members that say nothing are left out, as other tools do.
pub(crate) fn encode_config(config: &ImageConfig) -> crate::Result<Vec<u8>> {
    fn says_something(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::Null | serde_json::Value::Bool(false) => false,
            serde_json::Value::String(text) => !text.is_empty(),
            serde_json::Value::Array(items) => !items.is_empty(),
            serde_json::Value::Object(members) => !members.is_empty(),
            serde_json::Value::Number(number) => number.as_i64() != Some(0),
            serde_json::Value::Bool(true) => true,
        }
    }
    let failed =
        |source| crate::Error::because(crate::Kind::Internal, "a configuration could not be encoded", source);
    let mut value = serde_json::to_value(config).map_err(failed)?;
    // Not deeper: a label's value may well be empty.
    let tidy = |value: &mut serde_json::Value| {
        if let Some(members) = value.as_object_mut() {
            members.retain(|_, member| says_something(member));
        }
    };
    if let Some(check) = value.pointer_mut("/config/Healthcheck") {
        tidy(check);
    }
    if let Some(config) = value.get_mut("config") {
        tidy(config);
    }
    for step in value.get_mut("history").and_then(serde_json::Value::as_array_mut).into_iter().flatten() {
        tidy(step);
    }
    if let Some(members) = value.as_object_mut() {
        members.retain(|name, member| name == "config" || name == "rootfs" || says_something(member));
    }
    serde_json::to_vec(&value).map_err(failed)
}

/// Reads `null` as the default.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// What a pull brought.
#[derive(Debug, Clone)]
pub struct PulledImage {
    /// The image.
    pub image: Image,
    /// The name as it was pulled, with its default tag.
    pub reference: Reference,
    /// The digest of what the name stood for (the index, where there is one).
    pub digest: Digest,
    /// Nothing was new.
    pub up_to_date: bool,
}

/// An image that came out of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedImage {
    /// Its id.
    pub id: ImageId,
    /// The names it got, in familiar form. Empty when the archive gave none.
    pub names: Vec<String>,
}

/// A container that uses an image; see [`Images::remove`](crate::Images::remove).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InUse {
    /// The container's full id.
    pub container: String,
    /// Whether it runs.
    pub running: bool,
}

/// One thing a remove did, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deleted {
    /// A name is gone.
    Untagged(Reference),
    /// An image is gone.
    Image(ImageId),
    /// A layer is gone, because the image before it in the list was the last that stood on it.
    Layer(ChainId),
}

/// How to remove an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    /// Also when it has several names, or stopped containers use it.
    pub force: bool,
    /// Its parents go along as long as nothing else needs them.
    pub parents: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_counts_as_absent() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Env":null,"Cmd":null,"Entrypoint":["/a"],"Labels":null,"Volumes":null},"history":null,"rootfs":{"type":"layers","diff_ids":null}}"#;
        let config: ImageConfig = serde_json::from_str(text).expect("a configuration");
        assert_eq!(config.config.entrypoint.as_deref(), Some(&["/a".to_owned()][..]));
        assert_eq!(config.config.cmd, None);
        assert!(config.rootfs.diff_ids.is_empty());
    }
}
