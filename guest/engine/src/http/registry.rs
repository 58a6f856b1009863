//! What is asked of registries: pull, push, `/auth`, `/images/search`, `/distribution/…`.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use guest_api::ApiVersion;
use guest_api::image::AuthConfig;
use guest_api::registry::decode_auth;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Services;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;
use crate::services::images::{Line, PullQuery, PushQuery, SearchQuery};

/// Since this version a pull's platform is heard.
const PULL_PLATFORM_SINCE: ApiVersion = ApiVersion::new(1, 32);
/// Since this version a push's platform is; before, clients sent one that meant nothing.
const PUSH_PLATFORM_SINCE: ApiVersion = ApiVersion::new(1, 46);

pub async fn pull(services: &Arc<Services>, call: &Call) -> Answer {
    let platform = if call.version >= PULL_PLATFORM_SINCE { call.query.text("platform") } else { "" };
    let query = PullQuery {
        image: call.query.text("fromImage").to_owned(),
        tag: call.query.text("tag").to_owned(),
        platform: platform.to_owned(),
    };
    let (lines, work) = services.images.pull(&query, credentials(call))?;
    services.tasks.spawn(work);
    progress(lines, call).await
}

pub async fn push(services: &Arc<Services>, call: &Call, name: &str) -> Answer {
    let platform = if call.version >= PUSH_PLATFORM_SINCE { call.query.text("platform") } else { "" };
    let query = PushQuery {
        image: name.to_owned(),
        tag: call.query.text("tag").to_owned(),
        platform: platform.to_owned(),
    };
    let (lines, work) = services.images.push(&query, credentials(call))?;
    services.tasks.spawn(work);
    progress(lines, call).await
}

pub async fn auth(services: &Services, call: Call) -> Answer {
    let auth: AuthConfig = call.json().await?;
    respond::json(200, &services.images.login(auth).await?)
}

pub async fn search(services: &Services, call: &Call) -> Answer {
    let query = SearchQuery {
        term: call.query.text("term").to_owned(),
        limit: call.query.number("limit")?,
        filters: call.query.filters()?,
    };
    respond::json(200, &services.images.search(&query, credentials(call)).await?)
}

pub async fn inspect(services: &Services, call: &Call, name: &str) -> Answer {
    respond::json(200, &services.images.inspect_remote(name, credentials(call)).await?)
}

fn credentials(call: &Call) -> AuthConfig {
    call.headers.get("x-registry-auth").map(|value| decode_auth(value.as_bytes())).unwrap_or_default()
}

/// Streams lines as they come. A failure before the first is the whole answer, with its status; later it is the last line.
async fn progress(mut lines: mpsc::Receiver<Line>, call: &Call) -> Answer {
    let first = match lines.recv().await {
        Some(Err(failure)) => return Err(failure),
        first => first,
    };
    let lines = futures_util::stream::iter(first).chain(ReceiverStream::new(lines));
    let frames = lines.map(|line| {
        let line =
            line.unwrap_or_else(|failure: Failure| crate::services::images::error_line(failure.message));
        let mut bytes = serde_json::to_vec(&line).map_err(std::io::Error::other)?;
        bytes.extend_from_slice(b"\r\n");
        Ok(Frame::data(Bytes::from(bytes)))
    });
    let mut response =
        hyper::Response::new(BodyExt::boxed_unsync(StreamBody::new(frames.take_until(call.gone()))));
    respond::content_type(&mut response, "application/json");
    Ok(response)
}
