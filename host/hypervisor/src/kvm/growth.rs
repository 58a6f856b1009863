//! More RAM for a machine that may be running.

use std::io;
use std::sync::{Arc, PoisonError};

use kvm_ioctls::VmFd;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::Error;
use super::machine::map_region;
use crate::memory::{MemoryError, Ram};
use crate::reserve::Reserve;

/// Lets the guest and its devices reach RAM that was set aside.
#[derive(Debug)]
pub struct Growth {
    vm: Arc<VmFd>,
    ram: Ram,
    reserve: Reserve,
}

/// Why a machine has no more RAM than before.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The host has no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM does not take it.
    #[error(transparent)]
    Kvm(#[from] Error),
    /// It lies where something else is.
    #[error("the machine's memory cannot have another part")]
    Place(#[source] io::Error),
}

impl Growth {
    pub(super) fn new(vm: Arc<VmFd>, ram: Ram, reserve: Reserve) -> Self {
        Self { vm, ram, reserve }
    }

    /// Lets the guest reach the first `bytes` of the reserve, rounded up to what its kernel adds at once, and never less
    /// than before. Returns what it reaches.
    pub fn grant(&mut self, bytes: u64) -> Result<u64, GrowError> {
        let Some(region) = self.reserve.next(bytes)? else { return Ok(self.reserve.granted()) };
        let region = Arc::new(region);
        // From here on nobody else adds to the RAM, and so takes the same slot.
        let ram = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.ram.memory();
        let larger = now
            .insert_region(Arc::clone(&region))
            .map_err(|error| GrowError::Place(io::Error::other(error)))?;
        // SAFETY: the range is one whole mapping, which the machine's RAM owns from the next line on for good: nothing is
        // ever taken out of it, and `Running` keeps it until the processors have ended.
        unsafe { map_region(&self.vm, now.num_regions(), &region) }?;
        ram.replace(larger);
        self.reserve.grant(bytes);
        Ok(self.reserve.granted())
    }
}
