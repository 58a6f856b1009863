//! The few devices of a PC that a kernel will not do without, and the way to the virtio-mmio slots.
//!
//! Interrupt controllers and the interval timer are the hypervisor's. What is here answers on ports: the serial line,
//! the real-time clock, ACPI's power registers and the reset.

mod clock;
mod power;
mod serial;

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use self::clock::Clock;
use self::power::Power;
use self::serial::Serial;
use super::layout;
use crate::vcpu::{Bus, End};

/// The registers of one virtio-mmio slot, called from any processor's thread.
pub trait Registers: Send + Sync {
    /// Answers a load at this offset.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a store at this offset.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The bus with everything on it.
pub struct Board {
    serial: Mutex<Serial>,
    clock: Mutex<Clock>,
    power: Mutex<Power>,
    slots: Vec<Arc<dyn Registers>>,
}

impl Board {
    /// A board whose serial line writes to `console` and raises `serial_interrupt`, and whose slots are these, in order.
    ///
    /// The console may block; it then holds up the processor that writes.
    pub fn new(
        console: Box<dyn Write + Send>,
        serial_interrupt: EventFd,
        slots: Vec<Arc<dyn Registers>>,
    ) -> Self {
        Self {
            serial: Mutex::new(Serial::new(console, serial_interrupt)),
            clock: Mutex::default(),
            power: Mutex::default(),
            slots,
        }
    }

    fn slot(&self, address: u64) -> Option<(&dyn Registers, u64)> {
        let offset = address.checked_sub(layout::MMIO_START)?;
        let slot = self.slots.get(usize::try_from(offset / layout::MMIO_SLOT_BYTES).ok()?)?;
        Some((slot.as_ref(), offset % layout::MMIO_SLOT_BYTES))
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

const SERIAL_LAST: u16 = layout::SERIAL_PORT + 7;
const CLOCK_LAST: u16 = clock::PORT + 1;
const POWER_LAST: u16 = layout::PM_CONTROL_PORT + 1;

impl Bus for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::SERIAL_PORT..=SERIAL_LAST => {
                data.fill_with(|| lock(&self.serial).read((port - layout::SERIAL_PORT) as u8));
            }
            clock::PORT..=CLOCK_LAST => data.fill_with(|| lock(&self.clock).read(port)),
            layout::PM_EVENT_PORT..=POWER_LAST => {
                lock(&self.power).read(port - layout::PM_EVENT_PORT, data);
            }
            // The keyboard controller: nothing to read, ready for a command.
            layout::RESET_PORT => data.fill(0),
            _ => tracing::trace!(port, "a read from a port that nobody answers"),
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<End> {
        match port {
            layout::SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                data.iter().for_each(|&byte| serial.write((port - layout::SERIAL_PORT) as u8, byte));
            }
            clock::PORT..=CLOCK_LAST => {
                data.iter().for_each(|&byte| lock(&self.clock).write(port, byte));
            }
            layout::PM_EVENT_PORT..=POWER_LAST => {
                return lock(&self.power).write(port - layout::PM_EVENT_PORT, data);
            }
            layout::RESET_PORT if data.contains(&layout::RESET_COMMAND) => return Some(End::Reset),
            _ => tracing::trace!(port, "a write to a port that nobody answers"),
        }
        None
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.write(offset, data),
            None => tracing::trace!(address, "a write to an address that nobody answers"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;

    struct Log(mpsc::Sender<u8>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            bytes.iter().for_each(|&byte| self.0.send(byte).unwrap());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Registers for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            lock(&self.0).push((offset, data.to_vec()));
        }
    }

    fn board() -> (Board, mpsc::Receiver<u8>, Arc<Echo>) {
        let (sender, receiver) = mpsc::channel();
        let echo = Arc::new(Echo(Mutex::default()));
        let board =
            Board::new(Box::new(Log(sender)), EventFd::new(0).unwrap(), vec![echo.clone(), echo.clone()]);
        (board, receiver, echo)
    }

    #[test]
    fn the_serial_line_prints() {
        let (board, output, _) = board();
        assert_eq!(board.port_write(0x3f8, b"o"), None);
        assert_eq!(board.port_write(0x3f8, b"k\n"), None);
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"ok\n");
        let mut status = [0];
        board.port_read(0x3fd, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for the next byte");
    }

    #[test]
    fn slots_get_their_offsets_and_the_rest_is_empty() {
        let (board, _, echo) = board();
        let mut data = [0; 4];
        board.mmio_read(layout::MMIO_START + 0x1010, &mut data);
        assert_eq!(data, [0x10; 4]);
        board.mmio_write(layout::MMIO_START + 0x70, &[1, 0, 0, 0]);
        assert_eq!(*lock(&echo.0), [(0x70, vec![1, 0, 0, 0])]);
        for empty in [layout::MMIO_START - 4, layout::MMIO_START + 0x2000, 0, u64::MAX] {
            board.mmio_read(empty, &mut data);
            assert_eq!(data, [0xff; 4]);
            board.mmio_write(empty, &data);
        }
        assert_eq!(lock(&echo.0).len(), 1);
    }

    #[test]
    fn the_ways_to_end_a_machine() {
        let (board, _, _) = board();
        assert_eq!(board.port_write(layout::RESET_PORT, &[0xd1]), None);
        assert_eq!(board.port_write(layout::RESET_PORT, &[0xfe]), Some(End::Reset));
        let off = (5_u16 << 10 | 1 << 13).to_le_bytes();
        assert_eq!(board.port_write(layout::PM_CONTROL_PORT, &off), Some(End::PoweredOff));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(port: u16, address: u64, write in proptest::collection::vec(any::<u8>(), 1..9)) {
            let (board, _output, _) = board();
            let mut read = vec![0x55; write.len()];
            board.port_read(port, &mut read);
            board.port_write(port, &write);
            board.mmio_read(address, &mut read);
            board.mmio_write(address, &write);
        }
    }
}
