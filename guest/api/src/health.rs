//! How a container's health check goes.

use serde::{Deserialize, Serialize};

/// Where a health check is: never succeeded yet, or what it said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// There is no check.
    None,
    /// No check has succeeded yet.
    #[default]
    Starting,
    /// The last check succeeded.
    Healthy,
    /// As many checks in a row failed as are allowed; or nobody checks any more.
    Unhealthy,
}

impl HealthStatus {
    /// Docker's word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            HealthStatus::None => "none",
            HealthStatus::Starting => "starting",
            HealthStatus::Healthy => "healthy",
            HealthStatus::Unhealthy => "unhealthy",
        }
    }

    /// The status a filter names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        let all = [Self::None, Self::Starting, Self::Healthy, Self::Unhealthy];
        all.into_iter().find(|status| status.word() == word)
    }
}

/// `State.Health` of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Health {
    /// Where it is.
    pub status: HealthStatus,
    /// Failures since the last success.
    pub failing_streak: i64,
    /// The last five results, oldest first.
    pub log: Vec<HealthResult>,
}

/// One run of a health check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthResult {
    /// RFC 3339.
    pub start: String,
    /// RFC 3339.
    pub end: String,
    /// 0 is a success; -1 means that the check itself did not work or took too long.
    pub exit_code: i64,
    /// The first 4 KiB of what it printed.
    pub output: String,
}
