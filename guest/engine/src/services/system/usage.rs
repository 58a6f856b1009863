//! `/system/df`: what images, containers and volumes occupy.

use guest_api::usage::DiskUsage;
use guest_api::{ContainerSummary, ErrorKind};

use super::System;
use crate::failure::Failure;
use crate::services::containers::ListQuery;
use crate::services::images::{ImagesQuery, Shared};

/// What to count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageQuery {
    pub containers: bool,
    pub images: bool,
    pub volumes: bool,
    pub build_cache: bool,
}

impl UsageQuery {
    pub fn everything() -> Self {
        Self { containers: true, images: true, volumes: true, build_cache: true }
    }
}

impl System {
    pub async fn disk_usage(&self, wanted: UsageQuery) -> Result<DiskUsage, Failure> {
        let mut usage = DiskUsage::default();
        if wanted.images {
            let query = ImagesQuery { shared_size: true, ..ImagesQuery::default() };
            let using =
                |id: &str| self.containers.using_image(id).into_iter().map(|user| user.container).collect();
            usage.images = Some(self.images.list(&query, using).await?);
            let images = self.images.store().list().await;
            let images = images.map_err(|error| crate::services::images::failure(&error))?;
            usage.layers_size = i64::try_from(Shared::of(&images).total()).unwrap_or(i64::MAX);
        }
        if wanted.containers {
            usage.containers = Some(self.containers_with_sizes().await?);
        }
        if wanted.volumes {
            usage.volumes = Some(self.volumes.usage().await);
        }
        // Nothing is kept of a build yet.
        usage.build_cache = wanted.build_cache.then(Vec::new);
        Ok(usage)
    }

    async fn containers_with_sizes(&self) -> Result<Vec<ContainerSummary>, Failure> {
        let query = ListQuery { all: true, ..ListQuery::default() };
        let mut lines = Vec::new();
        for mut line in self.containers.list(&query, |_, _| false)? {
            let written = match self.containers.written_bytes(&line.id).await {
                // Removed since it was listed.
                Err(failure) if failure.kind == ErrorKind::NotFound => continue,
                counted => counted?,
            };
            line.size_rw = Some(written);
            line.size_root_fs = Some(written + self.images.bytes(&line.image_id).await?);
            lines.push(line);
        }
        Ok(lines)
    }
}
