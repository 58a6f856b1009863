//! The virtio-mmio slots of a board: pages of registers, one behind the other, each with an interrupt.

use std::sync::Arc;

/// Size of a slot in bytes, of which the registers take a part.
pub const SLOT_BYTES: u64 = 0x1000;
/// The offset of `QueueNotify` in a slot (virtio 1.3 §4.2.2).
pub const QUEUE_NOTIFY: u64 = 0x50;

/// The registers of one virtio-mmio slot, called from any processor's thread.
pub trait Registers: Send + Sync {
    /// Answers a load at this offset.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a store at this offset.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A virtio-mmio slot: its registers and its interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Guest physical address of its registers.
    pub address: u64,
    /// Its interrupt, edge-triggered, as the hypervisor counts them: a pin of the I/O APIC, or a shared peripheral
    /// interrupt (SPI) of the GIC from 0.
    pub gsi: u32,
}

/// What is in a board's slots, in order.
pub(crate) struct Slots {
    start: u64,
    registers: Vec<Arc<dyn Registers>>,
}

impl Slots {
    /// Slots from this address on.
    pub(crate) fn new(start: u64, registers: Vec<Arc<dyn Registers>>) -> Self {
        Self { start, registers }
    }

    /// Answers a load; what nobody answers reads as all ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((slot, offset)) => slot.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Takes a store.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((slot, offset)) => slot.write(offset, data),
            None => tracing::trace!(address, "a write to an address that nobody answers"),
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn Registers, u64)> {
        let offset = address.checked_sub(self.start)?;
        let slot = self.registers.get(usize::try_from(offset / SLOT_BYTES).ok()?)?;
        Some((slot.as_ref(), offset % SLOT_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Registers for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn slots_get_their_offsets_and_the_rest_is_empty() {
        const START: u64 = 0x1000_0000;
        let echo = Arc::new(Echo::default());
        let slots = Slots::new(START, vec![echo.clone(), echo.clone()]);
        let mut data = [0; 4];
        slots.read(START + 0x1010, &mut data);
        assert_eq!(data, [0x10; 4]);
        slots.write(START + 0x70, &[1, 0, 0, 0]);
        assert_eq!(*echo.0.lock().unwrap(), [(0x70, vec![1, 0, 0, 0])]);
        for empty in [START - 4, START + 0x2000, 0, u64::MAX] {
            slots.read(empty, &mut data);
            assert_eq!(data, [0xff; 4]);
            slots.write(empty, &data);
        }
        assert_eq!(echo.0.lock().unwrap().len(), 1);
    }
}
