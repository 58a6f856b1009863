//! One record of the `/events` stream.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Something that happened. One JSON object per line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Action, once more, for clients from before API 1.22.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub status: String,
    /// Subject's id, once more.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Image name, once more.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub from: String,
    /// `container`, `image`, `network`, `daemon`, …
    #[serde(rename = "Type", default)]
    pub kind: String,
    /// `create`, `start`, `die`, `exec_start: sh`, …
    #[serde(rename = "Action", default)]
    pub action: String,
    /// Who it happened to.
    #[serde(rename = "Actor", default)]
    pub actor: Actor,
    /// Always `local`.
    #[serde(default)]
    pub scope: String,
    /// Unix seconds.
    #[serde(default)]
    pub time: i64,
    /// Unix nanoseconds.
    #[serde(rename = "timeNano", default)]
    pub time_nano: i64,
}

/// The subject of an event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// Id of the container or network, or name of the image.
    #[serde(rename = "ID", default)]
    pub id: String,
    /// Labels, `name`, `image`, `exitCode`, `signal`, …
    #[serde(rename = "Attributes", default)]
    pub attributes: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_fields_are_absent_when_empty() {
        let event = Event { kind: "network".into(), action: "connect".into(), ..Event::default() };
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(json["Type"], "network");
        assert_eq!(json["Actor"]["ID"], "");
        assert!(json.get("status").is_none());
        assert!(json.get("timeNano").is_some());
    }
}
