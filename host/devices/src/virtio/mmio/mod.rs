//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2): a device model behind a window of registers.
//!
//! Owns: the registers, feature negotiation, queue addresses, interrupt status. Does not own: where the window lies, how
//! an access reaches it, or what the interrupt's eventfd is wired to (an irqfd, edge-triggered: every signal is a
//! write). Reads and writes may come from any virtual CPU's thread at the same time.
//!
//! ```text
//! status  0 ─ ACKNOWLEDGE ─ DRIVER ─ FEATURES_OK ─ DRIVER_OK      ready queues run from DRIVER_OK on
//!         ▲                          │ refused: the bit stays clear when a feature was taken that is not offered,
//!         │                          ▼          or VERSION_1 was not
//!         └── write of 0, from everywhere; the only way out of FAILED (the driver's) and DEVICE_NEEDS_RESET (ours)
//! ```
//!
//! Bits of the status are only ever added by the driver. Control registers answer 32-bit aligned accesses; any other
//! reads as zero and is not written, and so does a register that is not there or not for this direction. What comes
//! too late (features after FEATURES_OK, addresses of a ready queue) is ignored. A queue that cannot be started sets
//! DEVICE_NEEDS_RESET.
//!
//! A device that is saved is paused for it: its queues are stopped as for a reset, and where they were is kept.
//!
//! Files: `registers` is the machine behind the window, `line` the interrupt, `saved` what a saved machine keeps.

mod line;
mod registers;
mod saved;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::saved::{RestoreError, SaveError, SavedQueue, SavedTransport};

use self::line::Line;
use self::registers::{CONFIG, INTERRUPT_ACK, INTERRUPT_STATUS, QUEUE_NOTIFY, Registers};
use crate::virtio::device::{DeviceKind, Memory, VirtioDevice};

/// How much address space the registers take: the control registers, and configuration spaces of any size we have.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Where in the window a driver writes the index of a queue with new buffers, for an ioeventfd per queue.
pub const NOTIFY_OFFSET: u64 = QUEUE_NOTIFY;

/// A device model in a window of registers.
pub struct MmioDevice {
    kind: DeviceKind,
    registers: Mutex<Registers>,
    line: Arc<Line>,
    kicks: Arc<[EventFd]>,
}

impl MmioDevice {
    /// Puts `device` behind registers. `interrupt` is written whenever the driver is to be interrupted.
    ///
    /// Fails when the host has no descriptors left for the queues' kicks.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, interrupt: EventFd) -> io::Result<Self> {
        let kind = device.kind();
        let kicks: Arc<[EventFd]> =
            device.queue_sizes().iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        let line = Arc::new(Line::new(interrupt));
        let registers = Registers::new(device, memory, Arc::clone(&line), Arc::clone(&kicks));
        Ok(Self { kind, registers: Mutex::new(registers), line, kicks })
    }

    /// The same as [`Self::new`], going on where the device of a saved machine was. Guest memory has been restored. The state
    /// may be anybody's. The driver is told to read configuration space again: what it leads to may be other than it was.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: EventFd,
        saved: &SavedTransport,
    ) -> Result<Self, RestoreError> {
        let this = Self::new(device, memory, interrupt).map_err(RestoreError::Kick)?;
        this.registers().restore(saved)?;
        Ok(this)
    }

    /// What the device is.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// The kicks, one per queue: each is to be written when the driver writes the queue's index, 32 bits wide, to
    /// [`NOTIFY_OFFSET`]. Such a write that comes to [`Self::write`] does the same.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Answers a driver's read at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.registers().read_config(offset, data);
        }
        data.fill(0);
        if let (Ok(word), true) = (<&mut [u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            let value = match offset {
                // Without the lock: read for every interrupt.
                INTERRUPT_STATUS => self.line.pending(),
                _ => self.registers().read(offset),
            };
            *word = value.to_le_bytes();
        }
    }

    /// Carries out a driver's write at `offset` of the window.
    ///
    /// Returns when it has taken effect: after a reset, or the stop of a queue, the device touches no buffer any more.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.registers().write_config(offset, data);
        }
        if let (Ok(word), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            let value = u32::from_le_bytes(word);
            match offset {
                INTERRUPT_ACK => self.line.acknowledge(value),
                QUEUE_NOTIFY => self.kick(value),
                _ => self.registers().write(offset, value),
            }
        }
    }

    /// Pauses the device and tells what a saved machine keeps of it. No virtual CPU may run from before that until
    /// [`Self::resume`].
    ///
    /// When it returns, all requests that the device had taken are done and handed back, or will be taken again, and the
    /// device touches guest memory no more: with every device paused, memory can be saved. After an error the device
    /// goes on.
    pub fn save(&self) -> Result<SavedTransport, SaveError> {
        self.registers().save()
    }

    /// Lets a device go on that [`Self::save`] has paused; harmless if it was not.
    pub fn resume(&self) {
        self.registers().resume();
    }

    fn kick(&self, queue: u32) {
        if let Some(kick) = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue)) {
            // Fails only when the counter is full, and then the device has a kick to see anyway.
            let _full = kick.write(1);
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
