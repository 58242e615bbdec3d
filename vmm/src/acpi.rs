//! ACPI tables: hardware-reduced (ACPI 6.5, 4.1), so that a guest needs no timer, no PIC and no fixed hardware.
//!
//! ```text
//! 0xe0000  RSDP --> XSDT --> FADT --> DSDT     \_SB: COM1, pvpanic, one LNRO0005 for each virtio-mmio device,
//!                     |                               VM generation id, the event device that notifies it; \_S5
//!                     +----> MADT              one local APIC for each vCPU, the IOAPIC
//! 0xfe000  generation id (see `platform`)
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{self, GuestMemory};
use crate::platform;
use crate::ports;
use crate::ports::power::{ACPI_RESET_VALUE, SLEEP_TYPE_S5};

/// Where the RSDP is: the first address of the area that a BIOS would use (ACPI 6.5, 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
const TABLES: u64 = RSDP + 0x40;
const END: u64 = platform::GENERATION_PAGE;

const OEM: [u8; 6] = *b"FLINT ";
const OEM_TABLE: [u8; 8] = *b"FLINTVMM";
const HEADER: u32 = 36;
/// FADT boot flags (ACPI 6.5, table 5.11): no VGA, no CMOS clock; a keyboard controller is not announced either.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;

/// Tables that cannot be put into guest memory.
#[derive(Debug, Error)]
pub enum Error {
    /// They do not fit below the generation id.
    #[error("ACPI tables of {0} bytes do not fit below the generation id")]
    TooLarge(u64),
    /// There is no memory there.
    #[error("writing ACPI tables at {address:#x}")]
    Write {
        /// Where.
        address: u64,
        /// Why not.
        source: GuestMemoryError,
    },
}

/// A virtio-mmio device as the guest has to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioWindow {
    /// First address of its registers.
    pub base: u32,
    /// Its interrupt, edge triggered; devices may share one.
    pub irq: u32,
}

/// Writes all tables for a machine with `vcpus` vCPUs and these virtio devices.
///
/// # Errors
/// They do not fit.
pub fn write(memory: &GuestMemory, vcpus: u8, devices: &[VirtioWindow]) -> Result<(), Error> {
    let mut writer = Writer { memory, next: TABLES };
    let dsdt = writer.place(dsdt(devices).as_slice())?;
    let fadt = writer.place(&bytes(&fadt(dsdt)))?;
    let madt = writer.place(&bytes(&madt(vcpus)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.place(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    put(memory, RSDP, &rsdp)
}

struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, Error> {
        let address = self.next;
        let end = address + table.len() as u64;
        if end > END {
            return Err(Error::TooLarge(end - RSDP));
        }
        put(self.memory, address, table)?;
        self.next = end.next_multiple_of(16);
        Ok(address)
    }
}

fn put(memory: &GuestMemory, address: u64, data: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(data, GuestAddress(address))
        .map_err(|source| Error::Write { address, source })
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let register = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // No fixed power or sleep button (both bits mean "not fixed hardware").
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = register(ports::ACPI_RESET);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = register(ports::ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = register(ports::ACPI_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"FLINTVMM").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        1,
        LocalInterruptController::Address(memory::LOCAL_APIC_BASE),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, memory::IOAPIC_BASE, 0));
    madt
}

fn dsdt(devices: &[VirtioWindow]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, OEM_TABLE, 1);
    let mut content = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        virtio(index, *device, &mut content);
    }
    com1(&mut content);
    pvpanic(&mut content);
    generation(&mut content);
    events(&mut content);
    dsdt.append_slice(&aml::Scope::raw(Path::new("\\_SB_"), content));
    let s5 = aml::Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    dsdt.append_slice(&bytes(&aml::Name::new(Path::new("\\_S5_"), &s5)));
    dsdt
}

