//! Docker's default profile: what a container gets when nobody asks for anything else.
//!
//! Capabilities, masked and read-only paths, mounts, device rules and the seccomp filter are moby's (`oci/defaults.go`,
//! `profiles/seccomp`), written down here as OCI types. Limits are clamped to what this process may grant.

mod limit;
mod mount;
pub mod seccomp;

mod capability;
mod device;

pub use capability::{
    all as all_capabilities, capabilities, clamp as clamp_capabilities, grantable, number, sets,
};
pub use device::{device_rules, devices, privileged_device_rules};
pub use limit::{clamp_oom_score_adjust, clamp_rlimits, resource};
pub use mount::{SHM_SIZE_BYTES, masked_paths, mounts, privileged_mounts, readonly_paths};
pub use seccomp::profile as seccomp_profile;
