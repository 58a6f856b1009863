//! The serial line: a 16550 whose output is the guest's console. Nothing is ever typed on it.

use std::io::Write;

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

/// The line, by register.
pub(super) struct Serial(vm_superio::Serial<Interrupt, NoEvents, Box<dyn Write + Send>>);

/// The serial line's interrupt.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

impl Serial {
    pub(super) fn new(console: Box<dyn Write + Send>, interrupt: EventFd) -> Self {
        Self(vm_superio::Serial::new(Interrupt(interrupt), console))
    }

    pub(super) fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    pub(super) fn write(&mut self, register: u8, value: u8) {
        // A console that has gone, or loops of a driver that tests the line: neither is worth a line per byte.
        if let Err(error) = self.0.write(register, value) {
            tracing::trace!(?error, register, "the serial line lost a byte");
        }
    }
}
