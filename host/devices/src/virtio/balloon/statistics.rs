//! How the guest's memory is used, in the driver's own words (virtio 1.3 §5.5.6.4).

/// One tag and its value: u16 and u64, little-endian, without padding.
pub(super) const ENTRY_BYTES: usize = 10;
/// Tags that mean something to us are below this.
const TAGS: usize = 16;

/// A driver's answer. What it did not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    values: [Option<u64>; TAGS],
}

impl Statistics {
    /// Reads an answer; tags nobody knows yet are passed over, and so is a cut-off entry at the end.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        let (entries, _cut_off) = bytes.as_chunks::<ENTRY_BYTES>();
        for [tag_low, tag_high, value @ ..] in entries {
            let tag = usize::from(u16::from_le_bytes([*tag_low, *tag_high]));
            if let Some(place) = statistics.values.get_mut(tag) {
                *place = Some(u64::from_le_bytes(*value));
            }
        }
        statistics
    }

    /// Bytes swapped in since the guest's boot.
    pub fn swap_in_bytes(&self) -> Option<u64> {
        self.values[0]
    }

    /// Bytes swapped out since the guest's boot.
    pub fn swap_out_bytes(&self) -> Option<u64> {
        self.values[1]
    }

    /// Page faults that needed the disk, since the guest's boot.
    pub fn major_faults(&self) -> Option<u64> {
        self.values[2]
    }

    /// Other page faults, since the guest's boot.
    pub fn minor_faults(&self) -> Option<u64> {
        self.values[3]
    }

    /// Bytes used for nothing.
    pub fn free_bytes(&self) -> Option<u64> {
        self.values[4]
    }

    /// Bytes of memory the guest has.
    pub fn total_bytes(&self) -> Option<u64> {
        self.values[5]
    }

    /// Bytes that applications could have without swapping.
    pub fn available_bytes(&self) -> Option<u64> {
        self.values[6]
    }

    /// Bytes in the page cache that could be dropped.
    pub fn cache_bytes(&self) -> Option<u64> {
        self.values[7]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_kept_and_others_passed_over() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 100u64), (5, 200), (7, u64::MAX), (16, 1), (u16::MAX, 2), (4, 101)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([5, 0, 1]);
        let statistics = Statistics::parse(&bytes);
        assert_eq!(statistics.free_bytes(), Some(101));
        assert_eq!(statistics.total_bytes(), Some(200));
        assert_eq!(statistics.cache_bytes(), Some(u64::MAX));
        assert_eq!(statistics.swap_in_bytes(), None);
        assert_eq!(Statistics::parse(&[]), Statistics::default());
    }
}
