//! The interrupt of a device: what it is about, and the eventfd that raises it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::Interrupt;

/// Bits of the interrupt status (virtio 1.3 §4.2.2): buffers were used.
pub(super) const USED: u32 = 1;
/// Configuration space has changed, or the device needs a reset.
pub(super) const CONFIG_CHANGED: u32 = 2;

/// Shared by the registers and every running queue.
///
/// The driver acknowledges before it looks at the queues, so what a model has used before it sets its bit is seen
/// either after this interrupt or after the next.
pub(super) struct Line {
    event: EventFd,
    pending: AtomicU32,
    needs_reset: AtomicBool,
}

impl Line {
    pub fn new(event: EventFd) -> Self {
        Self { event, pending: AtomicU32::new(0), needs_reset: AtomicBool::new(false) }
    }

    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    pub fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    pub fn raise(&self, bits: u32) -> io::Result<()> {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        self.event.write(1)
    }

    pub fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Notes that the device is broken, and tells nobody.
    pub fn mark_broken(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }

    /// Back to the beginning. No queue runs.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.pending.store(0, Ordering::SeqCst);
    }
}

impl Interrupt for Line {
    fn signal_used(&self) -> io::Result<()> {
        self.raise(USED)
    }

    fn signal_config(&self) -> io::Result<()> {
        self.raise(CONFIG_CHANGED)
    }

    fn needs_reset(&self) {
        self.mark_broken();
        // The status says it whether or not the driver is interrupted.
        let _untold = self.raise(CONFIG_CHANGED);
    }
}
