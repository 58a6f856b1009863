//! `/_ping`, `/version`, `/info`, `/events`.

use std::sync::Arc;

use guest_api::{ApiVersion, Event};
use hyper::header::HeaderValue;
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc};

use super::Services;
use super::images::VIRTUAL_SIZE_UNTIL;
use super::request::Call;
use super::respond::{self, Answer, Response};
use crate::failure::Failure;
use crate::services::events::EventFilter;
use crate::services::system::UsageQuery;

/// Since this version images have `create` events.
const IMAGE_CREATE_SINCE: ApiVersion = ApiVersion::new(1, 46);

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

/// What `/info` had up to a version, or has since one.
mod since {
    use guest_api::ApiVersion;

    pub const NO_KERNEL_MEMORY: ApiVersion = ApiVersion::new(1, 42);
    pub const NO_NONDISTRIBUTABLE: ApiVersion = ApiVersion::new(1, 47);
    pub const FIREWALL: ApiVersion = ApiVersion::new(1, 49);
    pub const NO_EXPECTED_COMMITS: ApiVersion = ApiVersion::new(1, 49);
    pub const DEVICES: ApiVersion = ApiVersion::new(1, 50);
    pub const NO_BRIDGE_FILTER: ApiVersion = ApiVersion::new(1, 50);
    pub const STRUCTURED_SECURITY: ApiVersion = ApiVersion::new(1, 25);
}

pub async fn info(services: &Services, call: &Call) -> Answer {
    let info = services.system.info().await?;
    let (version, kernel_memory) = (call.version, info.kernel_memory_tcp);
    let mut info =
        serde_json::to_value(&info).map_err(|error| Failure::internal("cannot write info", &error))?;
    if version < since::NO_KERNEL_MEMORY {
        info["KernelMemory"] = kernel_memory.into();
    }
    if version < since::NO_NONDISTRIBUTABLE {
        info["RegistryConfig"]["AllowNondistributableArtifactsCIDRs"] = Value::Null;
        info["RegistryConfig"]["AllowNondistributableArtifactsHostnames"] = Value::Null;
    }
    if version < since::NO_EXPECTED_COMMITS {
        for part in ["ContainerdCommit", "RuncCommit", "InitCommit"] {
            info[part]["Expected"] = info[part]["ID"].clone();
        }
    }
    if version < since::NO_BRIDGE_FILTER {
        info["BridgeNfIptables"] = false.into();
        info["BridgeNfIp6tables"] = false.into();
    }
    if version < since::STRUCTURED_SECURITY {
        info["SecurityOptions"] = json!(["seccomp"]);
        info["ExecutionDriver"] = "<not supported>".into();
    }
    if let Value::Object(fields) = &mut info {
        if version < since::FIREWALL {
            fields.remove("FirewallBackend");
        }
        if version < since::DEVICES {
            fields.remove("DiscoveredDevices");
        }
    }
    respond::json(200, &info)
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
    if let (Some(from), Some(to)) = (since, until)
        && to < from
    {
        let (from, to) = (call.query.text("since"), call.query.text("until"));
        return Err(Failure::invalid(format!("`since` time ({from}) cannot be after `until` time ({to})")));
    }
    let image_created = call.version >= IMAGE_CREATE_SINCE;
    let filter = EventFilter::new(call.query.filters()?);
    let subscription = services.events.subscribe();
    let (records, lines) = mpsc::channel(EVENTS_WAITING);
    services.tasks.spawn(async move {
        let nanoseconds = |event: &Event| i128::from(event.time_nano);
        let wanted = |event: &Event| {
            filter.accepts(event) && (image_created || event.kind != "image" || event.action != "create")
        };
        // Without a bound the past is not asked for.
        if since.is_some() || until.is_some() {
            for event in subscription.past {
                let at = nanoseconds(&event);
                let due = since.is_none_or(|since| at >= since.as_nanosecond())
                    && until.is_none_or(|until| at <= until.as_nanosecond());
                if due && wanted(&event) && records.send(Event::clone(&event)).await.is_err() {
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
                Ok(event) if wanted(&event) => {
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
