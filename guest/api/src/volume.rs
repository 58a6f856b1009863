//! Volumes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Answer of `GET /volumes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumeList {
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// Things that went wrong while listing (JSON null when nothing did).
    pub warnings: Option<Vec<String>>,
}

/// A volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Volume {
    /// RFC 3339.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub created_at: String,
    /// `local`.
    pub driver: String,
    /// The user's labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// Where the data is, in the engine's file system.
    pub mountpoint: String,
    /// Its name.
    pub name: String,
    /// Driver options.
    pub options: Option<BTreeMap<String, String>>,
    /// `local`.
    pub scope: String,
}
