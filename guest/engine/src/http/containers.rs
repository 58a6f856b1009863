//! `/containers/…`.

use guest_api::container::{ContainerConfig, ContainerCreate, ContainerUpdated};
use guest_api::frame::{MULTIPLEXED, RAW};
use guest_api::{ApiVersion, HostConfig, WaitResult};
use guest_images::{Image, Platform};
use hyper::header::USER_AGENT;
use tokio::sync::mpsc;

use super::Services;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;
use crate::services::containers::{
    ListQuery, LogQuery, Record, RemoveQuery, WaitCondition, for_version, parse_signal,
};

/// Before this version `wait` knew no conditions.
const CONDITIONS_SINCE: ApiVersion = ApiVersion::new(1, 30);
/// From this version on frames have a content type of their own.
const MULTIPLEXED_SINCE: ApiVersion = ApiVersion::new(1, 42);

/// Since when a platform and a limit of processes can be asked for.
const PLATFORM_SINCE: ApiVersion = ApiVersion::new(1, 41);
const PIDS_LIMIT_SINCE: ApiVersion = ApiVersion::new(1, 40);

pub async fn list(services: &Services, call: &Call) -> Answer {
    let query = ListQuery {
        all: call.query.flag("all"),
        limit: call
            .query
            .number::<i64>("limit")?
            .and_then(|limit| usize::try_from(limit).ok())
            .filter(|limit| *limit > 0),
        filters: call.query.filters()?,
    };
    let images = if query.filters.get("ancestor").is_some() {
        services.images.store().list().await.map_err(|error| crate::services::images::failure(&error))?
    } else {
        Vec::new()
    };
    let mut lines =
        services.containers.list(&query, |record, wanted| is_ancestor(&images, record, wanted))?;
    if call.query.flag("size") {
        for line in &mut lines {
            let written = services.containers.written_bytes(&line.id).await?;
            // As with dockerd, nothing is not told.
            line.size_rw = (written > 0).then_some(written);
            line.size_root_fs = Some(written + services.images.bytes(&line.image_id).await?);
        }
    }
    respond::json(200, &lines)
}

/// Whether a container's image is the one named, or has all its layers below its own.
fn is_ancestor(images: &[Image], record: &Record, wanted: &str) -> bool {
    let named = |image: &&Image| {
        let id = image.id.to_string();
        let hex = id.trim_start_matches("sha256:");
        let tagged = |name: &String| name == wanted || name.strip_suffix(":latest") == Some(wanted);
        image.repo_tags.iter().any(tagged)
            || image.repo_digests.iter().any(|name| name == wanted)
            || id == wanted
            || (wanted.len() >= 4 && hex.starts_with(wanted))
    };
    let layers =
        |image: &Image| image.layers.iter().map(|layer| layer.chain_id.to_string()).collect::<Vec<_>>();
    let own = images.iter().find(|image| image.id.to_string() == record.image_id);
    images.iter().filter(named).any(|image| {
        image.id.to_string() == record.image_id
            || own.is_some_and(|own| {
                let (below, all) = (layers(image), layers(own));
                !below.is_empty() && all.starts_with(&below)
            })
    })
}

pub async fn create(services: &Services, call: Call) -> Answer {
    let name = call.query.text("name").to_owned();
    let version = call.version;
    let platform = match call.query.text("platform") {
        text if !text.is_empty() && version >= PLATFORM_SINCE => {
            Some(text.parse::<Platform>().map_err(|error| Failure::invalid(error.to_string()))?)
        }
        _ => None,
    };
    let mut create: ContainerCreate = call.required_json().await?;
    if create.config == ContainerConfig::default() {
        return Err(Failure::invalid("config cannot be empty in order to create a container"));
    }
    for_version(&mut create, version, services.containers.context().capacity.support.unified);
    let created = services.containers.create(Some(&name), version, create, platform.as_ref()).await?;
    respond::json(201, &created)
}

pub async fn inspect(services: &Services, call: &Call, id: &str) -> Answer {
    let mut inspect = services.containers.inspect(id, |id| services.execs.of_container(id))?;
    if call.query.flag("size") {
        let written = services.containers.written_bytes(&inspect.id).await?;
        inspect.size_rw = Some(written);
        inspect.size_root_fs = Some(written + services.images.bytes(&inspect.image).await?);
    }
    respond::json(200, &inspect)
}

/// Limits and restart policy, named as in a host configuration; whatever else one holds is passed over.
pub async fn update(services: &Services, call: Call, id: &str) -> Answer {
    let version = call.version;
    let mut changes: HostConfig = call.json().await?;
    changes.pids_limit = changes.pids_limit.filter(|_| version >= PIDS_LIMIT_SINCE).map(|limit| limit.max(0));
    if version >= MULTIPLEXED_SINCE {
        changes.kernel_memory = 0;
    }
    let warnings = services.containers.update(id, changes).await?;
    respond::json(200, &ContainerUpdated { warnings: Some(warnings).filter(|warnings| !warnings.is_empty()) })
}

pub async fn start(services: &Services, id: &str) -> Answer {
    services.containers.start(id).await?;
    Ok(respond::empty(204))
}

