//! The vsock addresses of the product: who listens where.
//!
//! A port names a service, not a direction of data: every connection is a byte stream both ways.

/// The context id of the host, as the vsock specification fixes it.
pub const HOST_CID: u32 = 2;

/// The context id of the guest. One machine has one device, so one number serves every machine.
pub const GUEST_CID: u32 = 3;

/// Guest to host: the control session between the agent and the daemon.
pub const SESSION: u32 = 1024;

/// Guest to host: log lines of the engine and the agent, as plain bytes.
pub const LOG: u32 = 1025;

/// Host to guest: any connection from [`HOST_CID`] means "sync and power off now". The VM process uses it when
/// the daemon, and the session with it, has died.
pub const POWER: u32 = 1027;

/// Host to guest: the Docker API, served by the engine.
pub const API: u32 = 2375;

/// Guest to host: the engine's session, on which it leases what its containers need on the host ([`crate::lease`]).
pub const LEASES: u32 = 1026;

/// Guest to host: changes of shared folders, for the engine to repeat ([`crate::changes`]). Served by the VM process itself.
pub const CHANGES: u32 = 1028;

/// Host to guest: connections to published ports, served by the engine. Each begins with a [`crate::forward::Header`].
pub const FORWARD: u32 = 2376;
