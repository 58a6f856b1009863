//! Configuration space: bytes that the driver reads, some that it writes, and some that the device changes.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The configuration space of one device, shared between its transport's side and its thread.
#[derive(Clone, Debug, Default)]
pub struct ConfigSpace(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    space: Mutex<Space>,
    /// What the driver may write.
    writable: Vec<Range<usize>>,
    /// What a restored device has as it was; the rest is its own, which may be other than the saved one's.
    kept: Vec<Range<usize>>,
}

#[derive(Debug, Default)]
struct Space {
    bytes: Vec<u8>,
    generation: u32,
    /// As it was made: what a reset goes back to where the driver has written.
    initial: Vec<u8>,
}

impl ConfigSpace {
    /// A space that only the device changes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::with_writable(bytes, Vec::new(), None)
    }

    /// A space of which the driver writes these ranges, which lie within it, and of which a restored device keeps them and
    /// this other.
    pub fn with_writable(bytes: Vec<u8>, writable: Vec<Range<usize>>, kept: Option<Range<usize>>) -> Self {
        let space = Space { initial: bytes.clone(), bytes, generation: 0 };
        let kept = writable.iter().cloned().chain(kept).collect();
        Self(Arc::new(Shared { space: Mutex::new(space), writable, kept }))
    }

    /// Answers the driver's read. Beyond the end there are zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let space = self.space();
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(space.bytes.len());
        let count = data.len().min(space.bytes.len() - start);
        data[..count].copy_from_slice(&space.bytes[start..start + count]);
    }

    /// Carries out the driver's write, as far as it may.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let mut space = self.space();
        for (index, byte) in data.iter().enumerate() {
            let Some(position) = offset.checked_add(index) else { return };
            if self.0.writable.iter().any(|range| range.contains(&position)) {
                space.bytes[position] = *byte;
            }
        }
    }

    /// The 32-bit field at `offset`, little-endian; it lies within the space.
    pub fn word(&self, offset: usize) -> u32 {
        let space = self.space();
        let word = space.bytes[offset..].first_chunk().expect("a field lies within its space");
        u32::from_le_bytes(*word)
    }

    /// Changes the space on the device's side. The caller tells the driver.
    pub fn set(&self, offset: usize, bytes: &[u8]) {
        let mut space = self.space();
        space.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        space.generation = space.generation.wrapping_add(1);
    }

    /// How often the device has changed the space.
    pub fn generation(&self) -> u32 {
        self.space().generation
    }

    /// Forgets what the driver has written.
    pub fn reset(&self) {
        let mut space = self.space();
        for range in &self.0.writable {
            let initial = space.initial[range.clone()].to_vec();
            space.bytes[range.clone()].copy_from_slice(&initial);
        }
    }

    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.space().bytes.clone()
    }

    /// Takes on what is kept of the bytes of a saved space, which is as long as this one.
    pub fn restore(&self, bytes: &[u8]) {
        let mut space = self.space();
        for range in &self.0.kept {
            space.bytes[range.clone()].copy_from_slice(&bytes[range.clone()]);
        }
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.0.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_ends_in_zeroes() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4, 5]);
        let check = |offset, expected: [u8; 4]| {
            let mut data = [0xff; 4];
            space.read(offset, &mut data);
            assert_eq!(data, expected);
        };
        check(0, [1, 2, 3, 4]);
        check(3, [4, 5, 0, 0]);
        check(5, [0; 4]);
        check(u64::MAX, [0; 4]);
    }

    #[test]
    fn a_driver_writes_only_what_it_may() {
        let space = ConfigSpace::with_writable(vec![0; 12], vec![4..6, 6..8], Some(11..12));
        space.write(2, &[9; 8]);
        space.write(u64::MAX, &[9; 2]);
        space.write(11, &[9; 4]);
        assert_eq!([0, 4, 8].map(|offset| space.word(offset)), [0, 0x0909_0909, 0]);
        assert_eq!(space.generation(), 0);
        space.set(0, &[1]);
        assert_eq!(space.generation(), 1);
        space.reset();
        assert_eq!([0, 4].map(|offset| space.word(offset)), [1, 0]);
        // Of a saved one, what the driver wrote and what is kept.
        space.restore(&[7; 12]);
        assert_eq!(space.bytes(), [1, 0, 0, 0, 7, 7, 7, 7, 0, 0, 0, 7]);
    }
}
