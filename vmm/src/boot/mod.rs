//! Getting a kernel to its first instruction: image, initrd, command line and what the entry protocol wants beside them.
//!
//! ```text
//! 0x00500  GDT                       0x09000  page tables (6 pages)
//! 0x06000  PVH start info            0x20000  command line
//! 0x07000  zero page                 0xe0000  ACPI tables (see `acpi`)
//!                                    0xfe000  VM generation id (see `platform`)
//!                                    0xffff0  reset vector
//! 0x100000 kernel ...                    ... initrd, as high below the gap as the kernel allows
//! ```
//!
//! | image                        | entry                                         | protocol |
//! |------------------------------|-----------------------------------------------|----------|
//! | bzImage, protocol >= 2.12    | 64-bit entry, 0x200 behind the load address   | Linux x86 boot protocol, 64-bit |
//! | ELF with a PVH note          | the note's address, 32-bit, paging off        | Xen PVH direct boot |
//! | ELF without                  | `e_entry`, 64-bit                             | as the bzImage |

mod pvh;
pub mod reset_vector;
mod zero_page;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::acpi;
use crate::memory::{self, GuestMemory};

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH start info, its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// The zero page, `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Identity map of the first 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Where kernels begin.
pub const KERNEL: u64 = 0x10_0000;
/// End of conventional memory.
const LOW_END: u64 = 0xa_0000;
/// What Linux on x86 takes (COMMAND_LINE_SIZE), its end mark included.
pub const MAX_COMMAND_LINE: usize = 2048;
/// From its load address to the 64-bit entry of a bzImage (boot protocol, "64-bit boot protocol").
const BZIMAGE_ENTRY64: u64 = 0x200;
const PAGE: u64 = 4096;

/// A kernel, initrd or command line that cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// Neither ELF nor bzImage, or a broken one.
    #[error("loading the kernel: not a bzImage and not an x86-64 ELF file that fits into the guest's memory")]
    Kernel(#[source] linux_loader::loader::Error),
    /// Reading the kernel file failed.
    #[error("reading the kernel file")]
    ReadKernel(#[source] io::Error),
    /// A bzImage without 64-bit entry.
    #[error(
        "the bzImage has no 64-bit entry (boot protocol {version:#06x}): use an x86-64 kernel of protocol 2.12 or newer"
    )]
    No64BitEntry {
        /// Version of the boot protocol.
        version: u16,
    },
    /// Kernel, initrd and their working space are more than the memory.
    #[error(
        "kernel and initrd need memory up to {needed:#x}, usable is up to {usable:#x}: give the sandbox more memory"
    )]
    TooLarge {
        /// Address behind what is needed.
        needed: u64,
        /// Address behind what can be had.
        usable: u64,
    },
    /// An entry that is not in the kernel.
    #[error("the kernel's entry {0:#x} is outside of the kernel")]
    Entry(u64),
    /// Reading the initrd failed.
    #[error("reading the initrd")]
    Initrd(#[source] io::Error),
    /// Too long, or with a zero byte.
    #[error("the command line has {0} bytes or a zero byte in it; at most 2047 bytes are allowed")]
    CommandLine(usize),
    /// There is no memory where it must be.
    #[error("writing {what} at {address:#x}")]
    Write {
        /// What.
        what: &'static str,
        /// Where.
        address: u64,
        /// Why not.
        source: GuestMemoryError,
    },
    /// ACPI.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
}

/// How the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, identity paging, `rsi` = zero page.
    Linux64 {
        /// First instruction.
        address: u64,
    },
    /// 32-bit protected mode, no paging, `ebx` = start info.
    Pvh {
        /// First instruction.
        address: u64,
    },
}

/// Memory that the guest is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    size: u64,
    kind: MapKind,
}

/// E820 types, which PVH's memory map shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapKind {
    Ram = 1,
    Reserved = 2,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Initrd {
    start: u64,
    size: u64,
}

/// What a kernel is to be started with.
pub struct Request<'a> {
    /// bzImage or ELF.
    pub kernel: File,
    /// First root file system.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: &'a str,
}

