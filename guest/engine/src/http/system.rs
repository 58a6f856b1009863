//! `/_ping`, `/version`, `/info`, `/events`, `/auth`.

use std::sync::Arc;

use guest_api::{ApiVersion, Event};
use hyper::header::HeaderValue;
use tokio::sync::{broadcast, mpsc};

use super::Services;
use super::images::VIRTUAL_SIZE_UNTIL;
use super::request::Call;
use super::respond::{self, Answer, Response};
use crate::failure::Failure;
use crate::services::events::EventFilter;
use crate::services::system::UsageQuery;

/// Events that may wait for a slow client; the log drops what lies further back.
const EVENTS_WAITING: usize = 64;

pub fn ping() -> Response {
    let mut response = respond::text(200, "OK");
    let headers = response.headers_mut();
    for (name, value) in [
        // The classic builder: BuildKit's surface is not offered.
        ("builder-version", "1"),
        ("swarm", "inactive"),
        ("cache-control", "no-cache, no-store, must-revalidate"),
        ("pragma", "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

pub fn version(services: &Services) -> Answer {
    respond::json(200, &services.system.version())
}

pub async fn info(services: &Services) -> Answer {
    respond::json(200, &services.system.info().await?)
}

pub fn auth() -> Answer {
    Err(Failure::not_implemented(
        "checking credentials: not supported by this version of the engine; they are checked when an image is pulled",
    ))
}

/// Since this version only what is asked for is counted.
const USAGE_TYPES_SINCE: ApiVersion = ApiVersion::new(1, 42);

pub async fn disk_usage(services: &Services, call: &Call) -> Answer {
    let types = call.query.texts("type");
    let mut wanted = UsageQuery::default();
    if call.version < USAGE_TYPES_SINCE || types.is_empty() {
        wanted = UsageQuery::everything();
    } else {
        for name in types {
            match name.as_str() {
                "container" => wanted.containers = true,
                "image" => wanted.images = true,
                "volume" => wanted.volumes = true,
                "build-cache" => wanted.build_cache = true,
                other => return Err(Failure::invalid(format!("unknown object type: {other}"))),
            }
        }
    }
    let mut usage = services.system.disk_usage(wanted).await?;
    if call.version < VIRTUAL_SIZE_UNTIL {
        usage.images.iter_mut().flatten().for_each(|image| image.virtual_size = Some(image.size));
    }
    respond::json(200, &usage)
}

pub fn events(services: &Arc<Services>, call: &Call) -> Answer {
    let (since, until) = (call.query.moment("since")?, call.query.moment("until")?);
    let filter = EventFilter::new(call.query.filters()?);
    let subscription = services.events.subscribe();
    let (records, lines) = mpsc::channel(EVENTS_WAITING);
    services.tasks.spawn(async move {
        let nanoseconds = |event: &Event| i128::from(event.time_nano);
        // Without `since` the past is not asked for.
        if let Some(since) = since {
            for event in subscription.past {
                let at = nanoseconds(&event);
                let due =
                    at >= since.as_nanosecond() && until.is_none_or(|until| at <= until.as_nanosecond());
                if due && filter.accepts(&event) && records.send(Event::clone(&event)).await.is_err() {
                    return;
                }
            }
        }
        let now = jiff::Timestamp::now();
        let left =
            until.map(|until| std::time::Duration::try_from(until.duration_since(now)).unwrap_or_default());
        let end = async {
            match left {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(end);
        let mut live = subscription.live;
        loop {
            let event = tokio::select! {
                event = live.recv() => event,
                () = &mut end => return,
                () = records.closed() => return,
            };
            match event {
                Ok(event) if filter.accepts(&event) => {
                    if records.send(Event::clone(&event)).await.is_err() {
                        return;
                    }
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    });
    Ok(respond::json_lines(lines, call.gone()))
}
