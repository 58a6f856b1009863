//! What depends on the guest's processor architecture but not on the hypervisor: where things lie in guest memory, how
//! a kernel is loaded and told about its machine, and the few devices of the board.
//!
//! Every architecture has the same four: `layout`, `boot`, `board`, and what describes the machine to the kernel (`acpi`
//! or `device_tree`). A guest's architecture is its host's: [`native`].

pub mod aarch64;
pub mod boot;
pub mod slots;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

/// The architecture of this host, and thus of its guests.
#[cfg(target_arch = "aarch64")]
pub use aarch64 as native;
/// The architecture of this host, and thus of its guests.
#[cfg(target_arch = "x86_64")]
pub use x86_64 as native;
