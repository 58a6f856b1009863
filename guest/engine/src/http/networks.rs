//! `/networks` and `/volumes`, as far as there are any.

use guest_api::volume::VolumeList;

use super::Services;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;

pub fn list(services: &Services, call: &Call) -> Answer {
    respond::json(200, &services.networks.list(&call.query.filters()?))
}

pub fn inspect(services: &Services, id: &str) -> Answer {
    respond::json(200, &services.networks.inspect(id)?)
}

pub fn remove(services: &Services, id: &str) -> Answer {
    let network = services.networks.inspect(id)?;
    Err(Failure::new(
        guest_api::ErrorKind::Forbidden,
        format!("{} is a pre-defined network and cannot be removed", network.name),
    ))
}

pub fn volumes() -> Answer {
    respond::json(200, &VolumeList::default())
}

pub fn no_volume(name: &str) -> Answer {
    Err(Failure::not_found(format!("get {name}: no such volume")))
}
