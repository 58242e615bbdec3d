//! The pages that a loaded vCPU needs for its first instructions: they are made present while nobody waits, or each would cost
//! the claim a fault.
//!
//! Where the vCPU stands tells which: the tables that translate its instruction and stack pointers, its descriptor tables and
//! its own data, and the pages behind them. The processor marks what it uses in the tables, and a stack is written: such pages
//! get copies of their own. Whatever a guest has put there, a page too many costs 4 KiB and a page too few a fault.

use std::collections::BTreeMap;

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::state::VcpuState;
use crate::memory::GuestMemory;
use crate::memory::pages::PAGE;
use crate::memory::populate::{self, Access};

/// Paging is on (SDM volume 3, 2.5), there are five levels of tables, and they are those of 64 bits (2.2.1).
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
/// Of an entry of a table (SDM volume 3, 4.5.4): it is used, it is no table but a large page, and where it points to.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// A table has 512 entries of 8 bytes.
const INDEX_BITS: u32 = 9;

/// Where a vCPU stands.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl From<&VcpuState> for Place {
    fn from(state: &VcpuState) -> Self {
        let (regs, sregs) = (state.regs, state.sregs);
        Self { regs, sregs }
    }
}

/// Makes the pages present. What cannot be is left to the fault that needs it.
pub fn populate(place: &Place, memory: &GuestMemory) {
    for (page, written) in pages(place, memory) {
        let access = if written { Access::Write } else { Access::Read };
        populate::page(memory, GuestAddress(page * PAGE), access);
    }
}

/// Numbers of pages, and whether each will be written.
fn pages(place: &Place, memory: &GuestMemory) -> BTreeMap<u64, bool> {
    let Place { regs, sregs } = place;
    let flat = sregs.efer & EFER_LMA != 0;
    let linear = |base: u64, offset: u64| if flat { offset } else { base.wrapping_add(offset) };
    let mut pages = BTreeMap::new();
    for (address, written) in [
        (linear(sregs.cs.base, regs.rip), false),
        (linear(sregs.ss.base, regs.rsp), true),
        (sregs.gs.base, true),
        (sregs.gdt.base, false),
        (sregs.idt.base, false),
        (sregs.tr.base, false),
    ] {
        walk(sregs, memory, address, |page, table| {
            *pages.entry(page).or_default() |= table || written;
        });
    }
    pages
}

/// Tells the tables on the way to an address, and the page at its end.
fn walk(sregs: &kvm_sregs, memory: &GuestMemory, linear: u64, mut each: impl FnMut(u64, bool)) {
    if sregs.cr0 & CR0_PG == 0 {
        return each(linear / PAGE, false);
    }
    if sregs.efer & EFER_LMA == 0 {
        return;
    }
    let levels = if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    let mut table = sregs.cr3 & ADDRESS;
    for level in (0..levels).rev() {
        each(table / PAGE, true);
        let shift = PAGE.trailing_zeros() + level * INDEX_BITS;
        let index = linear >> shift & ((1 << INDEX_BITS) - 1);
        let Ok(entry) = memory.read_obj::<u64>(GuestAddress(table + index * 8)) else {
            return;
        };
        if entry & PRESENT == 0 {
            return;
        }
        if level == 0 || entry & LARGE != 0 {
            let offset = linear & ((1 << shift) - 1);
            return each(((entry & ADDRESS) & !((1 << shift) - 1) | offset) / PAGE, false);
        }
        table = entry & ADDRESS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Anonymous, MemorySource, Range};

    fn memory() -> GuestMemory {
        let size = 4 << 20;
        Anonymous.map(&[Range { start: 0, size }]).unwrap()
    }

    fn long_mode() -> kvm_sregs {
        kvm_sregs {
            cr0: CR0_PG,
            cr3: 0x1018,
            efer: EFER_LMA,
            ..Default::default()
        }
    }

    fn walked(sregs: &kvm_sregs, memory: &GuestMemory, linear: u64) -> Vec<(u64, bool)> {
        let mut pages = Vec::new();
        walk(sregs, memory, linear, |page, table| pages.push((page, table)));
        pages
    }

    #[test]
    fn the_way_to_an_address_is_its_tables_and_its_page() {
        let memory = memory();
        let linear = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 5;
        for (at, entry) in [
            (0x1000 + 8, 0x2003_u64),
            (0x2000 + 2 * 8, 0x3003),
            (0x3000 + 3 * 8, 0x4003),
            (0x4000 + 4 * 8, (1 << 63) | 0x5003),
        ] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let all = [(1, true), (2, true), (3, true), (4, true), (5, false)];
        assert_eq!(walked(&long_mode(), &memory, linear), all);
        // A page of 2 MiB at 2 MiB, and an entry that is not present.
        memory.write_obj(0x20_0083_u64, GuestAddress(0x3000 + 3 * 8)).unwrap();
        assert_eq!(walked(&long_mode(), &memory, linear)[3..], [(0x204, false)]);
        memory.write_obj(0_u64, GuestAddress(0x2000 + 2 * 8)).unwrap();
        assert_eq!(walked(&long_mode(), &memory, linear), all[..2]);
    }

    #[test]
    fn tables_outside_of_memory_end_the_way_and_without_paging_there_are_none() {
        let memory = memory();
        let outside = kvm_sregs {
            cr3: ADDRESS,
            ..long_mode()
        };
        assert_eq!(walked(&outside, &memory, u64::MAX), [(ADDRESS / PAGE, true)]);
        populate::page(&memory, GuestAddress(ADDRESS), Access::Write);
        assert_eq!(walked(&kvm_sregs::default(), &memory, 0x1234), [(1, false)]);
    }
}
