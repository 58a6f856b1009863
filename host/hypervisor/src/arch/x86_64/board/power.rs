//! ACPI's PM1a registers (ACPI 6.5 §4.8.3): status and enable, which nothing here sets, and control, which powers off.

use super::super::acpi::SLEEP_TYPE_OFF;
use crate::vcpu::End;

const STATUS: usize = 0;
const CONTROL: usize = 4;
/// "The machine is in ACPI mode": bit 0 of the control register, always.
const ACPI_MODE: u8 = 1;

/// The registers as bytes: status, enable, control, two each.
#[derive(Default)]
pub(super) struct Power([u8; 6]);

impl Power {
    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let register = usize::from(offset) + index;
            *byte = match register {
                CONTROL => self.0[CONTROL] | ACPI_MODE,
                _ => self.0.get(register).copied().unwrap_or(0xff),
            };
        }
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) -> Option<End> {
        for (index, &byte) in data.iter().enumerate() {
            match usize::from(offset) + index {
                // Writing ones clears, and there is never anything to clear.
                STATUS | 1 => {}
                register => {
                    if let Some(place) = self.0.get_mut(register) {
                        *place = byte;
                    }
                }
            }
        }
        let control = u16::from_le_bytes([self.0[CONTROL], self.0[CONTROL + 1]]);
        let (sleep, kind) = (control >> 13 & 1, control >> 10 & 0b111);
        // The sleep bit is write-only.
        self.0[CONTROL + 1] &= !(1 << 5);
        (sleep == 1 && kind == SLEEP_TYPE_OFF).then_some(End::PoweredOff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_announced_sleep_type_powers_off() {
        let mut power = Power::default();
        assert_eq!(power.write(4, &[0, 5 << 2]), None, "no sleep bit");
        assert_eq!(power.write(4, &[0, 1 << 5 | 3 << 2]), None, "another type");
        assert_eq!(power.write(5, &[1 << 5 | 5 << 2]), Some(End::PoweredOff));
        assert_eq!(power.write(2, &[0xff, 0xff]), None);
    }

    #[test]
    fn enables_are_kept_and_status_stays_clear() {
        let mut power = Power::default();
        assert_eq!(power.write(0, &[0xff, 0xff, 0x21, 0x03]), None);
        let mut registers = [0xaa; 6];
        power.read(0, &mut registers);
        assert_eq!(registers, [0, 0, 0x21, 0x03, ACPI_MODE, 0]);
        let mut beyond = [0; 2];
        power.read(5, &mut beyond);
        assert_eq!(beyond, [0, 0xff]);
    }
}
