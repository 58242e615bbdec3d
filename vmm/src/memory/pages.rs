//! Sets of guest pages, as runs: what changed, what was copied, what is to be copied.
//!
//! A page's number is its place in the memory file: the ranges of guest memory follow each other there (see `file`).

use std::ops::Range;

/// Bytes of a page.
pub const PAGE: u64 = PAGE_BYTES as u64;
/// The same, as a length in memory.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a run in a [table](Pages::table).
pub const RUN: usize = 16;

/// Pages, as runs in rising order that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages(Vec<Range<u64>>);

impl Pages {
    /// The pages of one run.
    #[must_use]
    pub fn run(run: Range<u64>) -> Self {
        let mut pages = Self::default();
        pages.push(run);
        pages
    }

    /// As a table, for a file: of each run its first page and how many they are, 8 bytes each, little endian.
    #[must_use]
    pub fn table(&self) -> Vec<u8> {
        let numbers = self.0.iter().flat_map(|run| [run.start, run.end - run.start]);
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    /// The runs of a table, if they are runs of pages before `end` in rising order.
    #[must_use]
    pub fn from_table(table: &[u8], end: u64) -> Option<Self> {
        let mut pages = Self::default();
        let mut least = 0;
        for entry in table.as_chunks::<RUN>().0 {
            let (start, count) = entry.split_at(RUN / 2);
            let start = u64::from_le_bytes(start.try_into().ok()?);
            let run_end = start.checked_add(u64::from_le_bytes(count.try_into().ok()?))?;
            if start < least || run_end <= start || run_end > end {
                return None;
            }
            // Runs that touch are one.
            least = run_end + 1;
            pages.push(start..run_end);
        }
        Some(pages)
    }

    /// Adds a run that begins at or behind the end of the last one.
    pub fn push(&mut self, run: Range<u64>) {
        match self.0.last_mut() {
            _ if run.is_empty() => {}
            Some(last) if last.end == run.start => last.end = run.end,
            last => {
                debug_assert!(last.is_none_or(|last| last.end < run.start), "runs in rising order");
                self.0.push(run);
            }
        }
    }

    /// Adds the pages of which a bit is set, the lowest bit of the first word standing for page `first`.
    pub fn push_bits(&mut self, first: u64, words: impl IntoIterator<Item = u64>) {
        for (base, word) in (first..).step_by(64).zip(words) {
            let (mut at, mut rest) = (base, word);
            while rest != 0 {
                let zeros = rest.trailing_zeros();
                let ones = (rest >> zeros).trailing_ones();
                let start = at + u64::from(zeros);
                at = start + u64::from(ones);
                self.push(start..at);
                rest = rest.checked_shr(zeros + ones).unwrap_or(0);
            }
        }
    }

    /// The runs.
    #[must_use]
    pub fn runs(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many bytes they are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE
    }

    /// Those that are in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours || theirs)
    }

    /// Those that are in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && theirs)
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && !theirs)
    }

    /// Takes the first so many pages out.
    pub fn take_first(&mut self, count: u64) -> Self {
        let (mut first, mut left) = (Self::default(), count);
        let whole = self.0.iter().take_while(|run| {
            let length = run.end - run.start;
            let fits = length <= left;
            left -= if fits { length } else { 0 };
            fits
        });
        let whole = whole.count();
        first.0.extend(self.0.drain(..whole));
        if let Some(run) = self.0.first_mut().filter(|_| left > 0) {
            first.0.push(run.start..run.start + left);
            run.start += left;
        }
        first
    }

    /// In at most `most` runs, for which the smallest gaps are filled: at least those of up to `gap` pages.
    #[must_use]
    pub fn in_runs(&self, most: usize, mut gap: u64) -> Self {
        let mut joined = self.joined(gap);
        while joined.0.len() > most.max(1) {
            gap = gap.max(1).saturating_mul(2);
            joined = joined.joined(gap);
        }
        joined
    }

    fn joined(&self, gap: u64) -> Self {
        let mut joined = Self::default();
        for run in &self.0 {
            match joined.0.last_mut() {
                Some(last) if run.start - last.end <= gap => last.end = run.end,
                _ => joined.0.push(run.clone()),
            }
        }
        joined
    }

    /// Goes along the ends of all runs of both: between two of them nothing changes.
    fn combine(&self, other: &Self, keep: fn(bool, bool) -> bool) -> Self {
        let (mut ours, mut theirs) = (Cursor::new(self), Cursor::new(other));
        let mut combined = Self::default();
        let mut at = 0;
        while let Some(next) = ours.next_end().into_iter().chain(theirs.next_end()).min() {
            if next > at && keep(ours.inside, theirs.inside) {
                combined.push(at..next);
            }
            at = next;
            ours.pass(next);
            theirs.pass(next);
        }
        combined
    }
}

