//! A user id for each VMM, so that no two of them may signal or trace each other or own each other's files.

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// The ids in use.
#[derive(Clone, Debug)]
pub(super) struct Uids {
    range: Range<u32>,
    used: Arc<Mutex<HashSet<u32>>>,
}

/// An id that no other VMM gets while this lives.
#[derive(Debug)]
pub(super) struct Uid {
    value: u32,
    used: Arc<Mutex<HashSet<u32>>>,
}

impl Uids {
    pub(super) fn new(range: Range<u32>) -> Self {
        Self {
            range,
            used: Arc::default(),
        }
    }

    /// A free id; `None` when all are in use.
    pub(super) fn take(&self) -> Option<Uid> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let value = self.range.clone().find(|uid| !used.contains(uid))?;
        used.insert(value);
        Some(Uid {
            value,
            used: Arc::clone(&self.used),
        })
    }

    /// The id of a VMM that is there already.
    pub(super) fn reserve(&self, value: u32) -> Uid {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(value);
        Uid {
            value,
            used: Arc::clone(&self.used),
        }
    }
}

impl Uid {
    pub(super) fn get(&self) -> u32 {
        self.value
    }
}

impl Drop for Uid {
    fn drop(&mut self) {
        self.used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_holder_at_a_time() {
        let uids = Uids::new(100..102);
        let survivor = uids.reserve(100);
        let other = uids.take().unwrap();
        assert_eq!(other.get(), 101);
        assert!(uids.take().is_none());
        drop(survivor);
        assert_eq!(uids.take().unwrap().get(), 100);
    }
}
