//! The serial line, and the way to the virtio-mmio slots.
//!
//! Interrupt controller, timer and what turns processors and the machine on and off are the hypervisor's.

mod serial;

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use self::serial::Serial;
use super::layout;
use crate::arch::slots::{Registers, Slots};
use crate::vcpu::Bus;

/// The bus with everything on it.
pub struct Board {
    serial: Mutex<Serial>,
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
            slots: Slots::new(layout::MMIO_START, slots),
        }
    }
}

/// The offset in the serial line's registers.
fn serial_offset(address: u64) -> Option<u64> {
    address.checked_sub(layout::SERIAL).filter(|&offset| offset < layout::SERIAL_BYTES)
}

impl Bus for Board {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match serial_offset(address) {
            Some(offset) => self.serial.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => self.slots.read(address, data),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        match serial_offset(address) {
            Some(offset) => self.serial.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data),
            None => self.slots.write(address, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

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
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (Board::new(Box::new(Log(sender)), interrupt, Vec::new()), receiver)
    }

    #[test]
    fn the_serial_line_prints() {
        let (board, output) = board();
        board.mmio_write(layout::SERIAL, &u32::from(b'o').to_le_bytes());
        board.mmio_write(layout::SERIAL, b"k");
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"ok");
        let mut flags = [0xff; 4];
        board.mmio_read(layout::SERIAL + 0x18, &mut flags);
        assert_eq!(flags, [0x90, 0, 0, 0], "ready for the next byte, and none came");
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            address in prop_oneof![any::<u64>(), layout::SERIAL..layout::SERIAL + 0x2000],
            write in proptest::collection::vec(any::<u8>(), 1..9),
        ) {
            let (board, _output) = board();
            let mut read = vec![0x55; write.len()];
            board.mmio_read(address, &mut read);
            board.mmio_write(address, &write);
        }
    }
}
