//! Start info of Xen's PVH direct boot ("x86/HVM direct boot ABI", `struct hvm_start_info` version 1).

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::{COMMAND_LINE, Error, Initrd, MapEntry, PVH_START_INFO, put};
use crate::acpi;
use crate::memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULES: u64 = PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = PVH_START_INFO + 0x80;

/// A structure of the ABI, to be written as its bytes.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
struct Plain<T>(T);

// SAFETY: these are repr(C) structures of integers without padding, valid for any content.
unsafe impl ByteValued for Plain<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_memmap_table_entry> {}

/// Writes start info, module list and memory map.
pub(super) fn write(memory: &GuestMemory, initrd: Option<Initrd>, map: &[MapEntry]) -> Result<(), Error> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: acpi::RSDP,
        memmap_paddr: MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.size,
            ..Default::default()
        };
        put(memory, "the PVH module list", MODULES, Plain(module).as_slice())?;
    }
    let mut table = Vec::new();
    for entry in map {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        };
        table.extend_from_slice(Plain(entry).as_slice());
        info.memmap_entries += 1;
    }
    put(memory, "the PVH memory map", MEMORY_MAP, &table)?;
    put(memory, "the PVH start info", PVH_START_INFO, Plain(info).as_slice())
}
