//! Sequence numbers: a circle of 2³² (RFC 9293 §3.4).

use std::ops::Add;

/// A place in a TCP stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seq(pub(crate) u32);

impl Seq {
    /// How far `self` is ahead of `earlier`; negative when behind.
    pub(crate) fn distance(self, earlier: Self) -> i32 {
        self.0.wrapping_sub(earlier.0).cast_signed()
    }

    /// How many bytes lie between; 0 when `self` is behind.
    pub(crate) fn since(self, earlier: Self) -> usize {
        usize::try_from(self.distance(earlier)).unwrap_or(0)
    }

    pub(crate) fn is_after(self, other: Self) -> bool {
        self.distance(other) > 0
    }
}

impl Add<usize> for Seq {
    type Output = Self;

    /// Lengths are those of buffers and segments, far below 2³¹.
    fn add(self, length: usize) -> Self {
        Self(self.0.wrapping_add(length as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_the_wrap() {
        let before = Seq(u32::MAX - 1);
        let after = before + 5;
        assert_eq!(after, Seq(3));
        assert!(after.is_after(before) && !before.is_after(after));
        assert_eq!(after.since(before), 5);
        assert_eq!(before.since(after), 0);
        assert_eq!(before.distance(after), -5);
    }
}
