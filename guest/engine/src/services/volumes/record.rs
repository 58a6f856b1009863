//! What is stored about a volume, and how it is shown.

use std::collections::BTreeMap;
use std::path::Path;

use guest_api::volume::Volume;
use guest_volumes::{DriverOptions, OptionError};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The only driver.
pub const DRIVER: &str = "local";

/// A volume as stored, under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    pub name: String,
    pub created: Timestamp,
    #[serde(default)]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub options: Option<BTreeMap<String, String>>,
    /// The container it was made for without a name. If that has gone and the volume is still here, an engine was killed
    /// between the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

impl VolumeRecord {
    /// What is mounted at its data folder while it is in use.
    pub fn driver_options(&self) -> Result<Option<DriverOptions>, OptionError> {
        self.options.as_ref().map_or(Ok(None), DriverOptions::parse)
    }

    /// Whether it has options at all: then what it holds is not ours to count or to prune.
    pub fn has_options(&self) -> bool {
        self.options.as_ref().is_some_and(|options| !options.is_empty())
    }

    /// As dockerd shows it.
    pub fn shown(&self, mountpoint: &Path) -> Volume {
        Volume {
            created_at: format!("{:.0}", self.created),
            driver: DRIVER.to_owned(),
            labels: self.labels.clone(),
            mountpoint: mountpoint.display().to_string(),
            name: self.name.clone(),
            options: self.options.clone(),
            scope: "local".to_owned(),
            usage_data: None,
        }
    }
}
