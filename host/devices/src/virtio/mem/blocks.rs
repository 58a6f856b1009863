//! Which blocks of a range are plugged.

use std::ops::Range;

/// One bit for each block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: usize,
    plugged: usize,
}

/// How the blocks of a part of the range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Blocks {
    /// So many blocks, none of them plugged.
    pub(super) fn new(count: usize) -> Self {
        Self { words: vec![0; count.div_ceil(64)], count, plugged: 0 }
    }

    /// How many blocks there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// How many blocks are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// How some blocks are; they lie within the range, and are at least one.
    pub(super) fn state(&self, blocks: Range<usize>) -> State {
        let (all, mut plugged) = (blocks.len(), 0);
        for (word, mask) in words(blocks) {
            plugged += (self.words[word] & mask).count_ones() as usize;
        }
        match plugged {
            0 => State::Unplugged,
            some if some == all => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Plugs or unplugs blocks, which lie within the range.
    pub(super) fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        for (index, mask) in words(blocks) {
            let word = &mut self.words[index];
            self.plugged -= word.count_ones() as usize;
            *word = if plugged { *word | mask } else { *word & !mask };
            self.plugged += word.count_ones() as usize;
        }
    }

    /// The next run of plugged blocks at or behind `from`.
    pub(super) fn run(&self, from: usize) -> Option<Range<usize>> {
        let is_plugged = |block: &usize| self.words[block / 64] & 1 << (block % 64) != 0;
        let start = (from..self.count).find(is_plugged)?;
        let end = (start..self.count).find(|block| !is_plugged(block)).unwrap_or(self.count);
        Some(start..end)
    }

    /// The bits, as little-endian words.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// As many blocks as these, plugged as [`Self::bytes`] told of others; `None` when it did not tell it of so many.
    pub(super) fn like(&self, bytes: &[u8]) -> Option<Self> {
        let (chunks, []) = bytes.as_chunks() else { return None };
        let words: Vec<_> = chunks.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let all: usize = words.iter().map(|word| word.count_ones() as usize).sum();
        let blocks = Self { words, count: self.count, plugged: all };
        let fits = blocks.words.len() == self.words.len()
            && (blocks.count.is_multiple_of(64)
                || blocks.words.last().is_none_or(|last| last >> (blocks.count % 64) == 0));
        fits.then_some(blocks)
    }
}

/// The words in which blocks have their bits, each with those bits.
fn words(blocks: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (blocks.start / 64..blocks.end.div_ceil(64)).map(move |word| {
        let low = blocks.start.saturating_sub(word * 64).min(64);
        let high = (blocks.end - word * 64).min(64);
        let below = |bits: usize| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        (word, below(high) & !below(low))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The same as a list of truths.
        #[test]
        fn blocks_are_as_they_were_set(
            count in 1usize..300,
            changes in prop::collection::vec((any::<u16>(), any::<u16>(), any::<bool>()), 0..20),
        ) {
            let (mut blocks, mut model) = (Blocks::new(count), vec![false; count]);
            for (start, length, plugged) in changes {
                let start = usize::from(start) % count;
                let range = start..start + 1 + usize::from(length) % (count - start);
                blocks.set(range.clone(), plugged);
                model[range.clone()].fill(plugged);
                prop_assert_eq!(blocks.state(range), if plugged { State::Plugged } else { State::Unplugged });
            }
            prop_assert_eq!(blocks.plugged(), model.iter().filter(|plugged| **plugged).count());
            for start in 0..count {
                let some = &model[start..count.min(start + 70)];
                let expected = match some.iter().filter(|plugged| **plugged).count() {
                    0 => State::Unplugged,
                    all if all == some.len() => State::Plugged,
                    _ => State::Mixed,
                };
                prop_assert_eq!(blocks.state(start..start + some.len()), expected);
            }
            let mut from_runs = vec![false; count];
            let mut next = 0;
            while let Some(run) = blocks.run(next) {
                next = run.end;
                from_runs[run].fill(true);
            }
            prop_assert_eq!(from_runs, model);
            prop_assert_eq!(Blocks::new(count).like(&blocks.bytes()), Some(blocks));
        }
    }

    #[test]
    fn bits_of_another_range_are_refused() {
        let blocks = Blocks::new(70);
        assert_eq!(blocks.like(&[0; 15]), None);
        assert_eq!(blocks.like(&[0; 8]), None);
        assert_eq!(blocks.like(&[0; 24]), None);
        let mut bytes = [0; 16];
        bytes[8] = 1 << 5;
        assert_eq!(blocks.like(&bytes).map(|blocks| blocks.plugged()), Some(1));
        bytes[8] = 1 << 6;
        assert_eq!(blocks.like(&bytes), None, "the 71st of 70 blocks");
    }
}