/// A place among the ends of runs.
struct Cursor<'a> {
    runs: std::slice::Iter<'a, Range<u64>>,
    current: Option<&'a Range<u64>>,
    inside: bool,
}

impl<'a> Cursor<'a> {
    fn new(pages: &'a Pages) -> Self {
        let mut runs = pages.0.iter();
        Self {
            current: runs.next(),
            runs,
            inside: false,
        }
    }

    fn next_end(&self) -> Option<u64> {
        let run = self.current?;
        Some(if self.inside { run.end } else { run.start })
    }

    fn pass(&mut self, at: u64) {
        if self.next_end() == Some(at) {
            if self.inside {
                self.current = self.runs.next();
            }
            self.inside = !self.inside;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(runs: &[Range<u64>]) -> Pages {
        let mut pages = Pages::default();
        runs.iter().for_each(|run| pages.push(run.clone()));
        pages
    }

    fn of_bits(bits: u64) -> Pages {
        let mut pages = Pages::default();
        pages.push_bits(0, [bits]);
        pages
    }

    #[test]
    fn bits_become_runs_over_the_ends_of_words() {
        let mut set = Pages::default();
        set.push_bits(128, [1 << 63 | 0b110, 0b11, 0, u64::MAX]);
        assert_eq!(set, pages(&[129..131, 191..194, 320..384]));
        assert_eq!(set.bytes(), (2 + 3 + 64) * PAGE);
    }

    /// Every pair of a few patterns, against what the bits themselves say.
    #[test]
    fn sets_combine_as_their_bits_do() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut some = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 24 & seed >> 13
        };
        let patterns: Vec<u64> = [0, 1, u64::MAX, 0xff00]
            .into_iter()
            .chain((0..40).map(|_| some()))
            .collect();
        for &one in &patterns {
            for &other in &patterns {
                let (a, b) = (of_bits(one), of_bits(other));
                assert_eq!(a.or(&b), of_bits(one | other), "{one:#x} or {other:#x}");
                assert_eq!(a.and(&b), of_bits(one & other), "{one:#x} and {other:#x}");
                assert_eq!(a.without(&b), of_bits(one & !other), "{one:#x} without {other:#x}");
            }
        }
    }

    #[test]
    fn the_first_pages_are_taken_out_until_none_is_left() {
        let mut set = pages(&[1..4, 6..7, 10..20]);
        assert_eq!(set.take_first(2), Pages::run(1..3));
        assert_eq!(set.take_first(4), pages(&[3..4, 6..7, 10..12]));
        assert_eq!(set.take_first(99), Pages::run(12..20));
        assert!(set.is_empty() && set.take_first(1).is_empty());
    }

    #[test]
    fn too_many_runs_lose_their_smallest_gaps() {
        let set = pages(&[0..1, 3..4, 10..11, 100..101]);
        assert_eq!(set.in_runs(9, 0), set);
        assert_eq!(set.in_runs(9, 2), pages(&[0..4, 10..11, 100..101]));
        assert_eq!(set.in_runs(2, 0), pages(&[0..11, 100..101]));
        assert_eq!(set.in_runs(1, 0), Pages::run(0..101));
        let again = set.in_runs(2, 0);
        assert_eq!(again.in_runs(2, 0), again);
    }

    /// Somebody who makes digests can write any table.
    #[test]
    fn a_table_of_runs_that_cannot_be_is_refused() {
        let table = |runs: &[(u64, u64)]| -> Vec<u8> {
            let numbers = runs.iter().flat_map(|(start, count)| [*start, *count]);
            numbers.flat_map(u64::to_le_bytes).collect()
        };
        assert!(Pages::from_table(&table(&[(0, 1), (2, 8)]), 10).is_some());
        let cases: [&[(u64, u64)]; 6] = [
            &[(0, 0)],
            &[(9, 2)],
            &[(4, 2), (3, 1)],
            &[(4, 2), (6, 1)],
            &[(u64::MAX, 2)],
            &[(1, u64::MAX)],
        ];
        for runs in cases {
            assert_eq!(Pages::from_table(&table(runs), 10), None, "{runs:?}");
        }
    }
}
