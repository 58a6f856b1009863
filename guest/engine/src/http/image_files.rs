//! Images that come and go as archives: `/commit`, `/images/create?fromSrc=`, `/images/load`, `/images/get`.

use std::sync::Arc;

use guest_api::image::ProgressLine;
use guest_api::{ApiVersion, ContainerConfig};
use guest_images::Platform;
use tokio::sync::mpsc;

use super::Services;
use super::ahead::ReadAhead;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;
use crate::services::containers::CommitQuery;
use crate::services::images::{ImportQuery, LoadQuery, new_name};

/// Before this version an archive was of whatever platform.
const PLATFORM_SINCE: ApiVersion = ApiVersion::new(1, 48);

/// Answer of `POST /commit`.
#[derive(serde::Serialize)]
struct Committed {
    #[serde(rename = "Id")]
    id: String,
}

pub async fn commit(services: &Services, call: Call) -> Answer {
    let text = |name: &str| call.query.text(name).to_owned();
    let container = text("container");
    // Only saying no is no.
    let pause = call.query.text("pause").is_empty() || call.query.flag("pause");
    let mut query = CommitQuery {
        name: new_name(call.query.text("repo"), call.query.text("tag"))?,
        author: text("author"),
        comment: text("comment"),
        pause,
        changes: call.query.texts("changes").to_vec(),
        config: None,
    };
    // `null`, and nothing, mean the container's own.
    query.config = Some(call.json().await?).filter(|config| *config != ContainerConfig::default());
    let id = services.containers.commit(&container, query).await?;
    respond::json(201, &Committed { id })
}

pub async fn import(services: &Services, call: Call) -> Answer {
    let text = |name: &str| call.query.text(name).to_owned();
    let query = ImportQuery {
        source: text("fromSrc"),
        repository: text("repo"),
        tag: text("tag"),
        message: text("message"),
        changes: call.query.texts("changes").to_vec(),
        platform: text("platform"),
    };
    let gone = call.gone();
    if query.source != "-" {
        let (lines, work) = services.images.import_from(query).await?;
        services.tasks.spawn(work);
        return Ok(respond::json_lines(lines, gone));
    }
    let id = services.images.import(query, ReadAhead::new(call.request.into_body())).await?;
    let (line, lines) = mpsc::channel(1);
    let told = ProgressLine { status: Some(id), ..ProgressLine::default() };
    line.send(told).await.map_err(|_| Failure::broken("the answer cannot be given"))?;
    Ok(respond::json_lines(lines, gone))
}

fn platform(call: &Call) -> Result<Option<Platform>, Failure> {
    let given = call.query.texts("platform");
    if call.version < PLATFORM_SINCE || given.is_empty() {
        return Ok(None);
    }
    if given.len() > 1 {
        return Err(Failure::invalid(
            "multiple platform parameters are not supported in this API version; use API version 1.52 or later",
        ));
    }
    crate::services::images::platform(&given[0])
}

pub async fn save(services: &Services, call: &Call, name: Option<&str>) -> Answer {
    let names = name.map_or_else(|| call.query.texts("names").to_vec(), |name| vec![name.to_owned()]);
    let pieces = services.images.save(&names, platform(call)?.as_ref(), &services.tasks).await?;
    let mut response = respond::with_status(200, respond::stream(pieces, call.gone()));
    respond::content_type(&mut response, "application/x-tar");
    Ok(response)
}

pub fn load(services: &Arc<Services>, call: Call) -> Answer {
    let quiet = call.query.texts("quiet").is_empty() || call.query.flag("quiet");
    let query = LoadQuery { quiet, platform: platform(&call)? };
    let gone = call.gone();
    let (lines, work) = services.images.load(ReadAhead::new(call.request.into_body()), query);
    services.tasks.spawn(work);
    Ok(respond::json_lines(lines, gone))
}
