//! `engine inspect`, `events`, `version`, `info`, and the verbs on images.

use crate::arguments::{EventsArgs, FormatArgs, InspectArgs, ObjectKind, RmiArgs, TagArgs};
use crate::containers::timestamp;
use crate::docker::{ApiError, Docker, Lines, encode, encode_name};
use crate::lists::filters;
use crate::output::{line, note, text};
use crate::template::Template;
use anyhow::{Context, Result, anyhow};
use guest_api::Event;
use guest_api::image::ImageDeleted;
use guest_api::system::{Info, Version};
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::Value;

pub(crate) async fn inspect(docker: &Docker, args: &InspectArgs) -> Result<bool> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let mut found = Vec::new();
    let mut all = true;
    for name in &args.names {
        match inspect_one(docker, args.kind, name).await {
            Ok(value) => found.push(value),
            Err(error) => {
                note(&format!("{error:#}"));
                all = false;
            }
        }
    }
    match template {
        Some(template) => text(&template.render_all(&found)?)?,
        None => line(&pretty(&Value::Array(found))?)?,
    }
    Ok(all)
}

async fn inspect_one(docker: &Docker, kind: Option<ObjectKind>, name: &str) -> Result<Value> {
    let kinds = match kind {
        Some(kind) => vec![kind],
        None => vec![ObjectKind::Container, ObjectKind::Image, ObjectKind::Network, ObjectKind::Volume],
    };
    for kind in kinds {
        let path = match kind {
            ObjectKind::Container => format!("/containers/{}/json", encode(name)),
            ObjectKind::Image => format!("/images/{}/json", encode_name(name)),
            ObjectKind::Network => format!("/networks/{}", encode(name)),
            ObjectKind::Volume => format!("/volumes/{}", encode(name)),
        };
        match docker.get_value(&path).await {
            Err(error)
                if error.downcast_ref::<ApiError>().is_some_and(|e| e.status == StatusCode::NOT_FOUND) => {}
            result => return result,
        }
    }
    Err(anyhow!("Error: No such object: {name}"))
}

pub(crate) fn pretty(value: &Value) -> Result<String> {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    serde::Serialize::serialize(value, &mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(String::from_utf8(bytes)?)
}

pub(crate) async fn events(docker: &Docker, args: &EventsArgs) -> Result<()> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let mut query = Vec::new();
    let filters = filters(&args.filter)?;
    if !filters.is_empty() {
        query.push(format!("filters={}", encode(&filters.encode())));
    }
    let now = jiff::Timestamp::now();
    for (key, moment) in [("since", &args.since), ("until", &args.until)] {
        if let Some(moment) = moment {
            query.push(format!("{key}={}", encode(&timestamp(moment, now)?)));
        }
    }
    let path = format!("/events?{}", query.join("&"));
    let mut lines = Lines::new(docker.stream(Method::GET, &path, crate::docker::empty()).await?);
    while let Some(value) = lines.next::<Value>().await? {
        match &template {
            Some(template) => line(&template.render(&value)?)?,
            None => line(&event_line(&serde_json::from_value(value)?))?,
        }
    }
    Ok(())
}

/// `2026-01-02T03:04:05.000000000Z container start <id> (image=debian, name=web)`
fn event_line(event: &Event) -> String {
    let at = jiff::Timestamp::from_nanosecond(event.time_nano.into()).unwrap_or_default();
    let mut text = format!(
        "{} {} {} {}",
        at.strftime("%Y-%m-%dT%H:%M:%S.%9fZ"),
        event.kind,
        event.action,
        event.actor.id
    );
    if !event.actor.attributes.is_empty() {
        let attributes: Vec<String> =
            event.actor.attributes.iter().map(|(key, value)| format!("{key}={value}")).collect();
        text += &format!(" ({})", attributes.join(", "));
    }
    text
}

pub(crate) async fn version(docker: &Docker, args: &FormatArgs) -> Result<()> {
    let server: Version = docker.get("/version").await?;
    let client = serde_json::json!({
        "Version": env!("CARGO_PKG_VERSION"),
        "ApiVersion": guest_api::version::NEWEST.to_string(),
        "Os": std::env::consts::OS,
        "Arch": architecture(),
    });
    if let Some(format) = &args.format {
        let both = serde_json::json!({ "Client": client, "Server": serde_json::to_value(&server)? });
        return Ok(line(&Template::parse(format)?.render(&both)?)?);
    }
    let lines = [
        "Client: engine".to_owned(),
        format!(" Version:           {}", env!("CARGO_PKG_VERSION")),
        format!(" API version:       {}", guest_api::version::NEWEST),
        format!(" OS/Arch:           {}/{}", std::env::consts::OS, architecture()),
        String::new(),
        format!("Server: {}", server.platform.name),
        format!(" Version:          {}", server.version),
        format!(" API version:      {} (minimum version {})", server.api_version, server.min_api_version),
        format!(" OS/Arch:          {}/{}", server.os, server.arch),
        format!(" Kernel:           {}", server.kernel_version),
    ];
    Ok(line(&lines.join("\n"))?)
}

