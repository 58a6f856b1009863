//! `/containers/{id}/top`, `/containers/{id}/stats` and `/containers/prune`.

use guest_api::ApiVersion;

use super::Services;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;
use crate::services::containers::StatsMode;

/// Before this version there was no `one-shot`.
const ONE_SHOT_SINCE: ApiVersion = ApiVersion::new(1, 41);

pub async fn top(services: &Services, call: &Call, id: &str) -> Answer {
    respond::json(200, &services.containers.top(id, call.query.text("ps_args")).await?)
}

pub async fn stats(services: &Services, call: &Call, id: &str) -> Answer {
    let stream = call.query.text("stream").is_empty() || call.query.flag("stream");
    let one_shot = call.version >= ONE_SHOT_SINCE && call.query.flag("one-shot");
    let mode = match (stream, one_shot) {
        (true, true) => return Err(Failure::invalid("cannot have stream=true and one-shot=true")),
        (true, false) => StatsMode::Stream,
        (false, true) => StatsMode::OneShot,
        (false, false) => StatsMode::Once,
    };
    let samples = services.containers.stats(id, mode).await?;
    Ok(respond::json_lines(samples, call.gone()))
}

pub async fn prune(services: &Services, call: &Call) -> Answer {
    respond::json(200, &services.containers.prune(&call.query.filters()?).await?)
}
