//! What the two ends of a control session say to each other.
//!
//! Messages are plain data. On the wire each is a JSON object; fields that the reader does not know are ignored,
//! so that a newer end may say more. What becomes of kinds the reader does not know is the session's business
//! (see [`crate::session`]).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::lease::{GrantedPort, Landing, Lease, PortRequest};
use crate::share::{BindPlace, BindSource};

/// The version of the contract. It changes only when an older end could misunderstand a newer one; new kinds of
/// requests and new fields do not change it.
pub const PROTOCOL_VERSION: u32 = 1;

/// The first message of each end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version of the contract the sender speaks, [`PROTOCOL_VERSION`] for this build.
    pub version: u32,
    /// What tells one boot of the guest from the next: the kernel's boot id. The host sends an empty string.
    #[serde(default)]
    pub boot_id: String,
    /// The sender's program and its version, for logs, for example `guest-agent 0.1.0`.
    #[serde(default)]
    pub program: String,
}

impl Hello {
    /// A greeting in the version of this build.
    pub fn new(program: impl Into<String>, boot_id: impl Into<String>) -> Self {
        Self { version: PROTOCOL_VERSION, boot_id: boot_id.into(), program: program.into() }
    }
}

/// What one end asks of the other. Each is answered once, with a [`Response`] or a [`Failure`].
///
/// The daemon asks the agent; the engine, on a session of its own, asks the daemon for leases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Request {
    /// Set the guest's clock if it is off by more than a few tens of milliseconds. Answered by [`Response::Done`].
    SetClock {
        /// Nanoseconds since 1970-01-01 UTC at the moment of sending.
        unix_nanos: i64,
    },
    /// Start the engine with these settings. Sent once a session is established; the engine that runs already keeps
    /// those it has. Answered by [`Response::Done`].
    Configure {
        /// The user's; nothing when there are none.
        settings: Option<EngineSettings>,
        /// What the host's environment names, for what the settings leave open.
        #[serde(default, skip_serializing_if = "HostProxies::is_empty")]
        proxies: HostProxies,
    },
    /// Stop containers and engine, sync and unmount the data disk, switch the machine off. Answered at once by
    /// [`Response::Done`]; the end of the machine is what completes it.
    PowerOff,
    /// Tell how the guest is. Answered by [`Response::Info`].
    Info,
    /// The data disk has been made larger: wait until the kernel sees so much of it, then grow the file system on it in
    /// place. Answered by [`Response::Disk`].
    GrowDisk {
        /// What the disk has now.
        size_bytes: u64,
    },
    /// Run on so many of the machine's processors, or on all if there are not as many. Answered by
    /// [`Response::Processors`].
    UseProcessors {
        /// At least one.
        count: u32,
    },
    /// Hold these ports of the host for a container, all or none. Answered by [`Response::Granted`] once connections to
    /// them are taken. What the container held before is let go first.
    Acquire {
        /// The container's id.
        container: String,
        /// What it publishes.
        ports: Vec<PortRequest>,
    },
    /// From now on connections to a container's published ports land there, and those to its other ports nowhere. Changes
    /// nothing for a container that holds nothing. Answered by [`Response::Done`].
    Land {
        /// The container's id.
        container: String,
        /// All its landings.
        landings: Vec<Landing>,
    },
    /// Let go of all that a container holds; nothing if it holds nothing. Answered by [`Response::Done`].
    Release {
        /// The container's id.
        container: String,
    },
    /// Tell where in the guest these paths of the host are. Answered by [`Response::Located`].
    Locate {
        /// The sources of a container's binds.
        sources: Vec<BindSource>,
    },
    /// These are all leases there are: let go of others, hold again what was lost. The engine's first request on every
    /// session. Answered by [`Response::Reconciled`].
    Reconcile {
        /// What running containers hold.
        leases: Vec<Lease>,
    },
}

/// The answer to a [`Request`] that could be carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Response {
    /// It is done (or, for [`Request::PowerOff`], begun).
    Done,
    /// The answer to [`Request::Info`].
    Info(GuestInfo),
    /// The answer to [`Request::GrowDisk`].
    Disk {
        /// The size of its file system.
        total_bytes: u64,
    },
    /// The answer to [`Request::UseProcessors`].
    Processors {
        /// How many the guest runs on now.
        online: u32,
        /// How many the machine has.
        present: u32,
    },
    /// The answer to [`Request::Acquire`].
    Granted {
        /// What is held now: one entry for each address of each request.
        ports: Vec<GrantedPort>,
    },
    /// The answer to [`Request::Locate`].
    Located {
        /// One for each source, in the order asked.
        places: Vec<BindPlace>,
    },
    /// The answer to [`Request::Reconcile`].
    Reconciled {
        /// Sentences about leases that cannot be held any more; their ports answer no longer.
        lost: Vec<String>,
    },
}

