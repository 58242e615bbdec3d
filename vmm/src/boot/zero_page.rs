//! The zero page of Linux' 64-bit boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::{COMMAND_LINE, Error, Initrd, MapEntry, ZERO_PAGE, put};
use crate::acpi;
use crate::memory::GuestMemory;

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448;
/// "Undefined" in the protocol's list of boot loaders.
const LOADER: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Writes it. `header` is a bzImage's own; an ELF kernel has none.
pub(super) fn write(
    memory: &GuestMemory,
    header: Option<setup_header>,
    cmdline_length: usize,
    initrd: Option<Initrd>,
    map: &[MapEntry],
) -> Result<(), Error> {
    let mut params = boot_params {
        hdr: header.unwrap_or_default(),
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = MAGIC;
    params.hdr.type_of_loader = LOADER;
    if header.is_none() {
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.cmd_line_ptr = low(COMMAND_LINE);
    params.hdr.cmdline_size = low(cmdline_length as u64);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.start);
        params.hdr.ramdisk_size = low(initrd.size);
    }
    params.acpi_rsdp_addr = acpi::RSDP;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind as u32,
        };
        params.e820_entries += 1;
    }
    put(memory, "the zero page", ZERO_PAGE, params.as_slice())
}

/// All of these lie below the gap, which is below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
