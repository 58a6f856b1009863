//! What an engine answers that is no swarm node and has neither plugins nor BuildKit: the words of a dockerd that is in
//! no swarm and has no plugin installed, and a plain no where it would begin to have some.

use guest_api::ErrorKind;
use guest_api::error::NOT_A_SWARM_MANAGER;
use hyper::Method;
use hyper::header::UPGRADE;
use serde_json::{Value, json};

use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;

/// `/swarm`, `/services`, `/tasks`, `/nodes`, `/secrets`, `/configs`.
pub async fn swarm(call: Call) -> Answer {
    let (method, path) = (call.method.clone(), call.segments.clone());
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let unavailable = |text: &str| Err(Failure::new(ErrorKind::Unavailable, text));
    let (get, post, delete) = (method == Method::GET, method == Method::POST, method == Method::DELETE);
    match path.as_slice() {
        ["swarm", "leave"] if post => unavailable("This node is not part of a swarm"),
        ["swarm", "init" | "join"] if post => {
            call.json::<Value>().await?;
            Err(Failure::not_implemented(
                "swarm mode is not offered by this engine: it works on one computer",
            ))
        }
        ["swarm"] | ["swarm", "unlockkey"] | ["services" | "tasks" | "nodes" | "secrets" | "configs"]
            if get =>
        {
            unavailable(NOT_A_SWARM_MANAGER)
        }
        ["services" | "tasks" | "nodes" | "secrets" | "configs", _] if get => {
            unavailable(NOT_A_SWARM_MANAGER)
        }
        ["services" | "tasks", _, "logs"] if get => unavailable(NOT_A_SWARM_MANAGER),
        ["services" | "nodes" | "secrets" | "configs", _] if delete => unavailable(NOT_A_SWARM_MANAGER),
        ["swarm", "update" | "unlock"]
        | ["services" | "secrets" | "configs", "create"]
        | ["services" | "nodes" | "secrets" | "configs", _, "update"]
            if post =>
        {
            call.json::<Value>().await?;
            unavailable(NOT_A_SWARM_MANAGER)
        }
        _ => respond::page_not_found(),
    }
}

/// `/plugins`.
pub fn plugins(call: &Call) -> Answer {
    let path: Vec<&str> = call.segments.iter().map(String::as_str).collect();
    let (get, post, delete) =
        (call.method == Method::GET, call.method == Method::POST, call.method == Method::DELETE);
    let none = |name: &str| Err(Failure::not_found(format!("plugin \"{name}\" not found")));
    match path.as_slice() {
        ["plugins"] if get => {
            call.query.filters()?;
            respond::json(200, &[(); 0])
        }
        ["plugins", "privileges"] if get => not_offered(),
        ["plugins", "pull" | "create"] if post => not_offered(),
        ["plugins", name @ .., "json"] if get && !name.is_empty() => none(&name.join("/")),
        ["plugins", name @ .., "enable" | "disable" | "upgrade" | "push" | "set"]
            if post && !name.is_empty() =>
        {
            none(&name.join("/"))
        }
        ["plugins", name @ ..] if delete && !name.is_empty() => none(&name.join("/")),
        _ => respond::page_not_found(),
    }
}

fn not_offered() -> Answer {
    Err(Failure::not_implemented("plugins are not offered by this engine: its drivers are built in"))
}

/// `/session` and `/grpc`: BuildKit's connections.
pub fn buildkit(call: &Call) -> Answer {
    if !call.headers.contains_key(UPGRADE) {
        return Err(Failure::invalid("no upgrade proto in request"));
    }
    Err(Failure::not_implemented("BuildKit is not offered by this version of the engine"))
}

/// `/build/prune`: there is no build cache to prune.
pub fn build_prune() -> Answer {
    respond::json(200, &json!({"CachesDeleted": null, "SpaceReclaimed": 0}))
}
