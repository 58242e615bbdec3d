//! A driver's side of a queue, for tests: it writes rings and descriptors into guest memory, right or wrong.

use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};

use super::device::Activation;
use crate::memory::{GuestMemory, GuestMemoryMmap};

/// VIRTQ_DESC_F_NEXT and VIRTQ_DESC_F_WRITE (virtio 1.3, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// 1 MiB of guest memory.
pub fn memory() -> GuestMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

/// A queue's rings at `base`: descriptors, available ring, used ring, each on a page of its own.
pub struct TestQueue {
    memory: GuestMemory,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl TestQueue {
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            available: 0,
            seen: 0,
        }
    }

    pub fn state(&self) -> QueueState {
        QueueState {
            max_size: self.size,
            size: self.size,
            ready: true,
            desc_table: self.base,
            avail_ring: self.base + 0x1000,
            used_ring: self.base + 0x2000,
            ..QueueState::default()
        }
    }

    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.base + u64::from(index) * 16);
        self.memory.write_obj(addr, at).unwrap();
        self.memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a chain of (address, length, flags) available, as a good driver does.
    pub fn add(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (index, &(addr, len, flags)) in parts.iter().enumerate() {
            let this = self.next_descriptor;
            self.next_descriptor = (this + 1) % self.size;
            let more = if index + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(this, addr, len, flags | more, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    pub fn offer(&mut self, head: u16) {
        let slot = self.base + 0x1004 + u64::from(self.available % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    pub fn set_available(&mut self, index: u16) {
        self.available = index;
        self.memory.write_obj(index, GuestAddress(self.base + 0x1002)).unwrap();
    }

    /// Used elements (head, length) that came since the last time.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.base + 0x2002)).unwrap();
        let mut used = Vec::new();
        while self.seen != index {
            let at = self.base + 0x2004 + u64::from(self.seen % self.size) * 8;
            let head = self.memory.read_obj(GuestAddress(at)).unwrap();
            used.push((head, self.memory.read_obj(GuestAddress(at + 4)).unwrap()));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }
}

pub fn activation(memory: &GuestMemory, features: u64, queues: &[&TestQueue]) -> Activation {
    Activation {
        memory: memory.clone(),
        features,
        queues: queues.iter().map(|queue| queue.state()).collect(),
    }
}

/// A sequence of numbers that looks random and is the same each time (splitmix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
