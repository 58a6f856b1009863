//! `/networks`.

use std::sync::Arc;

use guest_api::ApiVersion;
use guest_api::network::{NetworkConnect, NetworkCreate, NetworkCreated, NetworkDisconnect, NetworksPruned};
use jiff::Timestamp;

use super::Services;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;
use crate::services::containers::NetworkChange;

/// Before this version a list shows the containers too.
const LIST_IS_SHORT_SINCE: ApiVersion = ApiVersion::new(1, 28);
/// Before this version IPv4 is always on.
const IPV4_CHOICE_SINCE: ApiVersion = ApiVersion::new(1, 48);

const PRUNE_FILTERS: [&str; 3] = ["label", "label!", "until"];

pub fn list(services: &Services, call: &Call) -> Answer {
    let detailed = call.version < LIST_IS_SHORT_SINCE;
    respond::json(200, &services.networks.list(&call.query.filters()?, detailed)?)
}

pub fn inspect(services: &Services, call: &Call, id: &str) -> Answer {
    let verbose = call.query.text("verbose");
    if !matches!(
        verbose,
        "" | "1" | "t" | "T" | "true" | "TRUE" | "True" | "0" | "f" | "F" | "false" | "FALSE" | "False"
    ) {
        return Err(Failure::invalid(format!(
            "invalid value for verbose: {verbose}: strconv.ParseBool: parsing \"{verbose}\": invalid syntax"
        )));
    }
    respond::json(200, &services.networks.inspect(id, call.query.text("scope"))?)
}

pub async fn create(services: &Services, call: Call) -> Answer {
    let version = call.version;
    let mut create: NetworkCreate = call.required_json().await?;
    if version < IPV4_CHOICE_SINCE {
        create.enable_ipv4 = None;
    }
    let id = services.networks.create(create).await?;
    respond::json(201, &NetworkCreated { id, warning: String::new() })
}

pub async fn remove(services: &Services, id: &str) -> Answer {
    services.networks.remove(id).await?;
    Ok(respond::empty(204))
}

pub async fn prune(services: &Services, call: &Call) -> Answer {
    let filters = call.query.filters()?;
    if let Some(unknown) = filters.keys().find(|key| !PRUNE_FILTERS.contains(key)) {
        return Err(Failure::invalid(format!("invalid filter '{unknown}'")));
    }
    let until = match filters.get("until").map(|values| values.iter().collect::<Vec<_>>()).as_deref() {
        None => None,
        Some([one]) => Some(crate::moment::parse(one, Timestamp::now())?),
        Some(_) => return Err(Failure::invalid("more than one until filter specified")),
    };
    let removed = services.networks.prune(&filters, until).await;
    let networks_deleted = Some(removed).filter(|names| !names.is_empty());
    respond::json(200, &NetworksPruned { networks_deleted })
}

pub async fn connect(services: &Arc<Services>, call: Call, id: &str) -> Answer {
    let body: NetworkConnect = call.required_json().await?;
    let settings = Box::new(body.endpoint_config.unwrap_or_default());
    let change = NetworkChange::Connect { network: id.to_owned(), settings };
    services.containers.change_network(&body.container, change).await?;
    Ok(respond::empty(200))
}

pub async fn disconnect(services: &Arc<Services>, call: Call, id: &str) -> Answer {
    let body: NetworkDisconnect = call.required_json().await?;
    let change = NetworkChange::Disconnect { network: id.to_owned(), force: body.force };
    services.containers.change_network(&body.container, change).await?;
    Ok(respond::empty(200))
}

/// `GET /containers/{id}/why`, this engine's own: the way to a container, or to its port `port` (`80/tcp`).
pub async fn why(services: &Services, call: &Call, id: &str) -> Answer {
    let view = services.containers.view(id)?;
    let port = match call.query.text("port") {
        "" => None,
        text => Some(crate::services::networks::parse_port(text)?),
    };
    respond::json(200, &services.networks.why(&view, port).await)
}
