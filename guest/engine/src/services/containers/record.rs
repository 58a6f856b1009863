//! A container's record (what must survive a restart) and its view (what readers see).
//!
//! The record holds intent and history. Whether the container runs is never written down: its shim tells.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest_api::health::Health;
use guest_api::network::EndpointSettings;
use guest_api::{ContainerConfig, HostConfig};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::mounts::MountPoint;
use super::table::Phase;

/// What is stored about a container.
#[derive(Clone, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    /// Without the leading slash.
    pub name: String,
    pub created: Timestamp,
    /// `sha256:…`.
    pub image_id: String,
    /// The user's settings over the image's.
    pub config: ContainerConfig,
    pub host: HostConfig,
    /// What is mounted into it. The first version knew binds only.
    #[serde(default, alias = "binds")]
    pub mounts: Vec<MountPoint>,
    /// Its networks by name; `None` in records of earlier versions.
    #[serde(default)]
    pub networks: Option<BTreeMap<String, EndpointSettings>>,
    #[serde(default)]
    pub last: LastRun,
    /// Somebody stopped or killed it: policies leave it alone.
    #[serde(default)]
    pub stopped_by_user: bool,
    /// Restarts by policy since it was last started by hand.
    #[serde(default)]
    pub restarts: u32,
}

/// How the last run went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRun {
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it could not be started.
    #[serde(default)]
    pub error: String,
    /// How its health check goes, or went.
    #[serde(default)]
    pub health: Option<Health>,
}

/// Facts about a run that a restarted engine needs: `run.json` beside the shim's files, gone with a reboot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    pub started_at: Timestamp,
    #[serde(default)]
    pub stopped_by_user: bool,
}

/// A run that is going on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    pub pid: i32,
    pub started_at: Timestamp,
}

/// What readers see: published by the container's driver, never written by anyone else.
#[derive(Clone)]
pub struct View {
    pub record: Arc<Record>,
    pub phase: Phase,
    pub live: Option<Live>,
    /// Counts runs that have ended, so that a waiter cannot miss a short one.
    pub runs_ended: u64,
    /// It is gone; the last thing ever published.
    pub removed: bool,
}

impl Record {
    /// The first twelve digits.
    pub fn short_id(&self) -> &str {
        &self.id[..12]
    }

    /// Program and arguments.
    pub fn command(&self) -> Vec<String> {
        let entrypoint = self.config.entrypoint.iter().flatten();
        entrypoint.chain(self.config.cmd.iter().flatten()).cloned().collect()
    }

    /// What its events carry: labels, image, name.
    pub fn event_attributes(&self) -> BTreeMap<String, String> {
        let mut attributes = self.config.labels.clone();
        attributes.insert("image".to_owned(), self.config.image.clone());
        attributes.insert("name".to_owned(), self.name.clone());
        attributes
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A plain record for tests.
    pub fn record() -> Record {
        Record {
            id: "3f2a9c1d77e04b5c".repeat(4),
            name: "web".to_owned(),
            created: "2026-01-02T03:04:05.000000006Z".parse().unwrap(),
            image_id: format!("sha256:{}", "ab".repeat(32)),
            config: ContainerConfig {
                image: "busybox".to_owned(),
                cmd: Some(vec!["sleep".to_owned(), "1".to_owned()]),
                ..ContainerConfig::default()
            },
            host: HostConfig::default(),
            mounts: Vec::new(),
            networks: None,
            last: LastRun::default(),
            stopped_by_user: false,
            restarts: 0,
        }
    }

    #[test]
    fn a_record_is_read_back_as_written() {
        let json = serde_json::to_vec(&record()).unwrap();
        let again: Record = guest_api::decode(&json).unwrap();
        assert_eq!(again.command(), ["sleep", "1"]);
        assert_eq!(again.created, record().created);
        assert_eq!(again.short_id(), "3f2a9c1d77e0");
    }

    #[test]
    fn events_carry_labels_image_and_name() {
        let mut record = record();
        record.config.labels.insert("tier".into(), "front".into());
        let attributes = record.event_attributes();
        assert_eq!(attributes["tier"], "front");
        assert_eq!(attributes["image"], "busybox");
        assert_eq!(attributes["name"], "web");
    }
}
