//! Linux's KVM. Every KVM ioctl of the product is in this folder.
//!
//! [`Machine`] is a machine that has everything but running processors. What differs between architectures (interrupt
//! controllers, what processors start with, the probe's guest) is in a folder for each, with the same names.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod growth;
mod kick;
mod machine;
pub mod probe;
mod vcpu;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as sys;
#[cfg(target_arch = "x86_64")]
use x86_64 as sys;

pub use growth::{GrowError, Growth};
pub use machine::{Console, Machine, Running, Slot, Spec};

use std::io;

/// Why KVM does not give us a machine.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the sentences are the documentation")]
pub enum Error {
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    #[error("this kernel's KVM lacks {what}")]
    Lacks { what: &'static str },
    #[error("KVM cannot {step}")]
    Setup {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("KVM cannot set up processor {index}: {step}")]
    Vcpu {
        index: u32,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[cfg(target_arch = "x86_64")]
    #[error("KVM accepted only {accepted} of {count} start registers (MSRs) of processor {index}")]
    StartRegisters { index: u32, accepted: usize, count: usize },
    #[error("a machine has room for {limit} virtio devices, not {count}")]
    TooManyDevices { count: usize, limit: usize },
    #[error("cannot open the {what} `{path}`")]
    File {
        what: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot load the kernel")]
    Boot(#[from] crate::arch::boot::BootError),
}

/// What the kernel said, with what we wanted of it.
fn setup(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Setup { step, source: os_error(error) }
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
