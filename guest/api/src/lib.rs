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
pub mod files;
pub mod filter;
pub mod frame;
pub mod health;
pub mod image;
pub mod manifest;
pub mod mount;
pub mod network;
pub mod registry;
pub mod stats;
pub mod system;
pub mod usage;
pub mod version;
pub mod volume;

pub use container::{
    ContainerConfig, ContainerCreate, ContainerCreated, ContainerInspect, ContainerSummary, HostConfig,
    WaitResult,
};
pub use error::{ErrorBody, ErrorKind};
pub use event::Event;
pub use filter::{Filters, InvalidFilter};
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

/// Feeds foreign bytes to every reader of this crate, as a hostile client or server would. Never panics; filters
/// that can be read are read back as written.
pub fn read_hostile(bytes: &[u8]) {
    // Whether these can be read does not matter.
    let _ = decode::<ContainerCreate>(bytes);
    let _ = decode::<exec::ExecCreate>(bytes);
    let _ = decode::<volume::VolumeCreate>(bytes);
    let _ = decode::<exec::ExecStart>(bytes);
    let _ = decode::<image::ProgressLine>(bytes);
    let _ = decode::<Event>(bytes);
    let _ = (registry::decode_auth(bytes), registry::decode_auths(bytes));
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(filters) = Filters::parse(text) {
            assert_eq!(Filters::parse(&filters.encode()).ok(), Some(filters));
        }
        let _ = text.parse::<ApiVersion>();
    }
    if let Some(header) = bytes.first_chunk() {
        let _ = frame::Header::decode(*header);
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
    fn hostile_bytes_are_refused_quietly() {
        for bytes in [&b""[..], b"null", b"{}", b"[[[[", b"{\"Cmd\":7}", b"\xff\xfe", b"{\"a\":{\"b\":true}}"]
        {
            read_hostile(bytes);
        }
    }

    #[test]
    fn a_command_may_be_one_string() {
        let config: ContainerConfig = decode(br#"{"Cmd":"date","Entrypoint":["/bin/sh","-c"]}"#).unwrap();
        assert_eq!(config.cmd, Some(vec!["date".to_owned()]));
        assert_eq!(config.entrypoint, Some(vec!["/bin/sh".to_owned(), "-c".to_owned()]));
    }
}
