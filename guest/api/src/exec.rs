//! Processes run inside a container.

use serde::{Deserialize, Serialize};

/// Body of `POST /containers/{id}/exec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ExecCreate {
    /// User, `name[:group]` or numbers; empty means the container's.
    pub user: String,
    /// Give it every capability.
    pub privileged: bool,
    /// Allocate a terminal.
    pub tty: bool,
    /// Terminal size, height then width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_size: Option<[u16; 2]>,
    /// Connect standard input.
    pub attach_stdin: bool,
    /// Connect standard error.
    pub attach_stderr: bool,
    /// Connect standard output.
    pub attach_stdout: bool,
    /// Keys that detach, such as `ctrl-p,ctrl-q`; empty means the default.
    // Go reads names in any case, and docker-py writes this one so.
    #[serde(alias = "detachKeys")]
    pub detach_keys: String,
    /// Extra environment, `NAME=value`.
    pub env: Option<Vec<String>>,
    /// Working directory; empty means the container's.
    pub working_dir: String,
    /// Program and arguments.
    #[serde(deserialize_with = "crate::words")]
    pub cmd: Option<Vec<String>>,
}

/// Answer of `POST /containers/{id}/exec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExecCreated {
    /// The exec's id.
    pub id: String,
}

/// Body of `POST /exec/{id}/start`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ExecStart {
    /// Do not attach; answer once it runs.
    pub detach: bool,
    /// Must agree with the exec's own setting.
    pub tty: bool,
    /// Terminal size, height then width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_size: Option<[u16; 2]>,
}

/// Answer of `GET /exec/{id}/json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ExecInspect {
    /// The exec's id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Whether it runs now.
    pub running: bool,
    /// Exit code; `None` (JSON null) until it has ended.
    pub exit_code: Option<i64>,
    /// What runs.
    pub process_config: ExecProcess,
    /// Whether standard input is connected.
    pub open_stdin: bool,
    /// Whether standard error is connected.
    pub open_stderr: bool,
    /// Whether standard output is connected.
    pub open_stdout: bool,
    /// Whether the record goes when the container does.
    pub can_remove: bool,
    /// The container's id.
    #[serde(rename = "ContainerID")]
    pub container_id: String,
    /// Detach keys as bytes, base64.
    pub detach_keys: String,
    /// Process id; 0 until started.
    pub pid: i64,
}

/// The process of an exec. These names are lower case on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecProcess {
    /// Whether it has a terminal.
    pub tty: bool,
    /// The program.
    pub entrypoint: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Whether it has every capability.
    pub privileged: bool,
    /// The user it runs as.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_that_has_not_ended_has_a_null_exit_code() {
        let json = serde_json::to_value(ExecInspect::default()).unwrap();
        assert!(json["ExitCode"].is_null());
        assert_eq!(json["ID"], "");
        assert_eq!(json["ContainerID"], "");
        assert_eq!(json["ProcessConfig"]["entrypoint"], "");
        assert!(json["ProcessConfig"].get("user").is_none());
    }

    #[test]
    fn the_stock_client_body_is_read() {
        let body = br#"{"User":"","Privileged":false,"Tty":true,"ConsoleSize":[24,80],"AttachStdin":true,
            "AttachStderr":true,"AttachStdout":true,"DetachKeys":"","Env":null,"WorkingDir":"","Cmd":["sh"]}"#;
        let exec: ExecCreate = crate::decode(body).unwrap();
        assert_eq!(exec.console_size, Some([24, 80]));
        assert_eq!(exec.cmd, Some(vec!["sh".to_owned()]));
    }
}
