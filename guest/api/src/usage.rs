//! `/system/df`, and what a prune answers.

use serde::{Deserialize, Serialize};

use crate::ContainerSummary;
use crate::image::{ImageDeleted, ImageSummary};
use crate::volume::Volume;

/// Answer of `GET /system/df`. What was not asked for is JSON null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DiskUsage {
    /// Bytes of all layers of images, each counted once.
    pub layers_size: i64,
    /// The images, with what they share.
    pub images: Option<Vec<ImageSummary>>,
    /// All containers, with their sizes.
    pub containers: Option<Vec<ContainerSummary>>,
    /// The volumes, with their sizes.
    pub volumes: Option<Vec<Volume>>,
    /// Records of builds.
    pub build_cache: Option<Vec<serde_json::Value>>,
}

/// Answer of `POST /images/prune`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImagesPruned {
    /// What went (JSON null when nothing did).
    pub images_deleted: Option<Vec<ImageDeleted>>,
    /// Bytes of the layers that went.
    pub space_reclaimed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_asked_for_is_null() {
        let json =
            serde_json::to_value(DiskUsage { images: Some(Vec::new()), ..DiskUsage::default() }).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"LayersSize": 0, "Images": [], "Containers": null, "Volumes": null, "BuildCache": null})
        );
        let json = serde_json::to_string(&ImagesPruned::default()).unwrap();
        assert_eq!(json, r#"{"ImagesDeleted":null,"SpaceReclaimed":0}"#);
    }
}
