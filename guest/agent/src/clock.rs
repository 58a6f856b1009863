//! The machine's clock, which follows the host's.
//!
//! The host tells the time when the session begins, after its own sleep, and now and then. Its word is older by what
//! the message took to arrive, which on a busy machine is a good part of a second: so a clock that is behind the word
//! is really behind and is set forward at once, but one that is a little ahead of it may be right, and is left alone.
//! Following every message to the letter would make the clock jump back and forth by the machine's load.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, Timespec};

/// A clock that is behind by up to this is left alone.
const BEHIND_MAX: Duration = Duration::from_millis(50);

/// A clock that is ahead by up to this is left alone.
const AHEAD_MAX: Duration = Duration::from_millis(500);

/// Sets the clock to `unix_nanos` if it is off by more than is tolerated. Returns the step, if one was made.
pub fn follow(unix_nanos: i64) -> io::Result<Option<Duration>> {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let Some(off) = step(now, unix_nanos) else { return Ok(None) };
    let (tv_sec, tv_nsec) = (unix_nanos.div_euclid(NANOS), unix_nanos.rem_euclid(NANOS));
    rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?;
    Ok(Some(off))
}

const NANOS: i64 = 1_000_000_000;

/// How far the clock is off, when that is worth a step.
fn step(now: Timespec, unix_nanos: i64) -> Option<Duration> {
    let now = i128::from(now.tv_sec) * i128::from(NANOS) + i128::from(now.tv_nsec);
    let told = i128::from(unix_nanos);
    // An i64 of nanoseconds is 292 years; two of them differ by less than a u64 holds.
    let off = Duration::from_nanos(u64::try_from(now.abs_diff(told)).unwrap_or(u64::MAX));
    let tolerated = if now > told { AHEAD_MAX } else { BEHIND_MAX };
    (off > tolerated).then_some(off)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_visible_difference_is_a_step() {
        let now = Timespec { tv_sec: 1000, tv_nsec: 500_000_000 };
        let nanos = 1_000_500_000_000;
        assert_eq!(step(now, nanos), None);
        assert_eq!(step(now, nanos + 50_000_000), None);
        assert_eq!(step(now, nanos + 51_000_000), Some(Duration::from_millis(51)));
        assert_eq!(step(now, nanos - 500_000_000), None);
        assert_eq!(step(now, nanos - 501_000_000), Some(Duration::from_millis(501)));
        assert_eq!(step(now, nanos - 3_600 * NANOS), Some(Duration::from_secs(3600)));
        assert!(step(now, i64::MIN).is_some() && step(now, i64::MAX).is_some());
    }
}
