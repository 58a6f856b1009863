//! Docker Engine API wire types: what our server writes and our command line reads.
//!
//! Types only: no I/O, no clock, no policy. Field names, and which fields are present when empty, follow dockerd
//! (API 1.24 to 1.51), because clients look at both. Every type can be read and written, so that the server, our
//! own command line and the tests share one definition.
//!
//! Bodies are read with [`decode`], which treats `null` like an absent field, as Go's decoder does.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod container;
pub mod error;
pub mod event;
pub mod exec;
pub mod filter;
pub mod frame;
pub mod image;
pub mod network;
pub mod system;
pub mod version;
pub mod volume;

pub use container::{
    ContainerConfig, ContainerCreate, ContainerCreated, ContainerInspect, ContainerSummary, HostConfig,
    WaitResult,
};
pub use error::{ErrorBody, ErrorKind};
pub use event::Event;
pub use filter::Filters;
pub use version::ApiVersion;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

/// A JSON object whose values carry no meaning (`ExposedPorts`, `Volumes`): a set of keys.
pub type KeySet = BTreeMap<String, EmptyObject>;

/// `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EmptyObject {}

/// Reads a JSON body the way Go's decoder does: a member that is `null` counts as absent.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, serde_json::Error> {
    let mut value: serde_json::Value = serde_json::from_slice(body)?;
    drop_nulls(&mut value);
    serde_json::from_value(value)
}

fn drop_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Reads a command line given as a list or, as old clients do, as one string.
fn words<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Words {
        None,
        One(String),
        Many(Vec<String>),
    }
    Ok(match serde::Deserialize::deserialize(deserializer)? {
        Words::None => None,
        Words::One(word) => Some(vec![word]),
        Words::Many(words) => Some(words),
    })
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_members_count_as_absent() {
        let config: ContainerConfig =
            decode(br#"{"Hostname":null,"Image":"x","Labels":null,"Cmd":null}"#).unwrap();
        assert_eq!(config.hostname, "");
        assert_eq!(config.image, "x");
        assert_eq!(config.cmd, None);
    }

    #[test]
    fn a_command_may_be_one_string() {
        let config: ContainerConfig = decode(br#"{"Cmd":"date","Entrypoint":["/bin/sh","-c"]}"#).unwrap();
        assert_eq!(config.cmd, Some(vec!["date".to_owned()]));
        assert_eq!(config.entrypoint, Some(vec!["/bin/sh".to_owned(), "-c".to_owned()]));
    }
}