/// Puts kernel, initrd, command line and boot structures into guest memory.
///
/// # Errors
/// Something is not what it must be, or does not fit; the memory may be partly written then, and the call can be repeated.
pub fn load(memory: &GuestMemory, request: Request<'_>) -> Result<Entry, Error> {
    let Request {
        mut kernel,
        initrd,
        cmdline,
    } = request;
    write_command_line(memory, cmdline)?;
    let image = Image::load(memory, &mut kernel)?;
    let low_end = low_memory(memory);
    if image.end > low_end {
        return Err(Error::TooLarge {
            needed: image.end,
            usable: low_end,
        });
    }
    let initrd = initrd.map(|file| load_initrd(memory, file, &image)).transpose()?;
    let map = memory_map(memory);
    match image.entry {
        Entry::Linux64 { .. } => zero_page::write(memory, image.header, cmdline.len(), initrd, &map)?,
        Entry::Pvh { .. } => pvh::write(memory, initrd, &map)?,
    }
    Ok(image.entry)
}

struct Image {
    entry: Entry,
    /// First address that the kernel leaves free, its working space while it unpacks itself included.
    end: u64,
    /// Last address that the initrd may take.
    initrd_max: u64,
    header: Option<linux_loader::bootparam::setup_header>,
}

impl Image {
    fn load(memory: &GuestMemory, file: &mut File) -> Result<Self, Error> {
        let mut magic = [0; 4];
        file.seek(SeekFrom::Start(0)).map_err(Error::ReadKernel)?;
        file.read_exact(&mut magic).map_err(Error::ReadKernel)?;
        let high = Some(GuestAddress(KERNEL));
        if magic == *b"\x7fELF" {
            let loaded = Elf::load(&**memory, None, file, high).map_err(Error::Kernel)?;
            Self::elf(&loaded)
        } else {
            let loaded = BzImage::load(&**memory, None, file, high).map_err(Error::Kernel)?;
            Self::bzimage(&loaded)
        }
    }

    fn elf(loaded: &KernelLoaderResult) -> Result<Self, Error> {
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh { address: address.0 },
            PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => Entry::Linux64 {
                address: loaded.kernel_load.0,
            },
        };
        let (Entry::Pvh { address } | Entry::Linux64 { address }) = entry;
        if !(KERNEL..loaded.kernel_end).contains(&address) {
            return Err(Error::Entry(address));
        }
        Ok(Self {
            entry,
            end: loaded.kernel_end,
            initrd_max: u64::from(u32::MAX),
            header: None,
        })
    }

    fn bzimage(loaded: &KernelLoaderResult) -> Result<Self, Error> {
        const XLF_KERNEL_64: u16 = 1 << 0;
        const PROTOCOL_2_12: u16 = 0x20c;
        // The loader always hands the header back for a bzImage.
        let header = loaded.setup_header.unwrap_or_default();
        let version = header.version;
        if version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(Error::No64BitEntry { version });
        }
        // A relocatable kernel unpacks itself to the higher of its preferred address and where it was loaded.
        let unpacked = loaded
            .kernel_load
            .0
            .max(header.pref_address)
            .saturating_add(u64::from(header.init_size));
        Ok(Self {
            entry: Entry::Linux64 {
                address: loaded.kernel_load.0 + BZIMAGE_ENTRY64,
            },
            end: loaded.kernel_end.max(unpacked),
            initrd_max: u64::from(header.initrd_addr_max),
            header: Some(header),
        })
    }
}

fn load_initrd(memory: &GuestMemory, mut file: File, image: &Image) -> Result<Initrd, Error> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::Initrd)?;
    file.seek(SeekFrom::Start(0)).map_err(Error::Initrd)?;
    let usable = low_memory(memory).min(image.initrd_max.saturating_add(1));
    let first_free = image.end.next_multiple_of(PAGE);
    let start = usable
        .checked_sub(size)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= first_free);
    let Some(start) = start else {
        return Err(Error::TooLarge {
            needed: first_free.saturating_add(size),
            usable,
        });
    };
    let mut address = start;
    let mut left = usize::try_from(size).map_err(|_| Error::TooLarge { needed: size, usable })?;
    while left > 0 {
        let read = memory
            .read_volatile_from(GuestAddress(address), &mut file, left)
            .map_err(|source| Error::Write {
                what: "the initrd",
                address,
                source,
            })?;
        if read == 0 {
            return Err(Error::Initrd(io::ErrorKind::UnexpectedEof.into()));
        }
        left -= read;
        address += read as u64;
    }
    Ok(Initrd { start, size })
}

