//! Images, and the lines of a pull or load.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::container::{ContainerConfig, GraphDriver};
use crate::manifest::ManifestSummary;

/// One line of `GET /images/json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageSummary {
    /// Containers using it; -1 when not counted.
    pub containers: i64,
    /// Unix seconds.
    pub created: i64,
    /// `sha256:…` of the configuration.
    pub id: String,
    /// Labels of the image (JSON null when it has none).
    pub labels: Option<BTreeMap<String, String>>,
    /// What it consists of, when that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifests: Option<Vec<ManifestSummary>>,
    /// The image it was committed from.
    pub parent_id: String,
    /// `name@sha256:…`.
    pub repo_digests: Vec<String>,
    /// `name:tag`.
    pub repo_tags: Vec<String>,
    /// Bytes shared with other images; -1 when not counted.
    pub shared_size: i64,
    /// Bytes of all layers.
    pub size: i64,
    /// The same, before API 1.44.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<i64>,
}

/// Answer of `GET /images/{name}/json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageInspect {
    /// `sha256:…` of the configuration.
    pub id: String,
    /// `name:tag`.
    pub repo_tags: Vec<String>,
    /// `name@sha256:…`.
    pub repo_digests: Vec<String>,
    /// The image it was committed from.
    pub parent: String,
    /// Commit message.
    pub comment: String,
    /// RFC 3339.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub created: String,
    /// Version of the engine that built it.
    pub docker_version: String,
    /// Author.
    pub author: String,
    /// Defaults for containers.
    pub config: Option<ContainerConfig>,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v8`, …
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
    /// `linux`.
    pub os: String,
    /// Bytes of all layers.
    pub size: i64,
    /// The same, before API 1.44.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<i64>,
    /// Where the layers are.
    pub graph_driver: GraphDriver,
    /// The layers.
    #[serde(rename = "RootFS")]
    pub root_fs: RootFs,
    /// What this engine knows beyond the image.
    pub metadata: ImageMetadata,
}

/// The layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Digests of the uncompressed layers, lowest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<String>,
}

/// What this engine knows about an image beyond the image itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageMetadata {
    /// RFC 3339; year 1 when never tagged.
    pub last_tag_time: String,
}

/// One line of `GET /images/{name}/history`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HistoryItem {
    /// Comment.
    pub comment: String,
    /// Unix seconds.
    pub created: i64,
    /// The instruction.
    pub created_by: String,
    /// `sha256:…`, or `<missing>`.
    pub id: String,
    /// Bytes the step added.
    pub size: i64,
    /// Tags of that image.
    pub tags: Option<Vec<String>>,
}

/// One line of `DELETE /images/{name}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageDeleted {
    /// A name that no longer exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub untagged: Option<String>,
    /// An image or layer that no longer exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deleted: Option<String>,
}

/// One line of a pull, push, load or build.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProgressLine {
    /// Text to print as it is (load, build).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// What is being done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// How far it is.
    #[serde(rename = "progressDetail", skip_serializing_if = "Option::is_none")]
    pub progress_detail: Option<ProgressDetail>,
    /// A drawn bar, for clients that cannot draw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// The layer, short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The failure.
    #[serde(rename = "errorDetail", skip_serializing_if = "Option::is_none")]
    pub error_detail: Option<ErrorDetail>,
    /// The failure, once more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Result data of a push or build.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aux: Option<serde_json::Value>,
}

/// How far a step is. Both absent (`{}`) when not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProgressDetail {
    /// Done, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<u64>,
    /// All, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

/// The failure of a streamed operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ErrorDetail {
    /// Exit code of a failed build step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<i64>,
    /// The sentence.
    pub message: String,
}

/// Credentials for a registry: the decoded `X-Registry-Auth` header, and the body of `POST /auth`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AuthConfig {
    /// User name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub username: String,
    /// Password.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub password: String,
    /// `user:password`, base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub auth: String,
    /// The registry's host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub serveraddress: String,
    /// A token to trade for an access token.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub identitytoken: String,
    /// An access token.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub registrytoken: String,
}

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("AuthConfig")
            .field("serveraddress", &self.serveraddress)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_never_show_in_debug_output() {
        let auth = AuthConfig {
            password: "hunter2".into(),
            serveraddress: "r.example".into(),
            ..Default::default()
        };
        let text = format!("{auth:?}");
        assert!(!text.contains("hunter2") && text.contains("r.example"));
    }

    #[test]
    fn a_progress_line_holds_only_what_it_says() {
        let line = ProgressLine { status: Some("Pulling fs layer".into()), ..Default::default() };
        assert_eq!(serde_json::to_string(&line).unwrap(), r#"{"status":"Pulling fs layer"}"#);
        let line = ProgressLine { progress_detail: Some(ProgressDetail::default()), ..Default::default() };
        assert_eq!(serde_json::to_string(&line).unwrap(), r#"{"progressDetail":{}}"#);
    }

    #[test]
    fn virtual_size_is_absent_unless_asked_for() {
        let json =
            serde_json::to_value(ImageSummary { shared_size: -1, containers: -1, ..Default::default() })
                .unwrap();
        assert!(json.get("VirtualSize").is_none());
        assert!(json["Labels"].is_null());
        assert_eq!(json["RepoTags"], serde_json::json!([]));
    }
}
