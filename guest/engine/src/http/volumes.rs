//! `/volumes/…`.

use guest_api::{ApiVersion, ErrorKind};

use super::Services;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;

/// Before this version a prune takes named volumes too.
const ANONYMOUS_ONLY_SINCE: ApiVersion = ApiVersion::new(1, 42);

pub fn list(services: &Services, call: &Call) -> Answer {
    let filters = call.query.filters();
    let filters = filters.map_err(|failure| {
        Failure::new(failure.kind, format!("error reading volume filters: {}", failure.message))
    })?;
    respond::json(200, &services.volumes.list(&filters)?)
}

pub async fn create(services: &Services, call: Call) -> Answer {
    respond::json(201, &services.volumes.create(call.json().await?).await?)
}

pub fn inspect(services: &Services, name: &str) -> Answer {
    respond::json(200, &services.volumes.inspect(name)?)
}

pub async fn remove(services: &Services, call: &Call, name: &str) -> Answer {
    services.volumes.remove(name, call.query.flag("force")).await?;
    Ok(respond::empty(204))
}

pub async fn prune(services: &Services, call: &Call) -> Answer {
    let all = call.version < ANONYMOUS_ONLY_SINCE;
    respond::json(200, &services.volumes.prune(&call.query.filters()?, all).await?)
}

/// Only volumes of a swarm can be changed.
pub fn update() -> Answer {
    Err(Failure::new(
        ErrorKind::Unavailable,
        "volume update only valid for cluster volumes, but swarm is unavailable",
    ))
}