fn virtio(index: usize, window: VirtioWindow, out: &mut Vec<u8>) {
    // memory::VIRTIO_WINDOW is a small constant.
    #[allow(clippy::cast_possible_truncation)]
    let registers = aml::Memory32Fixed::new(true, window.base, memory::VIRTIO_WINDOW as u32);
    let interrupt = aml::Interrupt::new(true, true, false, true, window.irq);
    aml::Device::new(
        Path::new(&format!("V{index:03X}")),
        vec![
            &aml::Name::new(Path::new("_HID"), &"LNRO0005"),
            &aml::Name::new(Path::new("_UID"), &index),
            &aml::Name::new(Path::new("_CCA"), &aml::ONE),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn com1(out: &mut Vec<u8>) {
    let registers = aml::IO::new(ports::COM1, ports::COM1, 1, 8);
    let interrupt = aml::Interrupt::new(true, true, false, false, ports::COM1_IRQ);
    aml::Device::new(
        Path::new("COM1"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn pvpanic(out: &mut Vec<u8>) {
    /// Present, enabled, decoding its resources, functioning, but not shown to people (ACPI 6.5, 6.3.7).
    const STATUS: u8 = 0b1011;
    let register = aml::IO::new(ports::PVPANIC, ports::PVPANIC, 1, 1);
    aml::Device::new(
        Path::new("PEVT"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"QEMU0001"),
            &aml::Name::new(Path::new("_STA"), &STATUS),
            &aml::Name::new(Path::new("_CRS"), &aml::ResourceTemplate::new(vec![&register])),
        ],
    )
    .to_aml_bytes(out);
}

/// The VM generation id, with the names that Microsoft's document gives and the shorter one that Hyper-V adds, because an id
/// of more than eight characters is none to ACPI (6.1.5).
fn generation(out: &mut Vec<u8>) {
    const NAME: &str = "VM_Gen_Counter";
    let (low, high) = (platform::GENERATION_PAGE, 0u8);
    aml::Device::new(
        Path::new("VGEN"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"VMGENCTR"),
            &aml::Name::new(Path::new("_CID"), &NAME),
            &aml::Name::new(Path::new("_DDN"), &NAME),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(Path::new("ADDR"), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(out);
}

/// The generic event device (ACPI 6.5, 5.6.9): its interrupt has the guest evaluate `_EVT`, which notifies the generation id
/// (0x80: it has changed).
fn events(out: &mut Vec<u8>) {
    const CHANGED: u8 = 0x80;
    let interrupt = aml::Interrupt::new(true, true, false, false, platform::EVENT_IRQ);
    let device = Path::new("\\_SB_.VGEN");
    let notify = aml::Notify::new(&device, &CHANGED);
    let is_ours = aml::Equal::new(&aml::Arg(0), &platform::EVENT_IRQ);
    aml::Device::new(
        Path::new("GED0"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"ACPI0013"),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(Path::new("_CRS"), &aml::ResourceTemplate::new(vec![&interrupt])),
            &aml::Method::new(Path::new("_EVT"), 1, true, vec![&aml::If::new(&is_ours, vec![&notify])]),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Anonymous, MemorySource, layout};

    fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length = memory.read_obj::<u32>(GuestAddress(address + 4)).unwrap();
        let table = read(memory, address, length as usize);
        assert_eq!(
            table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0,
            "checksum of {address:#x}"
        );
        table
    }

    fn word(table: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn a_guest_finds_every_table_from_the_rsdp() {
        let memory = Anonymous.map(&layout(16 << 20)).unwrap();
        let devices: Vec<_> = (0..40)
            .map(|n| VirtioWindow {
                base: 0xd000_0000 + n * 0x1000,
                irq: 5 + n % 19,
            })
            .collect();
        write(&memory, 32, &devices).unwrap();

        let rsdp = read(&memory, RSDP, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, word(&rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let (fadt, madt) = (table(&memory, word(&xsdt, 36)), table(&memory, word(&xsdt, 44)));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(&memory, word(&fadt, 140));
        assert_eq!(dsdt.windows(8).filter(|window| window == b"LNRO0005").count(), 40);
        assert!(
            ["VMGENCTR", "ACPI0013"]
                .iter()
                .all(|id| dsdt.windows(8).any(|window| window == id.as_bytes()))
        );
    }

    #[test]
    fn tables_that_do_not_fit_are_an_error() {
        let memory = Anonymous.map(&layout(16 << 20)).unwrap();
        let devices = vec![VirtioWindow { base: 0, irq: 5 }; 4000];
        assert!(matches!(write(&memory, 1, &devices), Err(Error::TooLarge(_))));
    }
}
