//! The Docker API over HTTP: parse, call a service, render. No logic.
//!
//! One `match` is the whole routing table ([`route`]). Paths may begin with `/v1.N`; without it they mean the newest
//! version. Answers carry the headers clients negotiate by.

mod absent;
mod address;
mod ahead;
mod archive;
mod attach;
mod body;
mod containers;
mod exec;
mod hijack;
mod image_files;
mod images;
mod lenient;
mod listener;
mod networks;
mod reframe;
mod registry;
mod request;
mod respond;
mod system;
mod takeover;
mod usage;
mod volumes;
mod websocket;

use std::convert::Infallible;
use std::sync::Arc;

use guest_api::ErrorKind;
use hyper::Method;
use hyper::body::Incoming;
use tokio_util::task::TaskTracker;

use listener::Hangup;
pub use listener::{Listeners, bind_unix};
use request::Call;
use respond::{Answer, Response};

use crate::failure::Failure;
use crate::services::containers::Containers;
use crate::services::events::Events;
use crate::services::exec::Execs;
use crate::services::images::ImagesService;
use crate::services::networks::Networks;
use crate::services::system::System;
use crate::services::volumes::Volumes;

/// The services that routes call.
pub struct Services {
    pub containers: Arc<Containers>,
    pub images: ImagesService,
    pub execs: Arc<Execs>,
    pub events: Events,
    pub networks: Arc<Networks>,
    pub system: System,
    pub volumes: Arc<Volumes>,
    /// Owns tasks that outlive their request: streams, mostly.
    pub tasks: TaskTracker,
}

/// Answers one request.
pub async fn serve(
    services: Arc<Services>,
    request: hyper::Request<Incoming>,
    hangup: Arc<Hangup>,
) -> Result<Response, Infallible> {
    let (head, experimental) = (request.method() == Method::HEAD, services.system.settings.experimental);
    if let Some(clean) = address::cleaned(request.uri().path()) {
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        let response =
            respond::moved(&format!("{clean}{query}")).unwrap_or_else(|failure| respond::error(&failure));
        return Ok(respond::finish(response, head, experimental));
    }
    let answer = match Call::new(request, hangup) {
        Ok(call) => {
            // A task of its own: what was begun is finished, also when the connection breaks.
            let owned = services.clone();
            let routed = services.tasks.spawn(async move { route(&owned, call).await }).await;
            routed.unwrap_or_else(|error| Err(Failure::internal("the request failed", &error)))
        }
        Err(failure) => Ok(respond::wrong_version(&failure)),
    };
    let response = answer.unwrap_or_else(|failure| {
        if failure.kind == ErrorKind::Internal {
            tracing::warn!(error = %failure, "request failed");
        }
        respond::error(&failure)
    });
    Ok(respond::finish(response, head, experimental))
}

