//! Mounts in the long form (`HostConfig.Mounts`, the CLI's `--mount`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One mount a client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Mount {
    /// `bind`, `volume`, `tmpfs` or `image`.
    #[serde(rename = "Type", skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// A path, the name of a volume or of an image; empty for an anonymous volume.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Where it is to be in the container.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// Not writable.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub read_only: bool,
    /// `consistent`, `cached`, `delegated`: hints without a meaning here.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub consistency: String,
    /// For `bind`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind_options: Option<BindOptions>,
    /// For `volume`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_options: Option<VolumeOptions>,
    /// For `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_options: Option<ImageOptions>,
    /// For `tmpfs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tmpfs_options: Option<TmpfsOptions>,
    /// For `cluster`, which needs a swarm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_options: Option<crate::EmptyObject>,
}

/// Options of a bind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct BindOptions {
    /// `rprivate`, `rshared`, …; empty means `rprivate`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub propagation: String,
    /// Without what is mounted below the source.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub non_recursive: bool,
    /// Make the source if it is missing.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub create_mountpoint: bool,
    /// Read-only without what is mounted below.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub read_only_non_recursive: bool,
    /// Fail where read-only cannot include what is mounted below.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub read_only_force_recursive: bool,
}

/// Options of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumeOptions {
    /// Do not fill a new volume from the image.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub no_copy: bool,
    /// Labels of a new volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// A path in the volume that is mounted instead of its root.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subpath: String,
    /// How to make a new volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_config: Option<DriverConfig>,
}

/// How to make a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DriverConfig {
    /// `local`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its options.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<BTreeMap<String, String>>,
}

/// Options of an image's mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageOptions {
    /// A path in the image that is mounted instead of its root.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subpath: String,
}

/// Options of a tmpfs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TmpfsOptions {
    /// Most bytes it may hold; 0 is the kernel's default.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub size_bytes: i64,
    /// Permissions of its root; 0 is the default.
    #[serde(skip_serializing_if = "is_no_mode")]
    pub mode: u32,
    /// `["noexec"]`, `["exec"]`, …
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<Vec<String>>,
}

fn is_no_mode(mode: &u32) -> bool {
    *mode == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_echoed_as_it_was_given() {
        let given = r#"{"Type":"volume","Source":"data","Target":"/data","VolumeOptions":{"NoCopy":true,"Labels":{"a":"b"},"Subpath":"x","DriverConfig":{"Name":"local","Options":{"type":"tmpfs"}}}}"#;
        let mount: Mount = crate::decode(given.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&mount).unwrap(), given);
        assert_eq!(serde_json::to_string(&Mount::default()).unwrap(), "{}");
    }
}