fn signal(call: &Call) -> Result<Option<i32>, Failure> {
    match call.query.text("signal") {
        "" => Ok(None),
        text => parse_signal(text).map(Some),
    }
}

pub async fn stop(services: &Services, call: &Call, id: &str) -> Answer {
    services.containers.stop(id, signal(call)?, call.query.number("t")?).await?;
    Ok(respond::empty(204))
}

pub async fn restart(services: &Services, call: &Call, id: &str) -> Answer {
    services.containers.restart(id, signal(call)?, call.query.number("t")?).await?;
    Ok(respond::empty(204))
}

pub async fn kill(services: &Services, call: &Call, id: &str) -> Answer {
    const PREFIX: &str = "cannot kill container: ";
    let in_words = |failure: Failure| match failure.message.starts_with(PREFIX) {
        true => failure,
        false => Failure { message: format!("{PREFIX}{id}: {}", failure.message), ..failure },
    };
    let signal = signal(call).and_then(|signal| signal.map_or_else(|| parse_signal("KILL"), Ok));
    services.containers.kill(id, signal.map_err(in_words)?).await.map_err(in_words)?;
    Ok(respond::empty(204))
}

pub async fn pause(services: &Services, id: &str) -> Answer {
    services.containers.pause(id).await?;
    Ok(respond::empty(204))
}

pub async fn unpause(services: &Services, id: &str) -> Answer {
    services.containers.unpause(id).await?;
    Ok(respond::empty(204))
}

/// `h` and `w`.
pub fn size(call: &Call) -> Result<(u16, u16), Failure> {
    let number = |name: &str| {
        call.query.number::<u16>(name)?.ok_or_else(|| {
            Failure::invalid(format!("query parameter '{name}' is missing: the terminal's size"))
        })
    };
    Ok((number("h")?, number("w")?))
}

pub async fn resize(services: &Services, call: &Call, id: &str) -> Answer {
    let (height, width) = size(call)?;
    services.containers.resize(id, width, height).await?;
    Ok(respond::empty(200))
}

pub async fn rename(services: &Services, call: &Call, id: &str) -> Answer {
    services.containers.rename(id, call.query.text("name")).await?;
    Ok(respond::empty(204))
}

pub async fn remove(services: &Services, call: &Call, id: &str) -> Answer {
    if call.query.flag("link") {
        services.containers.unlink(id).await?;
        return Ok(respond::empty(204));
    }
    let query = RemoveQuery { force: call.query.flag("force"), volumes: call.query.flag("v") };
    services.containers.remove(id, query).await?;
    Ok(respond::empty(204))
}

/// The head of the answer goes out at once: clients start the container only when they have seen it.
pub fn wait(services: &Services, call: &Call, id: &str) -> Answer {
    let condition = match call.query.text("condition") {
        _ if call.version < CONDITIONS_SINCE => WaitCondition::NotRunning,
        "" | "not-running" => WaitCondition::NotRunning,
        "next-exit" => WaitCondition::NextExit,
        "removed" => WaitCondition::Removed,
        other => return Err(Failure::invalid(format!("invalid condition: \"{other}\""))),
    };
    let waiting = services.containers.wait(id, condition)?;
    let (results, lines) = mpsc::channel::<WaitResult>(1);
    services.tasks.spawn(async move {
        let result = tokio::select! {
            result = waiting => result,
            () = results.closed() => return,
        };
        let result = result.unwrap_or_else(|failure| WaitResult {
            error: Some(guest_api::container::WaitError { message: failure.message }),
            status_code: -1,
        });
        // The client may have gone in this moment.
        let _ = results.send(result).await;
    });
    Ok(respond::json_lines(lines, call.gone()))
}

fn log_query(call: &Call) -> Result<LogQuery, Failure> {
    let tail = match call.query.text("tail") {
        "" | "all" => None,
        // dockerd takes a negative number, or none, for all.
        text => text.parse::<usize>().ok(),
    };
    Ok(LogQuery {
        stdout: call.query.flag("stdout"),
        stderr: call.query.flag("stderr"),
        timestamps: call.query.flag("timestamps"),
        details: call.query.flag("details"),
        follow: call.query.flag("follow"),
        since: call.query.moment("since")?,
        until: call.query.moment("until")?,
        tail,
        joined: copies_frames(call),
    })
}

/// Whether a client only copies what frames hold: Docker's command line and what is built from it. Other clients hand
/// each frame to their callers, who take it for the line it is with dockerd.
fn copies_frames(call: &Call) -> bool {
    let agent = call.headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok());
    agent.is_some_and(|agent| agent.starts_with("Docker-Client/"))
}

pub fn logs(services: &Services, call: &Call, id: &str) -> Answer {
    if !call.query.flag("stdout") && !call.query.flag("stderr") {
        return Err(Failure::invalid("Bad parameters: you must choose at least one stream"));
    }
    let tty = services.containers.view(id)?.record.config.tty;
    let batches = services.containers.logs(id, log_query(call)?)?;
    let mut response = respond::with_status(200, respond::stream(batches, call.gone()));
    let kind = if tty || call.version < MULTIPLEXED_SINCE { RAW } else { MULTIPLEXED };
    respond::content_type(&mut response, kind);
    Ok(response)
}