/// How the guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Release of the running kernel, as `uname -r` prints it.
    pub kernel: String,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// Memory the guest's kernel manages.
    pub memory_total_bytes: u64,
    /// Memory that programs could still get without swapping (`MemAvailable`).
    pub memory_available_bytes: u64,
    /// Memory that holds copies of files, which the guest's kernel can do without.
    #[serde(default)]
    pub memory_cached_bytes: u64,
    /// Size of the data disk's file system; 0 when it is not mounted.
    pub disk_total_bytes: u64,
    /// What is used of it; 0 when it is not mounted.
    pub disk_used_bytes: u64,
    /// How the engine is.
    pub engine: EngineState,
}

/// Whether the Docker API in the guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineState {
    /// The engine's process has been, or is about to be, started.
    Starting,
    /// The API answers on [`crate::port::API`].
    Ready,
    /// The engine's process ended, or could not be started.
    Failed {
        /// Why, as a sentence for the user.
        reason: String,
        /// Milliseconds until the next attempt, counted from the moment of sending; 0 when there will be none
        /// because the machine is at fault ([`Notice::Fault`]).
        retry_in_ms: u64,
    },
}

/// The engine's settings file, as the user wrote it. Only the engine reads what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSettings {
    /// `engine.toml` or `daemon.json`: its ending tells how it is written.
    pub name: String,
    /// What is in it.
    pub text: String,
}

impl EngineSettings {
    /// Longest file: it has to fit into a frame, escaped.
    pub const BYTES_MAX: usize = 128 << 10;
}

/// The proxies that programs of the user's on the host go by, as its environment names them; empty where it does not.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostProxies {
    /// `HTTP_PROXY`.
    pub http: String,
    /// `HTTPS_PROXY`.
    pub https: String,
    /// `NO_PROXY`.
    pub exceptions: String,
}

impl HostProxies {
    /// Longest value that is told.
    pub const BYTES_MAX: usize = 16 << 10;

    /// None is named.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Debug for HostProxies {
    /// Their addresses may hold passwords.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { http, https, exceptions } = self;
        write!(
            formatter,
            "HostProxies {{ http: {}, https: {}, exceptions: {exceptions:?} }}",
            !http.is_empty(),
            !https.is_empty()
        )
    }
}

/// What the guest tells the host unasked. Notices have no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "value", rename_all = "snake_case")]
pub enum Notice {
    /// The engine's state changed. Also sent once when a session is established.
    Engine(EngineState),
    /// Something that only the user can put right, for example a damaged data disk. The guest stays up, without
    /// an engine, so that the host can read this.
    Fault {
        /// What is broken, in a few words: `data disk`.
        what: String,
        /// What happened and what to do, as a sentence for the user.
        reason: String,
    },
    /// The guest has begun to switch itself off.
    PoweringOff,
}

/// The answer to a request that could not be carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The family, for programs.
    pub kind: FailureKind,
    /// A sentence, for people.
    #[serde(default)]
    pub message: String,
}

impl Failure {
    /// A failure with a sentence.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Families of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The peer does not know this kind of request, or its answer is of a kind we do not know.
    Unsupported,
    /// Too many requests are open.
    Busy,
    /// No answer came before the deadline. The request may still be carried out.
    Timeout,
    /// The session ended before the answer came. The request may have been carried out.
    Closed,
    /// The peer tried and could not.
    Failed,
    /// A kind that a newer peer knows and we do not.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Transport;
    use std::net::Ipv4Addr;

    #[track_caller]
    fn check<T>(message: T, json: &str)
    where
        T: Serialize + for<'de> Deserialize<'de> + PartialEq + fmt::Debug,
    {
        assert_eq!(serde_json::to_string(&message).unwrap(), json);
        assert_eq!(serde_json::from_str::<T>(json).unwrap(), message);
    }

