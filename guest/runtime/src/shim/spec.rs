//! What the engine tells a shim before it starts: `DIR/shim.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The name of the [`ShimSpec`] in a shim's folder.
pub const SPEC_FILE: &str = "shim.json";

/// One container, as its shim sees it. Everything about the process itself is in the bundle's OCI spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimSpec {
    /// The container's full id.
    pub container: String,
    /// The folder holding `config.json`. Its `root.path` is a mounted root file system.
    pub bundle: PathBuf,
    /// Whether init gets a terminal. Must agree with `process.terminal` of the OCI spec, which the shim corrects if not.
    #[serde(default)]
    pub terminal: bool,
    /// What init's standard input is.
    #[serde(default)]
    pub stdin: Stdin,
    /// Where init's output is kept.
    #[serde(default)]
    pub log: Log,
    /// The terminal's first size.
    #[serde(default)]
    pub console_size: Option<ConsoleSize>,
    /// A folder of seccomp filters that all shims of an engine share: what one has made of a profile the others take.
    /// Each engine begins with an empty one.
    #[serde(default)]
    pub filters: Option<PathBuf>,
    /// A mount with those of all containers below it. Where it is told, the container is made in a place where the
    /// others' are not to be seen: what making takes then does not depend on how many there are.
    #[serde(default)]
    pub mounts: Option<PathBuf>,
    /// Who makes the container, when it is not the shim itself.
    #[serde(default)]
    pub runtime: Option<ExternalRuntime>,
}

/// A program with runc's command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRuntime {
    /// A path, or a name that is looked for in `$PATH`.
    pub program: PathBuf,
    /// What comes before all other arguments.
    #[serde(default)]
    pub arguments: Vec<String>,
}

/// What a process's standard input is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stdin {
    /// `/dev/null` (with a terminal: the terminal, which nobody types on).
    #[default]
    None,
    /// A pipe that stays open when a client leaves: Docker's OpenStdin.
    Open,
    /// A pipe that closes when the first attached client ends its input: Docker's StdinOnce.
    Once,
}

/// Where init's output is kept, and where it is sent besides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// The format, or nothing.
    #[serde(default)]
    pub driver: LogDriver,
    /// The log file; rotated files are this name with `.1`, `.2`, … appended, and `.gz` when compressed.
    #[serde(default)]
    pub path: PathBuf,
    /// Rotate when the file would grow beyond this many bytes; `None` never rotates.
    #[serde(default)]
    pub max_size_bytes: Option<u64>,
    /// How many files to keep, the current one included. At least 1; `None` means 1.
    #[serde(default)]
    pub max_files: Option<u32>,
    /// Compress rotated files.
    #[serde(default)]
    pub compress: bool,
    /// Written with every entry, where the format has a place for it.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
    /// A logging service that gets every line as well.
    #[serde(default)]
    pub forward: Option<Forward>,
}

/// The format of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogDriver {
    /// Docker's `json-file`.
    JsonFile,
    /// Docker's `local`: length, protocol buffer, length.
    Local,
    /// Output that no client is attached to is lost.
    #[default]
    None,
}

/// A logging service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forward {
    /// A syslog receiver.
    Syslog(Syslog),
    /// The journal, by its socket.
    Journal {
        /// Sent with every line.
        fields: BTreeMap<String, String>,
    },
}

/// How to reach a syslog receiver, and how to speak to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Syslog {
    /// `unix:///path`, `unixgram:///path`, `udp://host:port`, `tcp://host:port`; empty: the computer's own.
    pub address: String,
    /// The facility's number.
    pub facility: u8,
    /// What the lines are said to come from.
    pub tag: String,
    /// `rfc3164`, `rfc5424`, `rfc5424micro`; empty: what a local receiver takes.
    pub format: String,
}

/// A terminal's size in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}
