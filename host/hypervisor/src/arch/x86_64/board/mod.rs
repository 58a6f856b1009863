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
use crate::arch::slots::{Registers, Slots};
use crate::vcpu::{Bus, End};

/// The bus with everything on it.
pub struct Board {
    serial: Mutex<Serial>,
    clock: Mutex<Clock>,
    power: Mutex<Power>,
    slots: Slots,
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
            slots: Slots::new(layout::MMIO_START, slots),
        }
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
        self.slots.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.slots.write(address, data);
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

    fn board() -> (Board, mpsc::Receiver<u8>) {
        let (sender, receiver) = mpsc::channel();
        (Board::new(Box::new(Log(sender)), EventFd::new(0).unwrap(), Vec::new()), receiver)
    }

    #[test]
    fn the_serial_line_prints() {
        let (board, output) = board();
        assert_eq!(board.port_write(0x3f8, b"o"), None);
        assert_eq!(board.port_write(0x3f8, b"k\n"), None);
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"ok\n");
        let mut status = [0];
        board.port_read(0x3fd, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for the next byte");
    }

    #[test]
    fn the_ways_to_end_a_machine() {
        let (board, _output) = board();
        assert_eq!(board.port_write(layout::RESET_PORT, &[0xd1]), None);
        assert_eq!(board.port_write(layout::RESET_PORT, &[0xfe]), Some(End::Reset));
        let off = (5_u16 << 10 | 1 << 13).to_le_bytes();
        assert_eq!(board.port_write(layout::PM_CONTROL_PORT, &off), Some(End::PoweredOff));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(port: u16, address: u64, write in proptest::collection::vec(any::<u8>(), 1..9)) {
            let (board, _output) = board();
            let mut read = vec![0x55; write.len()];
            board.port_read(port, &mut read);
            board.port_write(port, &write);
            board.mmio_read(address, &mut read);
            board.mmio_write(address, &write);
        }
    }
}
