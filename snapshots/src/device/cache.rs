//! A small cache with a bound in bytes: chunks and pages of the table that were read last.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What an entry costs beside its bytes, roughly; keeps a crowd of tiny chunks within the bound.
const OVERHEAD: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Page(usize),
    Chunk(u32),
}

struct Slot {
    data: Arc<Vec<u8>>,
    used: u64,
}

/// Drops what was not used for the longest time. A tree and no hash map, because a hash map asks the kernel for random
/// numbers, which a jailed VMM may not.
pub(super) struct Cache {
    slots: BTreeMap<Key, Slot>,
    bytes: usize,
    limit: usize,
    clock: u64,
}

impl Cache {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: BTreeMap::new(),
            bytes: 0,
            limit,
            clock: 0,
        }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<Arc<Vec<u8>>> {
        self.clock += 1;
        let slot = self.slots.get_mut(&key)?;
        slot.used = self.clock;
        Some(Arc::clone(&slot.data))
    }

    pub(super) fn insert(&mut self, key: Key, data: Arc<Vec<u8>>) {
        let cost = data.len() + OVERHEAD;
        if cost > self.limit {
            return;
        }
        self.clock += 1;
        if let Some(old) = self.slots.insert(key, Slot { data, used: self.clock }) {
            self.bytes -= old.data.len() + OVERHEAD;
        }
        self.bytes += cost;
        while self.bytes > self.limit {
            let oldest = self.slots.iter().min_by_key(|(_, slot)| slot.used).map(|(&key, _)| key);
            let Some(slot) = oldest.and_then(|key| self.slots.remove(&key)) else {
                break;
            };
            self.bytes -= slot.data.len() + OVERHEAD;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(len: usize) -> Arc<Vec<u8>> {
        Arc::new(vec![1; len])
    }

    #[test]
    fn the_bound_holds_and_the_oldest_goes_first() {
        let mut cache = Cache::new(3 * (100 + OVERHEAD));
        for chunk in 0..3 {
            cache.insert(Key::Chunk(chunk), data(100));
        }
        assert!(cache.get(Key::Chunk(0)).is_some());
        cache.insert(Key::Page(9), data(100));
        assert!(cache.get(Key::Chunk(1)).is_none(), "the oldest is still there");
        assert!(cache.get(Key::Chunk(0)).is_some() && cache.get(Key::Page(9)).is_some());
        assert!(cache.bytes <= cache.limit);
    }

    #[test]
    fn to_insert_again_counts_once_and_what_is_too_big_is_not_kept() {
        let mut cache = Cache::new(1000);
        cache.insert(Key::Chunk(0), data(100));
        cache.insert(Key::Chunk(0), data(200));
        assert_eq!(cache.bytes, 200 + OVERHEAD);
        cache.insert(Key::Chunk(1), data(1000));
        assert!(cache.get(Key::Chunk(1)).is_none());
        assert_eq!(cache.bytes, 200 + OVERHEAD);
    }
}
