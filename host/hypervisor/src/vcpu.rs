//! What a hypervisor's processor is to the rest: it runs until something outside of it is needed.
//!
//! [`Vcpu`] is what a back end implements; [`Bus`] is what answers the guest's accesses; [`threads`](crate::threads)
//! joins the two.

use std::io;

/// A virtual processor. It is run by one thread, which calls [`prepare`](Self::prepare) first.
pub trait Vcpu: Send + 'static {
    /// Makes the processor interruptible on the calling thread, which is the one that will run it.
    fn prepare(&mut self) -> io::Result<Box<dyn Kick>>;

    /// Runs guest code until it needs something.
    fn run(&mut self) -> Exit<'_>;

    /// Tells the guest's clock that time has passed while the processor was held.
    fn resumed(&mut self);

    /// Where the processor is, as a phrase for a failure message.
    fn describe(&mut self) -> String;
}

/// Interrupts a processor from another thread.
pub trait Kick: Send {
    /// Makes [`Vcpu::run`] return [`Exit::Kicked`] soon, even if it is only about to be called.
    fn kick(&self);
}

/// Why a processor stopped running. Reads are answered by filling the slice before it runs again.
#[derive(Debug)]
pub enum Exit<'a> {
    /// It was interrupted from outside.
    Kicked,
    /// `in`.
    PortRead(u16, &'a mut [u8]),
    /// `out`; the bytes of a repeated instruction come at once.
    PortWrite(u16, &'a [u8]),
    /// A load from an address without memory.
    MmioRead(u64, &'a mut [u8]),
    /// A store to an address without memory.
    MmioWrite(u64, &'a [u8]),
    /// The guest asks for a reset, or has died in a way that resets a real machine (triple fault).
    Reset,
    /// The guest asks for power-off.
    PowerOff,
    /// The processor cannot go on.
    Failed(String),
}

/// Answers the accesses of all processors, from all their threads.
///
/// What nobody answers reads as all ones, as on a PC's bus.
pub trait Bus: Send + Sync {
    /// Answers `in`, an instruction of x86 only.
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Takes `out`, an instruction of x86 only, which may end the machine.
    fn port_write(&self, _port: u16, _data: &[u8]) -> Option<End> {
        None
    }

    /// Answers a load.
    fn mmio_read(&self, address: u64, data: &mut [u8]);

    /// Takes a store.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself.
    Reset,
    /// It was stopped from outside.
    Stopped,
    /// A processor could not go on, for this reason.
    Failed(String),
}
