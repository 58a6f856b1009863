//! `Request` and `Reply`: the lines that travel on the control socket.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of this contract. A daemon that speaks another one answers [`Reply::Error`] naming both.
pub const VERSION: u32 = 1;

/// What a client asks the daemon. One line of JSON, then the client only reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Is anyone there, and who. Answered by [`Reply::Hello`] at once.
    Hello,
    /// Make the machine run; progress until its API answers.
    Start,
    /// Power the machine off cleanly.
    Stop,
    /// Stop, then start.
    Restart,
    /// Delete the machine with everything in it: images, containers, volumes.
    Remove,
    /// The machine's state, at once.
    Status,
    /// Everything known about the machine, the guest's own figures included.
    Info,
    /// Change the machine's settings. A running machine takes on at once what it can. Answered by [`Reply::Set`].
    Set(MachineSettings),
    /// The lines of one log, as [`Reply::Text`].
    Logs {
        /// Which log.
        source: LogSource,
        /// Keep sending what is appended.
        follow: bool,
    },
    /// Stop the machine, then the daemon.
    Shutdown,
}

/// What of the machine can be set. `None` stays as it is.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSettings {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Guest memory in MiB.
    pub memory_mib: Option<u32>,
    /// Size of the data disk in GiB. It never shrinks.
    pub disk_gib: Option<u64>,
    /// `auto`, `kvm` or `qemu`.
    pub backend: Option<String>,
}

/// The logs of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The guest kernel's console.
    Console,
    /// The guest agent and the engine.
    Engine,
    /// The VM process.
    Vmm,
    /// The host daemon.
    Daemon,
}

/// One line of the daemon's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// Who answers. Ends the answer.
    Hello {
        /// The daemon's [`VERSION`].
        version: u32,
        /// The daemon's process id.
        pid: u32,
    },
    /// What is being waited for; more lines follow.
    Progress {
        /// A short present-tense phrase, such as `booting the kernel`.
        text: String,
    },
    /// Log text; more lines follow.
    Text {
        /// Any number of lines, as they are.
        text: String,
    },
    /// What whoever asked should know beside the answer; more lines follow.
    Notice {
        /// A sentence.
        text: String,
    },
    /// It is done. Ends the answer.
    Done,
    /// Ends the answer.
    Status(MachineStatus),
    /// Ends the answer.
    Info(Box<MachineInfo>),
    /// The settings are kept. Ends the answer.
    Set {
        /// What the running machine has taken on, a sentence each.
        #[serde(default)]
        now: Vec<String>,
        /// What it takes on when it starts next.
        #[serde(default)]
        later: Vec<LaterSetting>,
        /// The machine runs, without what comes later.
        restart: bool,
        /// Variables of the daemon's environment that win over what was set.
        overridden: Vec<String>,
    },
    /// It could not be done. Ends the answer.
    Error {
        /// What failed and why, one sentence.
        message: String,
        /// What to do next, when that is known.
        hint: Option<String>,
    },
}

/// A setting that counts from the machine's next start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaterSetting {
    /// Its name, as in `engine machine set`.
    pub name: String,
    /// Why not now, where a running machine usually takes it on: a clause.
    pub why: Option<String>,
}

/// Where the machine is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum MachineState {
    /// No VM process.
    Stopped {
        /// Why, when it was not asked for.
        reason: Option<String>,
    },
    /// Booting.
    Starting {
        /// What is being waited for.
        stage: String,
    },
    /// The API answers.
    Running {
        /// Since when, seconds since the Unix epoch.
        since_unix_s: u64,
        /// What keeps it from its work, a sentence.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        trouble: Option<String>,
    },
    /// Powering off.
    Stopping,
}

impl MachineState {
    /// The state's name as `engine machine status` prints it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stopped { .. } => "stopped",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Stopping => "stopping",
        }
    }
}

/// The machine's name and state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// The machine's name.
    pub machine: String,
    /// Its state.
    #[serde(flatten)]
    pub state: MachineState,
}

/// Which hypervisor runs, or would run, the machine, and why that one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendChoice {
    /// `kvm` or `qemu`.
    pub backend: String,
    /// What executes guest instructions, such as `kvm` or `tcg (software CPU)`.
    pub accelerator: String,
    /// The reason, a sentence.
    pub reason: String,
}

/// Everything known about the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Name and state.
    #[serde(flatten)]
    pub status: MachineStatus,
    /// What runs it.
    pub backend: BackendChoice,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The data disk's file.
    pub disk: PathBuf,
    /// Size of the disk as the guest sees it, bytes.
    pub disk_size_bytes: u64,
    /// What the file takes on the host, bytes.
    pub disk_allocated_bytes: u64,
    /// Folder of the VM image.
    pub image: PathBuf,
    /// Digest of the VM image.
    pub image_digest: Option<String>,
    /// The Docker API socket.
    pub docker_socket: PathBuf,
    /// The guest's own figures, while it runs.
    pub guest: Option<GuestStatus>,
    /// vsock streams between host and guest, while it runs. One is the control session and one the log.
    pub open_streams: Option<u64>,
    /// Memory that the host holds for the guest now, bytes.
    #[serde(default)]
    pub memory_held_bytes: Option<u64>,
    /// Memory that the guest has given back since it started, bytes; the same page counts every time.
    #[serde(default)]
    pub memory_given_back_bytes: Option<u64>,
}

/// What the guest says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Kernel release.
    pub kernel: String,
    /// Seconds since it booted.
    pub uptime_s: u64,
    /// Memory the guest kernel manages, bytes.
    pub memory_total_bytes: u64,
    /// Memory available to new programs without swapping, bytes.
    pub memory_available_bytes: u64,
    /// Memory that holds copies of files, bytes: given back when the machine is idle.
    #[serde(default)]
    pub memory_cached_bytes: u64,
    /// Size of the data file system, bytes.
    pub disk_total_bytes: u64,
    /// What is used of it, bytes.
    pub disk_used_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(value: &T, json: &str) {
        assert_eq!(serde_json::to_string(value).unwrap(), json);
        assert_eq!(&serde_json::from_str::<T>(json).unwrap(), value);
    }

    #[test]
    fn lines_on_the_wire_are_stable() {
        check(&Request::Start, r#"{"request":"start"}"#);
        check(
            &Request::Logs { source: LogSource::Console, follow: true },
            r#"{"request":"logs","source":"console","follow":true}"#,
        );
        check(
            &Request::Set(MachineSettings { cpus: Some(2), ..Default::default() }),
            r#"{"request":"set","cpus":2,"memory_mib":null,"disk_gib":null,"backend":null}"#,
        );
        let status =
            MachineStatus { machine: "default".into(), state: MachineState::Stopped { reason: None } };
        check(
            &Reply::Status(status),
            r#"{"reply":"status","machine":"default","state":"stopped","reason":null}"#,
        );
        let later = vec![LaterSetting { name: "memory".into(), why: None }];
        check(
            &Reply::Set { now: vec!["n".into()], later, restart: true, overridden: Vec::new() },
            r#"{"reply":"set","now":["n"],"later":[{"name":"memory","why":null}],"restart":true,"overridden":[]}"#,
        );
        check(
            &Reply::Error { message: "no".into(), hint: None },
            r#"{"reply":"error","message":"no","hint":null}"#,
        );
    }
}