fn write_command_line(memory: &GuestMemory, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() >= MAX_COMMAND_LINE || cmdline.contains('\0') {
        return Err(Error::CommandLine(cmdline.len()));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    put(memory, "the command line", COMMAND_LINE, &bytes)
}

fn put(memory: &GuestMemory, what: &'static str, address: u64, data: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(data, GuestAddress(address))
        .map_err(|source| Error::Write { what, address, source })
}

/// End of the memory below the gap.
fn low_memory(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .map(region_end)
        .filter(|end| *end <= memory::LOW_MEMORY_END)
        .max()
        .unwrap_or(0)
}

fn region_end(region: &impl vm_memory::GuestMemoryRegion) -> u64 {
    region.start_addr().0 + region.len()
}

fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    use vm_memory::GuestMemoryRegion as _;
    let mut map = vec![
        MapEntry {
            start: 0,
            size: LOW_END,
            kind: MapKind::Ram,
        },
        MapEntry {
            start: acpi::RSDP,
            size: KERNEL - acpi::RSDP,
            kind: MapKind::Reserved,
        },
        MapEntry {
            start: KERNEL,
            size: low_memory(memory) - KERNEL,
            kind: MapKind::Ram,
        },
    ];
    for region in memory
        .iter()
        .filter(|region| (memory::HIGH_MEMORY_START..memory::HOTPLUG_START).contains(&region.start_addr().0))
    {
        map.push(MapEntry {
            start: region.start_addr().0,
            size: region.len(),
            kind: MapKind::Ram,
        });
    }
    map
}

/// Descriptors as both protocols want them: `__BOOT_CS` = 0x10, `__BOOT_DS` = 0x18, a TSS at 0x20.
pub(crate) mod descriptors {
    /// Selector of the code segment.
    pub const CODE: u16 = 0x10;
    /// Selector of the data segments.
    pub const DATA: u16 = 0x18;
    /// Selector of the task state segment.
    pub const TASK: u16 = 0x20;
    /// 64-bit code, flat.
    pub const CODE64: u64 = 0x00af_9b00_0000_ffff;
    /// 32-bit code, flat.
    pub const CODE32: u64 = 0x00cf_9b00_0000_ffff;
    /// Data, flat.
    pub const DATA32: u64 = 0x00cf_9300_0000_ffff;
    /// Busy 32-bit or 64-bit TSS at 0, which nothing uses but the processor's entry checks.
    pub const TSS: u64 = 0x0000_8b00_0000_0067;
}

/// Writes the GDT for an entry and, for 64-bit mode, the identity map.
///
/// # Errors
/// There is no memory there.
pub fn write_tables(memory: &GuestMemory, entry: Entry) -> Result<(), Error> {
    let code = match entry {
        Entry::Linux64 { .. } => descriptors::CODE64,
        Entry::Pvh { .. } => descriptors::CODE32,
    };
    let gdt: Vec<u8> = [0, 0, code, descriptors::DATA32, descriptors::TSS, 0]
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect();
    put(memory, "the GDT", GDT, &gdt)?;
    reset_vector::write(memory)?;
    match entry {
        Entry::Linux64 { .. } => put(memory, "page tables", PAGE_TABLES, &identity_map()),
        Entry::Pvh { .. } => Ok(()),
    }
}

