//! The real-time clock (MC146818) at ports 0x70 and 0x71.
//!
//! Linux gets its time from the hypervisor. But a kernel that finds no answer here asks tens of thousands of times.

use std::time::SystemTime;

/// The index port; the data port follows.
pub(super) const PORT: u16 = 0x70;
const REGISTERS: usize = 128;
const SECONDS_PER_DAY: u64 = 86_400;

/// Index and the registers that hold what was written.
pub(super) struct Clock {
    index: u8,
    memory: [u8; REGISTERS],
}

impl Default for Clock {
    fn default() -> Self {
        Self { index: 0, memory: [0; REGISTERS] }
    }
}

impl Clock {
    pub(super) fn write(&mut self, port: u16, value: u8) {
        if port == PORT {
            // The topmost bit masks the NMI.
            self.index = value & 0x7f;
        } else {
            self.memory[usize::from(self.index)] = value;
        }
    }

    pub(super) fn read(&self, port: u16) -> u8 {
        if port == PORT {
            return 0xff;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.register(now.as_secs())
    }

    /// The selected register at a moment of UTC.
    fn register(&self, seconds: u64) -> u8 {
        let (year, month, day) = date(seconds / SECONDS_PER_DAY);
        let value = match self.index {
            0x00 => seconds % 60,
            0x02 => seconds / 60 % 60,
            0x04 => seconds / 3600 % 24,
            // 1 January 1970 was a Thursday; Sunday is 1.
            0x06 => (seconds / SECONDS_PER_DAY + 4) % 7 + 1,
            0x07 => day,
            0x08 => month,
            0x09 => year % 100,
            0x32 => year / 100,
            // No update in progress, the usual divider.
            0x0a => return 0x26,
            // 24 hours, binary-coded decimals.
            0x0b => return 0x02,
            0x0c => return 0,
            // The battery is good.
            0x0d => return 0x80,
            other => return self.memory[usize::from(other)],
        };
        (value / 10 * 16 + value % 10) as u8
    }
}

/// Year, month and day of a number of days since 1970 in the Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64) {
    // Counted from 1 March of year 0, so that the leap day is a year's last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: u64) -> [u8; 8] {
        let mut clock = Clock::default();
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| {
            clock.write(PORT, index | 0x80);
            clock.register(seconds)
        })
    }

    #[test]
    fn moments_read_as_decimals() {
        assert_eq!(time(0), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
        // Tuesday, 29 February 2000, 23:59:58.
        assert_eq!(time(951_868_798), [0x20, 0, 2, 0x29, 3, 0x23, 0x59, 0x58]);
        // Sunday, 31 December 2028, 12:34:56.
        assert_eq!(time(1_861_878_896), [0x20, 0x28, 0x12, 0x31, 1, 0x12, 0x34, 0x56]);
    }

    #[test]
    fn other_registers_keep_what_was_written() {
        let mut clock = Clock::default();
        clock.write(PORT, 0x0f);
        clock.write(PORT + 1, 0x5a);
        clock.write(PORT, 0x0d);
        assert_eq!(clock.read(PORT + 1), 0x80);
        clock.write(PORT, 0x0f);
        assert_eq!((clock.read(PORT + 1), clock.read(PORT)), (0x5a, 0xff));
    }
}