async fn route(services: &Arc<Services>, call: Call) -> Answer {
    const GET: &Method = &Method::GET;
    const HEAD: &Method = &Method::HEAD;
    const POST: &Method = &Method::POST;
    const PUT: &Method = &Method::PUT;
    const DELETE: &Method = &Method::DELETE;
    let (method, path) = (call.method.clone(), call.segments.clone());
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match (&method, path.as_slice()) {
        (method, ["_ping"]) if method == GET || method == HEAD => Ok(system::ping()),
        (method, _) if method == Method::OPTIONS => Ok(respond::empty(200)),
        (method, ["version"]) if method == GET => system::version(services),
        (method, ["info"]) if method == GET => system::info(services, &call).await,
        (method, ["events"]) if method == GET => system::events(services, &call),
        (method, ["auth"]) if method == POST => registry::auth(services, call).await,
        (method, ["system", "df"]) if method == GET => system::disk_usage(services, &call).await,

        (method, ["images", "json"]) if method == GET => images::list(services, &call).await,
        (method, ["images", "search"]) if method == GET => registry::search(services, &call).await,
        (method, ["images", "create"]) if method == POST => images::create(services, call).await,
        (method, ["images", "load"]) if method == POST => image_files::load(services, call),
        (method, ["images", "get"]) if method == GET => image_files::save(services, &call, None).await,
        (method, ["images", name @ .., "get"]) if method == GET && !name.is_empty() => {
            image_files::save(services, &call, Some(&name.join("/"))).await
        }
        (method, ["commit"]) if method == POST => image_files::commit(services, call).await,
        (method, ["images", "prune"]) if method == POST => images::prune(services, &call).await,
        (method, ["images", name @ .., "json"]) if method == GET && !name.is_empty() => {
            images::inspect(services, &call, &name.join("/")).await
        }
        (method, ["images", name @ .., "history"]) if method == GET && !name.is_empty() => {
            images::history(services, &name.join("/")).await
        }
        (method, ["images", name @ .., "tag"]) if method == POST && !name.is_empty() => {
            images::tag(services, &call, &name.join("/")).await
        }
        (method, ["images", name @ .., "push"]) if method == POST && !name.is_empty() => {
            registry::push(services, &call, &name.join("/")).await
        }
        (method, ["distribution", name @ .., "json"]) if method == GET && !name.is_empty() => {
            registry::inspect(services, &call, &name.join("/")).await
        }
        (method, ["images", name @ ..]) if method == DELETE && !name.is_empty() => {
            images::remove(services, &call, &name.join("/")).await
        }

        (method, ["containers", "json"]) if method == GET => containers::list(services, &call).await,
        (method, ["containers", "create"]) if method == POST => containers::create(services, call).await,
        (method, ["containers", id, "json"]) if method == GET => {
            containers::inspect(services, &call, id).await
        }
        (method, ["containers", id, "logs"]) if method == GET => containers::logs(services, &call, id),
        (method, ["containers", id, "start"]) if method == POST => containers::start(services, id).await,
        (method, ["containers", id, "stop"]) if method == POST => containers::stop(services, &call, id).await,
        (method, ["containers", id, "restart"]) if method == POST => {
            containers::restart(services, &call, id).await
        }
        (method, ["containers", id, "kill"]) if method == POST => containers::kill(services, &call, id).await,
        (method, ["containers", id, "pause"]) if method == POST => containers::pause(services, id).await,
        (method, ["containers", id, "unpause"]) if method == POST => containers::unpause(services, id).await,
        (method, ["containers", id, "wait"]) if method == POST => containers::wait(services, &call, id),
        (method, ["containers", id, "attach"]) if method == POST => attach::attach(services, call, id).await,
        (method, ["containers", id, "resize"]) if method == POST => {
            containers::resize(services, &call, id).await
        }
        (method, ["containers", id, "rename"]) if method == POST => {
            containers::rename(services, &call, id).await
        }
        (method, ["containers", "prune"]) if method == POST => usage::prune(services, &call).await,
        (method, ["containers", id, "attach", "ws"]) if method == GET => {
            websocket::attach(services, call, id).await
        }
        (method, ["containers", id, "top"]) if method == GET => usage::top(services, &call, id).await,
        (method, ["containers", id, "stats"]) if method == GET => usage::stats(services, &call, id).await,
        (method, ["containers", id, "why"]) if method == GET => networks::why(services, &call, id).await,
        (method, ["containers", id, "archive"]) if method == HEAD => archive::stat(services, &call, id).await,
        (method, ["containers", id, "archive"]) if method == GET => {
            archive::copy_out(services, &call, id).await
        }
        (method, ["containers", id, "archive"]) if method == PUT => {
            archive::copy_in(services, call, id).await
        }
        (method, ["containers", id, "export"]) if method == GET => archive::export(services, &call, id).await,
        (method, ["containers", id, "changes"]) if method == GET => archive::changes(services, id).await,
        (method, ["containers", id, "update"]) if method == POST => {
            containers::update(services, call, id).await
        }
        (method, ["containers", id, "exec"]) if method == POST => exec::create(services, call, id).await,
        // A link: `parent/alias`.
        (method, ["containers", parent, alias]) if method == DELETE => {
            containers::remove(services, &call, &format!("{parent}/{alias}")).await
        }
        (method, ["containers", id]) if method == DELETE => containers::remove(services, &call, id).await,

        (method, ["exec", id, "start"]) if method == POST => exec::start(services, call, id).await,
        (method, ["exec", id, "resize"]) if method == POST => exec::resize(services, &call, id).await,
        (method, ["exec", id, "json"]) if method == GET => exec::inspect(services, id),

        (method, ["networks"]) if method == GET => networks::list(services, &call),
        (method, ["networks", "create"]) if method == POST => networks::create(services, call).await,
        (method, ["networks", "prune"]) if method == POST => networks::prune(services, &call).await,
        (method, ["networks", id, "connect"]) if method == POST => {
            networks::connect(services, call, id).await
        }
        (method, ["networks", id, "disconnect"]) if method == POST => {
            networks::disconnect(services, call, id).await
        }
        (method, ["networks", id]) if method == GET => networks::inspect(services, &call, id),
        (method, ["networks", id]) if method == DELETE => networks::remove(services, id).await,

        (method, ["volumes"]) if method == GET => volumes::list(services, &call),
        (method, ["volumes", "create"]) if method == POST => volumes::create(services, call).await,
        (method, ["volumes", "prune"]) if method == POST => volumes::prune(services, &call).await,
        (method, ["volumes", name]) if method == GET => volumes::inspect(services, name),
        (method, ["volumes", name]) if method == DELETE => volumes::remove(services, &call, name).await,
        (method, ["volumes", _]) if method == PUT => volumes::update(),

        (_, ["swarm" | "services" | "tasks" | "nodes" | "secrets" | "configs", ..]) => {
            absent::swarm(call).await
        }
        (_, ["plugins", ..]) => absent::plugins(&call),
        (method, ["session" | "grpc"]) if method == POST => absent::buildkit(&call),
        (method, ["build", "prune"]) if method == POST => absent::build_prune(),
        (method, ["build", ..]) if method == POST => not_yet("building images"),

        _ => respond::page_not_found(),
    }
}

fn not_yet(what: &str) -> Answer {
    Err(Failure::not_implemented(format!("{what}: not supported by this version of the engine")))
}