    /// The contract on the page: a change here is a change that old peers see.
    #[test]
    fn the_wire_form_is_fixed() {
        check(
            Hello::new("guest-agent 0.1.0", "b1"),
            r#"{"version":1,"boot_id":"b1","program":"guest-agent 0.1.0"}"#,
        );
        check(Request::SetClock { unix_nanos: -5 }, r#"{"kind":"set_clock","unix_nanos":-5}"#);
        check(Request::PowerOff, r#"{"kind":"power_off"}"#);
        let proxies = HostProxies::default();
        check(
            Request::Configure { settings: None, proxies: proxies.clone() },
            r#"{"kind":"configure","settings":null}"#,
        );
        let settings = Some(EngineSettings { name: "engine.toml".into(), text: "mtu = 1400".into() });
        check(
            Request::Configure { settings, proxies },
            r#"{"kind":"configure","settings":{"name":"engine.toml","text":"mtu = 1400"}}"#,
        );
        let proxies = HostProxies { https: "http://me:secret@p:3128".into(), ..HostProxies::default() };
        assert!(!format!("{proxies:?}").contains("secret"));
        check(
            Request::Configure { settings: None, proxies },
            r#"{"kind":"configure","settings":null,"proxies":{"http":"","https":"http://me:secret@p:3128","exceptions":""}}"#,
        );
        check(Request::Info, r#"{"kind":"info"}"#);
        check(Request::GrowDisk { size_bytes: 7 }, r#"{"kind":"grow_disk","size_bytes":7}"#);
        check(Request::UseProcessors { count: 2 }, r#"{"kind":"use_processors","count":2}"#);
        check(Response::Disk { total_bytes: 6 }, r#"{"kind":"disk","total_bytes":6}"#);
        check(
            Response::Processors { online: 2, present: 4 },
            r#"{"kind":"processors","online":2,"present":4}"#,
        );
        check(
            Request::Acquire {
                container: "c".into(),
                ports: vec![PortRequest {
                    transport: Transport::Tcp,
                    addresses: vec![Ipv4Addr::UNSPECIFIED.into()],
                    first: 80,
                    last: 80,
                    container_port: 8080,
                }],
            },
            r#"{"kind":"acquire","container":"c","ports":[{"transport":"tcp","addresses":["0.0.0.0"],"first":80,"last":80,"container_port":8080}]}"#,
        );
        check(
            Request::Land {
                container: "c".into(),
                landings: vec![Landing { container_port: 80, at: (Ipv4Addr::LOCALHOST, 9).into() }],
            },
            r#"{"kind":"land","container":"c","landings":[{"container_port":80,"at":"127.0.0.1:9"}]}"#,
        );
        check(Request::Release { container: "c".into() }, r#"{"kind":"release","container":"c"}"#);
        check(Request::Reconcile { leases: Vec::new() }, r#"{"kind":"reconcile","leases":[]}"#);
        check(
            Response::Granted {
                ports: vec![GrantedPort {
                    transport: Transport::Udp,
                    address: Ipv4Addr::LOCALHOST.into(),
                    port: 53,
                    container_port: 5353,
                }],
            },
            r#"{"kind":"granted","ports":[{"transport":"udp","address":"127.0.0.1","port":53,"container_port":5353}]}"#,
        );
        check(
            Request::Locate { sources: vec![BindSource { path: "/home/ana".into(), create: true }] },
            r#"{"kind":"locate","sources":[{"path":"/home/ana","create":true}]}"#,
        );
        check(
            Response::Located {
                places: vec![
                    BindPlace::At { path: "/run/host/home".into() },
                    BindPlace::Missing { path: "/run/host/home/x".into() },
                    BindPlace::Engine,
                    BindPlace::Refused { why: "w".into() },
                ],
            },
            r#"{"kind":"located","places":[{"kind":"at","path":"/run/host/home"},{"kind":"missing","path":"/run/host/home/x"},{"kind":"engine"},{"kind":"refused","why":"w"}]}"#,
        );
        check(Response::Reconciled { lost: Vec::new() }, r#"{"kind":"reconciled","lost":[]}"#);
        check(Response::Done, r#"{"kind":"done"}"#);
        check(
            Response::Info(GuestInfo {
                kernel: "6.12".into(),
                uptime_ms: 1,
                memory_total_bytes: 2,
                memory_available_bytes: 3,
                memory_cached_bytes: 6,
                disk_total_bytes: 4,
                disk_used_bytes: 5,
                engine: EngineState::Ready,
            }),
            r#"{"kind":"info","kernel":"6.12","uptime_ms":1,"memory_total_bytes":2,"memory_available_bytes":3,"memory_cached_bytes":6,"disk_total_bytes":4,"disk_used_bytes":5,"engine":"ready"}"#,
        );
        check(Notice::Engine(EngineState::Starting), r#"{"kind":"engine","value":"starting"}"#);
        check(
            Notice::Engine(EngineState::Failed { reason: "r".into(), retry_in_ms: 200 }),
            r#"{"kind":"engine","value":{"failed":{"reason":"r","retry_in_ms":200}}}"#,
        );
        check(
            Notice::Fault { what: "data disk".into(), reason: "r".into() },
            r#"{"kind":"fault","value":{"what":"data disk","reason":"r"}}"#,
        );
        check(Notice::PoweringOff, r#"{"kind":"powering_off"}"#);
        check(Failure::new(FailureKind::Failed, "m"), r#"{"kind":"failed","message":"m"}"#);
    }

    #[test]
    fn fields_of_a_newer_peer_are_ignored() {
        let request: Request =
            serde_json::from_str(r#"{"kind":"set_clock","unix_nanos":7,"zone":"UTC"}"#).unwrap();
        assert_eq!(request, Request::SetClock { unix_nanos: 7 });
        let failure: Failure = serde_json::from_str(r#"{"kind":"on_fire","message":"m"}"#).unwrap();
        assert_eq!(failure.kind, FailureKind::Unknown);
    }
}
