//! Machines: a [`MachineSpec`] in, a running virtual machine out, and the process that holds one.
//!
//! Owns: what a machine is made of ([`spec`]), which back end runs it ([`choose_backend`]), how devices, their back
//! ends and the hypervisor are wired together (`attach`, one file per device), a machine's life ([`machine`]), its
//! disk file and console log, and the `engine-vmm` program ([`program`]) with the conversation it has with the daemon
//! ([`control`]). Does not own: device models (host-devices), the NAT (host-net), guest execution (host-hypervisor),
//! or any decision when a machine should run (the daemon).
//!
//! Everything here is threads and blocking calls; nothing in this crate forks but to start QEMU.
#![forbid(unsafe_code)]

mod attach;
pub mod backend;
pub mod confine;
pub mod console;
pub mod control;
pub mod disk;
pub mod machine;
pub mod program;
pub mod spec;

pub use backend::{Accelerator, Backend, BackendError, choose_backend};
pub use control::{Channel, Command, Event, StopReason, Usage};
/// What every kernel is told before what a spec adds.
pub use host_hypervisor::arch::native::boot::CMDLINE;
pub use spec::{BackendChoice, DiskSpec, MachineSpec, NetworkSpec, ShareSpec};
