//! The serial line: a PL011 whose output is the guest's console (Arm DDI 0183, "PrimeCell UART"). Nothing is ever typed on
//! it, and every byte is sent at once: the transmit FIFO is always empty.

use std::io::Write;

use vmm_sys_util::eventfd::EventFd;

/// Registers (DDI 0183 table 3-1).
const DATA: u64 = 0x00;
const FLAGS: u64 = 0x18;
/// The first and the last of those that hold what was written: divisors, line control, control, FIFO levels.
const FIRST_KEPT: u64 = 0x20;
const LAST_KEPT: u64 = 0x34;
const MASK: u64 = 0x38;
const RAW_STATUS: u64 = 0x3c;
const MASKED_STATUS: u64 = 0x40;
const CLEAR: u64 = 0x44;
/// The peripheral's and the PrimeCell's identity, a byte in each register, by which a kernel finds the driver.
const IDENTITY_START: u64 = 0xfe0;
const IDENTITY: [u32; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// Nothing is to be sent, nothing was received.
const FLAGS_IDLE: u32 = 1 << 7 | 1 << 4;
/// The transmit interrupt.
const TRANSMITTED: u32 = 1 << 5;
/// All interrupts.
const INTERRUPTS: u32 = 0x7ff;
/// Of the control register after a reset: both directions on.
const CONTROL_RESET: u32 = 0x300;
const CONTROL: usize = 4;

/// The line.
pub(super) struct Serial {
    console: Box<dyn Write + Send>,
    interrupt: EventFd,
    kept: [u32; 6],
    mask: u32,
    status: u32,
}

impl Serial {
    pub(super) fn new(console: Box<dyn Write + Send>, interrupt: EventFd) -> Self {
        let mut kept = [0; 6];
        kept[CONTROL] = CONTROL_RESET;
        Self { console, interrupt, kept, mask: 0, status: 0 }
    }

    /// Answers a load; registers are 32 bits, and what is wider reads as zero above.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            FLAGS => FLAGS_IDLE,
            MASK => self.mask,
            RAW_STATUS => self.status,
            MASKED_STATUS => self.status & self.mask,
            FIRST_KEPT..=LAST_KEPT => self.kept[kept_index(offset)],
            IDENTITY_START.. => IDENTITY.get(((offset - IDENTITY_START) / 4) as usize).copied().unwrap_or(0),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, part)| *byte = part);
    }

    /// Takes a store.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let value = data.iter().take(4).rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte));
        match offset {
            DATA => {
                self.send(value as u8);
                self.status |= TRANSMITTED;
                self.interrupt();
            }
            MASK => {
                self.mask = value & INTERRUPTS;
                self.interrupt();
            }
            CLEAR => self.status &= !value,
            FIRST_KEPT..=LAST_KEPT => self.kept[kept_index(offset)] = value,
            _ => tracing::trace!(offset, "a write to a register that the serial line does not have"),
        }
    }

    fn send(&mut self, byte: u8) {
        // A console that has gone is not worth a line per byte.
        if let Err(error) = self.console.write_all(&[byte]) {
            tracing::trace!(%error, "the serial line lost a byte");
        }
    }

    /// Tells the guest about what it wants to know of. Its interrupt is edge-triggered: one that is told twice comes at
    /// most once more, and finds nothing to do.
    fn interrupt(&self) {
        if self.status & self.mask != 0
            && let Err(error) = self.interrupt.write(1)
        {
            tracing::error!(%error, "the serial line cannot interrupt");
        }
    }
}

fn kept_index(offset: u64) -> usize {
    ((offset - FIRST_KEPT) / 4) as usize
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn line() -> (Serial, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (Serial::new(Box::new(std::io::sink()), interrupt.try_clone().unwrap()), interrupt)
    }

    fn read(serial: &Serial, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        serial.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_kernel_finds_its_driver() {
        let (serial, _interrupt) = line();
        let id = |start: u64| (0..4).fold(0, |sum, byte| sum | read(&serial, start + 4 * byte) << (8 * byte));
        assert_eq!(id(0xfe0), 0x0014_1011);
        assert_eq!(id(0xff0), 0xb105_f00d);
    }

    #[test]
    fn what_was_sent_interrupts_who_wants_to_know() {
        let (mut serial, interrupt) = line();
        serial.write(DATA, b"a");
        assert!(interrupt.read().is_err(), "masked");
        assert_eq!((read(&serial, RAW_STATUS), read(&serial, MASKED_STATUS)), (TRANSMITTED, 0));
        serial.write(MASK, &TRANSMITTED.to_le_bytes());
        assert_eq!((interrupt.read().unwrap(), read(&serial, MASKED_STATUS)), (1, TRANSMITTED));
        serial.write(CLEAR, &TRANSMITTED.to_le_bytes());
        assert_eq!(read(&serial, RAW_STATUS), 0);
        serial.write(DATA, b"b");
        assert_eq!(interrupt.read().unwrap(), 1);
    }

    #[test]
    fn settings_are_kept_and_odd_widths_answered() {
        let (mut serial, _interrupt) = line();
        assert_eq!(read(&serial, 0x30), 0x300);
        serial.write(0x30, &0x301_u16.to_le_bytes());
        serial.write(0x2c, &[0x70]);
        assert_eq!((read(&serial, 0x30), read(&serial, 0x2c)), (0x301, 0x70));
        let mut wide = [0xff; 8];
        serial.read(0x30, &mut wide);
        assert_eq!(wide, [1, 3, 0, 0, 0, 0, 0, 0]);
        serial.write(0x30, &[0xff; 8]);
        assert_eq!(read(&serial, 0x30), u32::MAX);
        assert_eq!((read(&serial, 0x48), read(&serial, 0xffc)), (0, 0xb1));
    }
}
