//! Which program and which accelerator run a machine, and why.

use std::path::PathBuf;

use host_hypervisor::kvm::probe::{self, Usability};
use host_hypervisor::qemu;

pub use host_hypervisor::Accelerator;

use crate::spec::BackendChoice;

/// A choice, with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// What runs the machine.
    pub provider: Provider,
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// Why, as a sentence.
    pub reason: String,
}

/// What runs a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provider {
    /// This process, on KVM.
    InProcess,
    /// This program, which is a QEMU.
    Qemu(PathBuf),
}

impl Backend {
    /// The provider's name: `kvm` or `qemu`.
    pub fn name(&self) -> &'static str {
        match self.provider {
            Provider::InProcess => "kvm",
            Provider::Qemu(_) => "qemu",
        }
    }

    /// The provider's name in sentences.
    pub(crate) fn title(&self) -> &'static str {
        match self.provider {
            Provider::InProcess => "the virtual machine",
            Provider::Qemu(_) => "QEMU",
        }
    }
}

/// No back end can run a machine here.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// KVM was asked for and does not work.
    #[error("KVM was asked for, but is not usable: {reason}")]
    KvmUnusable {
        /// The probe's reason.
        reason: String,
    },
    /// Only KVM runs machines of this architecture.
    #[error("only KVM runs machines on {}, and it does not run one here: {reason}", std::env::consts::ARCH)]
    OnlyKvm {
        /// Why it does not.
        reason: String,
    },
    /// There is no QEMU.
    #[error(transparent)]
    NotInstalled(#[from] qemu::NotInstalled),
}

/// Decides what would run a machine on this host now. Blocks while KVM is probed (up to a second; see the probe).
pub fn choose_backend(choice: BackendChoice) -> Result<Backend, BackendError> {
    let usability = match choice {
        BackendChoice::Qemu => None,
        BackendChoice::Auto | BackendChoice::Kvm => Some(probe::probe()),
    };
    let (accelerator, reason) = decide(choice, usability)?;
    let provider = match accelerator {
        Accelerator::Kvm => Provider::InProcess,
        Accelerator::Tcg if !qemu::SUPPORTED => return Err(BackendError::OnlyKvm { reason }),
        Accelerator::Tcg => Provider::Qemu(qemu::find()?),
    };
    Ok(Backend { provider, accelerator, reason })
}

/// The decision itself; `usability` is what the probe said, if it was asked.
fn decide(
    choice: BackendChoice,
    usability: Option<Usability>,
) -> Result<(Accelerator, String), BackendError> {
    match (choice, usability) {
        (BackendChoice::Qemu, _) | (_, None) => {
            Ok((Accelerator::Tcg, "QEMU's software processor was asked for".into()))
        }
        (_, Some(Usability::Usable)) => Ok((Accelerator::Kvm, "KVM ran a test guest at full speed".into())),
        (BackendChoice::Kvm, Some(Usability::Unusable { reason })) => {
            Err(BackendError::KvmUnusable { reason })
        }
        (BackendChoice::Auto, Some(Usability::Unusable { reason })) => Ok((Accelerator::Tcg, reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unusable() -> Option<Usability> {
        Some(Usability::Unusable { reason: "there is no /dev/kvm".into() })
    }

    #[test]
    fn auto_takes_kvm_only_where_it_works() {
        let (accelerator, _) = decide(BackendChoice::Auto, Some(Usability::Usable)).unwrap();
        assert_eq!(accelerator, Accelerator::Kvm);
        let (accelerator, reason) = decide(BackendChoice::Auto, unusable()).unwrap();
        assert_eq!((accelerator, reason.as_str()), (Accelerator::Tcg, "there is no /dev/kvm"));
    }

    #[test]
    fn insisting_on_kvm_fails_with_the_reason() {
        let error = decide(BackendChoice::Kvm, unusable()).unwrap_err().to_string();
        assert_eq!(error, "KVM was asked for, but is not usable: there is no /dev/kvm");
        assert_eq!(decide(BackendChoice::Kvm, Some(Usability::Usable)).unwrap().0, Accelerator::Kvm);
    }

    #[test]
    fn the_software_processor_needs_no_probe() {
        assert_eq!(decide(BackendChoice::Qemu, None).unwrap().0, Accelerator::Tcg);
    }
}
