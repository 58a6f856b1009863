//! The system service: facts about this engine and the machine it runs on.

use std::sync::Arc;

use guest_api::system::{Component, Platform, Version};
use guest_api::version::{NEWEST, OLDEST};

use crate::config::Settings;
use crate::services::containers::Containers;
use crate::services::events::Events;
use crate::services::images::ImagesService;
use crate::services::volumes::Volumes;

/// The system service.
pub struct System {
    pub settings: Arc<Settings>,
    /// Stable for a data root.
    pub engine_id: String,
    pub containers: Arc<Containers>,
    pub images: ImagesService,
    pub volumes: Arc<Volumes>,
    pub events: Events,
}

impl System {
    pub fn version(&self) -> Version {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let details = [
            ("ApiVersion", NEWEST.to_string()),
            ("Arch", go_architecture().to_owned()),
            ("Experimental", self.settings.experimental.to_string()),
            ("KernelVersion", kernel.clone()),
            ("MinAPIVersion", OLDEST.to_string()),
            ("Os", "linux".to_owned()),
        ];
        Version {
            platform: Platform { name: "engine".to_owned() },
            components: vec![Component {
                name: "Engine".to_owned(),
                version: version.clone(),
                details: details.map(|(key, value)| (key.to_owned(), value)).into(),
            }],
            version,
            api_version: NEWEST.to_string(),
            min_api_version: OLDEST.to_string(),
            os: "linux".to_owned(),
            arch: go_architecture().to_owned(),
            kernel_version: kernel,
            experimental: self.settings.experimental,
            ..Version::default()
        }
    }
}

/// Go's name of this machine's architecture.
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
