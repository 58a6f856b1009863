//! What an image consists of: descriptors and manifests, in the OCI specification's words.

use serde::{Deserialize, Serialize};

/// A reference to a blob.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// `sha256:…`.
    pub digest: String,
    /// Bytes.
    pub size: i64,
    /// What it is for, where that is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<OciPlatform>,
}

/// The machine that an image is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OciPlatform {
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// A version of the operating system.
    #[serde(rename = "os.version", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// `v8`, …
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// What a manifest describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ManifestKind {
    /// An image that can be run.
    Image,
    /// A statement about an image.
    Attestation,
    /// Something else.
    #[default]
    Unknown,
}

/// One manifest of an image, in `GET /images/json?manifests=1`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ManifestSummary {
    /// The manifest's digest.
    #[serde(rename = "ID")]
    pub id: String,
    /// The manifest itself.
    pub descriptor: Descriptor,
    /// Whether everything it names is here.
    pub available: bool,
    /// What it occupies.
    pub size: ManifestSize,
    /// What it describes.
    pub kind: ManifestKind,
    /// More, when it is an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_data: Option<ImageProperties>,
}

/// Bytes of a manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ManifestSize {
    /// Of its blobs.
    pub content: i64,
    /// Of its blobs and its unpacked layers.
    pub total: i64,
}

/// What is told of a manifest that is an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageProperties {
    /// The machine it is for.
    pub platform: OciPlatform,
    /// What it occupies.
    pub size: UnpackedSize,
    /// Ids of the containers made from it.
    pub containers: Vec<String>,
}

/// Bytes of unpacked layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UnpackedSize {
    /// All of them.
    pub unpacked: i64,
}