/// One PML4, one PDPT, four page directories of 2 MiB pages: the first 4 GiB.
// All indices are below 6 * 512.
#[allow(clippy::cast_possible_truncation)]
fn identity_map() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const ENTRIES: u64 = 512;
    let mut tables = vec![0; 6 * ENTRIES as usize];
    tables[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for directory in 0..4 {
        tables[(ENTRIES + directory) as usize] = (PAGE_TABLES + (2 + directory) * PAGE) | PRESENT_WRITABLE;
    }
    for page in 0..4 * ENTRIES {
        tables[(2 * ENTRIES + page) as usize] = (page << 21) | PRESENT_WRITABLE | LARGE;
    }
    tables.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Anonymous, MemorySource, layout};
    use std::io::Write;

    fn memory(size: u64) -> GuestMemory {
        Anonymous.map(&layout(size)).unwrap()
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// An ELF file with one segment at `address` and its entry there.
    fn elf(address: u64, code: &[u8], memory_size: u64) -> Vec<u8> {
        let mut elf = vec![0; 120];
        elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        for (offset, value) in [
            (24, address),
            (32, 64),
            (72, 120),
            (80, address),
            (88, address),
            (96, code.len() as u64),
            (104, memory_size),
        ] {
            elf[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }
        for (offset, value) in [(16, 2u16), (18, 62), (52, 64), (54, 56), (56, 1), (64, 1)] {
            elf[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
        }
        elf.extend_from_slice(code);
        elf
    }

    fn load_elf(image: &[u8], initrd: Option<&[u8]>) -> Result<Entry, Error> {
        let memory = memory(16 << 20);
        load(
            &memory,
            Request {
                kernel: file(image),
                initrd: initrd.map(file),
                cmdline: "quiet",
            },
        )
    }

    #[test]
    fn an_elf_without_note_starts_at_its_entry() {
        assert_eq!(
            load_elf(&elf(0x20_0000, b"\xf4", 1), None).unwrap(),
            Entry::Linux64 { address: 0x20_0000 }
        );
    }

    #[test]
    fn the_initrd_lies_at_the_end_of_memory() {
        let memory = memory(16 << 20);
        let initrd = load_initrd(
            &memory,
            file(&[7; 5000]),
            &Image {
                entry: Entry::Linux64 { address: KERNEL },
                end: 0x20_0000,
                initrd_max: u64::MAX,
                header: None,
            },
        )
        .unwrap();
        assert_eq!(
            initrd,
            Initrd {
                start: (16 << 20) - 8192,
                size: 5000
            }
        );
        assert_eq!(memory.read_obj::<u8>(GuestAddress(initrd.start + 4999)).unwrap(), 7);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        for bad in [
            &b""[..],
            b"MZ",
            b"\x7fELF",
            &[0; 4096],
            &elf(0x1000, b"\xf4", 1),
            &elf(0xf_f000_0000, b"\xf4", 1),
        ] {
            assert!(load_elf(bad, None).is_err());
        }
        let mut outside = elf(0x20_0000, b"\xf4", 1);
        outside[24..32].copy_from_slice(&0x30_0000u64.to_le_bytes());
        assert!(matches!(load_elf(&outside, None), Err(Error::Entry(0x30_0000))));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(matches!(
            load_elf(&elf(0x20_0000, b"\xf4", 1 << 40), None),
            Err(Error::TooLarge { .. })
        ));
        let initrd = vec![0; 15 << 20];
        assert!(matches!(
            load_elf(&elf(0x20_0000, b"\xf4", 1), Some(&initrd)),
            Err(Error::TooLarge { .. })
        ));
    }

    #[test]
    fn command_lines_are_checked() {
        let memory = memory(16 << 20);
        for bad in ["x".repeat(2048), "a\0b".to_owned()] {
            let request = Request {
                kernel: file(b""),
                initrd: None,
                cmdline: &bad,
            };
            assert!(matches!(load(&memory, request), Err(Error::CommandLine(_))));
        }
    }

    #[test]
    fn the_map_covers_all_memory_and_reserves_the_tables() {
        let map = memory_map(&memory(memory::LOW_MEMORY_END + (1 << 30)));
        assert_eq!(map.len(), 4);
        assert_eq!(
            map[1],
            MapEntry {
                start: 0xe_0000,
                size: 0x2_0000,
                kind: MapKind::Reserved
            }
        );
        assert_eq!(
            map[3],
            MapEntry {
                start: 1 << 32,
                size: 1 << 30,
                kind: MapKind::Ram
            }
        );
    }
}
