//! Volumes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Label of a volume that was made without a name.
pub const ANONYMOUS_LABEL: &str = "com.docker.volume.anonymous";

/// Body of `POST /volumes/create`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumeCreate {
    /// Its name; empty makes one up.
    pub name: String,
    /// `local`, which is the default too.
    pub driver: String,
    /// Options of the driver.
    pub driver_opts: Option<BTreeMap<String, String>>,
    /// The user's labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// A volume of a swarm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_volume_spec: Option<serde_json::Value>,
}

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
    /// What it occupies; only in `GET /system/df`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage_data: Option<UsageData>,
}

/// What a volume occupies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UsageData {
    /// Containers that have it.
    pub ref_count: i64,
    /// Bytes; -1 when not known.
    pub size: i64,
}

/// Answer of `POST /volumes/prune`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumesPruned {
    /// Names.
    pub volumes_deleted: Vec<String>,
    /// Bytes.
    pub space_reclaimed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_present_or_absent_as_in_dockerd() {
        let json = serde_json::to_value(Volume::default()).unwrap();
        assert!(json["Labels"].is_null() && json["Options"].is_null());
        assert!(json.get("UsageData").is_none() && json.get("CreatedAt").is_none());
        let list = serde_json::to_string(&VolumeList::default()).unwrap();
        assert_eq!(list, r#"{"Volumes":[],"Warnings":null}"#);
    }
}
