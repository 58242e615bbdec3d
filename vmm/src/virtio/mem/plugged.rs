//! Which blocks of a virtio-mem region are plugged: a bit for each.

use std::ops::Range;

/// A set of block numbers below a fixed end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    words: Vec<u64>,
    blocks: usize,
}

const BITS: usize = u64::BITS as usize;

impl Plugged {
    /// None of `blocks` blocks.
    #[must_use]
    pub fn none(blocks: usize) -> Self {
        Self {
            words: vec![0; blocks.div_ceil(BITS)],
            blocks,
        }
    }

    /// As [`Self::to_words`] gave it. None: these are not the words of so many blocks.
    #[must_use]
    pub fn from_words(words: Vec<u64>, blocks: usize) -> Option<Self> {
        let beyond = words.last().map_or(0, |last| match blocks % BITS {
            0 => 0,
            used => last >> used,
        });
        (words.len() == blocks.div_ceil(BITS) && beyond == 0).then_some(Self { words, blocks })
    }

    /// The set in words of 64 blocks.
    #[must_use]
    pub fn to_words(&self) -> Vec<u64> {
        self.words.clone()
    }

    /// How many are in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// How many there can be.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.blocks
    }

    /// Whether a block is in it; what lies beyond the end is not.
    #[must_use]
    pub fn contains(&self, block: usize) -> bool {
        self.words
            .get(block / BITS)
            .is_some_and(|word| (word >> (block % BITS)) & 1 != 0)
    }

    /// How many of a range are in it.
    #[must_use]
    pub fn count_in(&self, range: Range<usize>) -> usize {
        range.filter(|block| self.contains(*block)).count()
    }

    /// Puts a range into the set, or takes it out; what lies beyond the end is left aside.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in range.start..range.end.min(self.blocks) {
            let bit = 1 << (block % BITS);
            if plugged {
                self.words[block / BITS] |= bit;
            } else {
                self.words[block / BITS] &= !bit;
            }
        }
    }

    /// The set as ranges, in order.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for block in (0..self.blocks).filter(|block| self.contains(*block)) {
            match ranges.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => ranges.push(block..block + 1),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_knows_its_members_their_number_and_their_ranges() {
        let mut set = Plugged::none(130);
        set.set(60..70, true);
        set.set(128..200, true);
        set.set(64..65, false);
        assert_eq!((set.count(), set.count_in(0..64), set.count_in(128..1000)), (11, 4, 2));
        assert_eq!(set.ranges(), [60..64, 65..70, 128..130]);
        assert!(!set.contains(130));
    }

    #[test]
    fn words_of_another_size_or_with_bits_beyond_the_end_are_no_set() {
        let mut set = Plugged::none(70);
        set.set(69..70, true);
        assert_eq!(Plugged::from_words(set.to_words(), 70), Some(set.clone()));
        assert_eq!(Plugged::from_words(set.to_words(), 64), None);
        assert_eq!(Plugged::from_words(set.to_words(), 69), None);
        assert_eq!(Plugged::from_words(vec![], 0), Some(Plugged::none(0)));
    }
}
