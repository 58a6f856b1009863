//! What executes a guest's instructions, and the only room that talks to it.
//!
//! Owns: machines on KVM ([`kvm`]) with their memory, boot and board ([`memory`], [`arch`]) and the threads of their
//! processors ([`threads`]); finding out whether this host's KVM really runs guest code ([`kvm::probe`]); and QEMU as a
//! provider of processors and memory ([`qemu`]). Does not own virtio device models (host-devices) or the decision which
//! back end a machine gets (host-vmm).
//!
//! Unsafe code lives here because ioctls, fork hooks and inherited descriptors do; each block says why it is sound.

#![warn(missing_docs)]

pub mod arch;
pub mod kvm;
pub mod memory;
pub mod process;
pub mod qemu;
pub mod reserve;
pub mod threads;
pub mod vcpu;

use serde::{Deserialize, Serialize};

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor itself, through the kernel's KVM.
    Kvm,
    /// QEMU's software processor.
    Tcg,
}

impl Accelerator {
    /// The name QEMU and people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}
