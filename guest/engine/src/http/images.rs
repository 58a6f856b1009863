//! `/images/…`.

use std::sync::Arc;

use guest_api::ApiVersion;
use guest_images::RemoveOptions;

use super::image_files;
use super::request::Call;
use super::respond::{self, Answer};
use super::{Services, registry};
use crate::failure::Failure;
use crate::services::images::ImagesQuery;

/// Until this version a pattern for names could be given apart from the filters.
const FILTER_UNTIL: ApiVersion = ApiVersion::new(1, 41);
/// Since this version what images share is told on request.
const SHARED_SIZE_SINCE: ApiVersion = ApiVersion::new(1, 42);
/// Until this version an image without names had the names `<none>`.
const NONE_UNTIL: ApiVersion = ApiVersion::new(1, 43);
/// Since this version an image's manifests are told on request.
const MANIFESTS_SINCE: ApiVersion = ApiVersion::new(1, 47);
/// Since this version an image's containers are counted.
const CONTAINERS_SINCE: ApiVersion = ApiVersion::new(1, 51);
/// Until this version sizes were told twice.
pub(super) const VIRTUAL_SIZE_UNTIL: ApiVersion = ApiVersion::new(1, 44);

pub async fn list(services: &Services, call: &Call) -> Answer {
    let mut filters = call.query.filters()?;
    let pattern = call.query.text("filter");
    if call.version < FILTER_UNTIL && !pattern.is_empty() {
        filters.add("reference", pattern);
    }
    let query = ImagesQuery {
        all: call.query.flag("all"),
        filters,
        shared_size: call.version >= SHARED_SIZE_SINCE && call.query.flag("shared-size"),
        manifests: call.version >= MANIFESTS_SINCE && call.query.flag("manifests"),
    };
    let mut images = services.images.list(&query, using(services)).await?;
    for image in &mut images {
        if call.version < NONE_UNTIL && image.repo_tags.is_empty() && image.repo_digests.is_empty() {
            image.repo_tags.push("<none>:<none>".to_owned());
            image.repo_digests.push("<none>@<none>".to_owned());
        }
        if call.version < CONTAINERS_SINCE {
            image.containers = -1;
        }
        if call.version < VIRTUAL_SIZE_UNTIL {
            image.virtual_size = Some(image.size);
        }
    }
    respond::json(200, &images)
}

/// The containers made from an image.
pub(super) fn using(services: &Services) -> impl Fn(&str) -> Vec<String> + Send + Sync + use<> {
    let containers = services.containers.clone();
    move |id| containers.using_image(id).into_iter().map(|user| user.container).collect()
}

pub async fn inspect(services: &Services, call: &Call, name: &str) -> Answer {
    let mut image = services.images.inspect(name).await?;
    if call.version < VIRTUAL_SIZE_UNTIL {
        image.virtual_size = Some(image.size);
    }
    respond::json(200, &image)
}

pub async fn history(services: &Services, name: &str) -> Answer {
    respond::json(200, &services.images.history(name).await?)
}

pub async fn tag(services: &Services, call: &Call, name: &str) -> Answer {
    services.images.tag(name, call.query.text("repo"), call.query.text("tag")).await?;
    Ok(respond::empty(201))
}

pub async fn remove(services: &Services, call: &Call, name: &str) -> Answer {
    let containers = services.containers.clone();
    let in_use = move |id: &str| containers.using_image(id);
    if name.trim().is_empty() {
        return Err(Failure::invalid("image name cannot be blank"));
    }
    let options = RemoveOptions { force: call.query.flag("force"), parents: !call.query.flag("noprune") };
    respond::json(200, &services.images.remove(name, options, in_use).await?)
}

pub async fn prune(services: &Services, call: &Call) -> Answer {
    let containers = services.containers.clone();
    let in_use = move |id: &str| containers.using_image(id);
    respond::json(200, &services.images.prune(&call.query.filters()?, in_use).await?)
}

pub async fn create(services: &Arc<Services>, call: Call) -> Answer {
    if call.query.text("fromImage").is_empty() {
        return image_files::import(services, call).await;
    }
    registry::pull(services, &call).await
}