/// This program's architecture by the name that images use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub(crate) async fn info(docker: &Docker, args: &FormatArgs) -> Result<()> {
    let value = docker.get_value("/info").await?;
    if let Some(format) = &args.format {
        return Ok(line(&Template::parse(format)?.render(&value)?)?);
    }
    let info: Info =
        guest_api::decode(value.to_string().as_bytes()).context("the engine's answer is not understood")?;
    let lines = [
        format!("Containers: {}", info.containers),
        format!(" Running: {}", info.containers_running),
        format!(" Paused: {}", info.containers_paused),
        format!(" Stopped: {}", info.containers_stopped),
        format!("Images: {}", info.images),
        format!("Server Version: {}", info.server_version),
        format!("Storage Driver: {}", info.driver),
        format!("Logging Driver: {}", info.logging_driver),
        format!("Cgroup Driver: {}", info.cgroup_driver),
        format!("Cgroup Version: {}", info.cgroup_version),
        format!("Default Runtime: {}", info.default_runtime),
        format!("Security Options: {}", info.security_options.join(" ")),
        format!("Kernel Version: {}", info.kernel_version),
        format!("Operating System: {}", info.operating_system),
        format!("OSType: {}", info.os_type),
        format!("Architecture: {}", info.architecture),
        format!("CPUs: {}", info.ncpu),
        format!("Total Memory: {}", crate::output::size(info.mem_total)),
        format!("Name: {}", info.name),
        format!("ID: {}", info.id),
        format!("Docker Root Dir: {}", info.docker_root_dir),
    ];
    Ok(line(&lines.join("\n"))?)
}

pub(crate) async fn tag(docker: &Docker, args: &TagArgs) -> Result<()> {
    let slash = args.target.rfind('/').map_or(0, |at| at + 1);
    let (repository, tag) = match args.target[slash..].rfind(':') {
        Some(colon) => (&args.target[..slash + colon], &args.target[slash + colon + 1..]),
        None => (args.target.as_str(), ""),
    };
    docker
        .post(&format!(
            "/images/{}/tag?repo={}&tag={}",
            encode_name(&args.source),
            encode(repository),
            encode(tag)
        ))
        .await
}

pub(crate) async fn rmi(docker: &Docker, args: &RmiArgs) -> Result<bool> {
    let mut all = true;
    for image in &args.images {
        let path = format!(
            "/images/{}?force={}&noprune={}",
            encode_name(image),
            u8::from(args.force),
            u8::from(args.no_prune)
        );
        match remove(docker, &path).await {
            Ok(removed) => {
                for item in removed {
                    if let Some(name) = item.untagged {
                        line(&format!("Untagged: {name}"))?;
                    }
                    if let Some(id) = item.deleted {
                        line(&format!("Deleted: {id}"))?;
                    }
                }
            }
            Err(error) => {
                note(&format!("{error:#}"));
                all = false;
            }
        }
    }
    Ok(all)
}

async fn remove(docker: &Docker, path: &str) -> Result<Vec<ImageDeleted>> {
    let body =
        docker.delete(path).await?.into_body().collect().await.context("the engine broke off its answer")?;
    guest_api::decode(&body.to_bytes()).context("the engine's answer is not understood")
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_api::event::Actor;

    #[test]
    fn an_event_reads_like_dockers() {
        let event = Event {
            kind: "container".into(),
            action: "die".into(),
            actor: Actor {
                id: "abc".into(),
                attributes: [("name".to_owned(), "web".to_owned()), ("exitCode".to_owned(), "7".to_owned())]
                    .into(),
            },
            time_nano: 1_000_000_000,
            ..Event::default()
        };
        assert_eq!(
            event_line(&event),
            "1970-01-01T00:00:01.000000000Z container die abc (exitCode=7, name=web)"
        );
    }

    #[test]
    fn inspect_indents_as_docker_does() {
        assert_eq!(pretty(&serde_json::json!([{"a": 1}])).unwrap(), "[\n    {\n        \"a\": 1\n    }\n]");
    }
}
