//! Kinds of failure, the status code of each, and the texts that Docker clients match on.

use serde::{Deserialize, Serialize};

/// The body of every error answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The sentence the client prints.
    pub message: String,
}

/// What sort of failure an operation ended with. Services return kinds; only the HTTP layer knows numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The thing named does not exist.
    NotFound,
    /// The request contradicts the present state.
    Conflict,
    /// The request itself makes no sense.
    Invalid,
    /// Credentials are missing or wrong.
    Unauthorized,
    /// Forbidden by policy.
    Forbidden,
    /// The thing is already in the state asked for: status 304, no body.
    NotModified,
    /// The engine knows the feature but does not offer it.
    NotImplemented,
    /// Something the engine needs is not there right now.
    Unavailable,
    /// Our own failure.
    Internal,
}

impl ErrorKind {
    /// The HTTP status code of the kind.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            ErrorKind::NotModified => 304,
            ErrorKind::Invalid => 400,
            ErrorKind::Unauthorized => 401,
            ErrorKind::Forbidden => 403,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict => 409,
            ErrorKind::Internal => 500,
            ErrorKind::NotImplemented => 501,
            ErrorKind::Unavailable => 503,
        }
    }
}

/// What everything that needs a swarm is answered with.
pub const NOT_A_SWARM_MANAGER: &str = "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm \
     join\" to connect this node to swarm and try again.";

/// `No such container: x`.
#[must_use]
pub fn no_such_container(name: &str) -> String {
    format!("No such container: {name}")
}

/// `No such image: x:latest`. Clients answer it by pulling.
#[must_use]
pub fn no_such_image(reference: &str) -> String {
    format!("No such image: {reference}")
}

/// `No such exec instance: x`.
#[must_use]
pub fn no_such_exec(id: &str) -> String {
    format!("No such exec instance: {id}")
}

/// `network x not found`.
#[must_use]
pub fn no_such_network(name: &str) -> String {
    format!("network {name} not found")
}

/// `get x: no such volume`.
#[must_use]
pub fn no_such_volume(name: &str) -> String {
    format!("get {name}: no such volume")
}

/// The 409 that compose recognises. `name` has no leading slash.
#[must_use]
pub fn name_conflict(name: &str, owner: &str) -> String {
    format!(
        "Conflict. The container name \"/{name}\" is already in use by container \"{owner}\". You have to remove \
         (or rename) that container to be able to reuse that name."
    )
}

/// `container <id> is not running`.
#[must_use]
pub fn not_running(id: &str) -> String {
    format!("container {id} is not running")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_the_ones_clients_match() {
        assert_eq!(no_such_image("x:latest"), "No such image: x:latest");
        assert!(
            name_conflict("web", "abc")
                .starts_with("Conflict. The container name \"/web\" is already in use by")
        );
        assert_eq!(ErrorKind::Conflict.status(), 409);
    }
}
