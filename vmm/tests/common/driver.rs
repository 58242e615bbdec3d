//! Guests of a few instructions that drive the first virtio device of their machine.
//!
//! ```text
//! 0x100000  code     0x101000  IDT          0x102000  rings of queue 0     0x106000  rings of queue 1
//! 0x100800  handler  0x101800  IDT pointer  (descriptors, available, used: a page each)
//! 0x109000  what the device reads           0x10a000  what it writes       0x10b000  a block request's status
//! ```

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use flint_api::vmm::{DiskSlot, NetSlot};

use super::guest;

pub const WINDOW: u32 = 0xd000_0000;
pub const WINDOW_BYTES: u32 = 0x1000;
/// Registers (virtio 1.3, 4.2.2).
pub const MAGIC: u32 = 0x00;
pub const VERSION: u32 = 0x04;
pub const DEVICE_ID: u32 = 0x08;
pub const DEVICE_FEATURES: u32 = 0x10;
pub const DEVICE_FEATURES_SEL: u32 = 0x14;
pub const DRIVER_FEATURES: u32 = 0x20;
pub const DRIVER_FEATURES_SEL: u32 = 0x24;
pub const QUEUE_SEL: u32 = 0x30;
pub const QUEUE_SIZE_MAX: u32 = 0x34;
pub const QUEUE_SIZE: u32 = 0x38;
pub const QUEUE_READY: u32 = 0x44;
pub const QUEUE_NOTIFY: u32 = 0x50;
pub const INTERRUPT_STATUS: u32 = 0x60;
pub const INTERRUPT_ACK: u32 = 0x64;
pub const STATUS: u32 = 0x70;
pub const QUEUE_DESC: u32 = 0x80;
pub const QUEUE_DRIVER: u32 = 0x90;
pub const QUEUE_DEVICE: u32 = 0xa0;
pub const CONFIG: u32 = 0x100;

pub const HANDLER: u32 = 0x10_0800;
pub const IDT: u32 = 0x10_1000;
pub const IDT_POINTER: u32 = 0x10_1800;
pub const RINGS: [u32; 2] = [0x10_2000, 0x10_6000];
pub const OUT: u32 = 0x10_9000;
pub const IN: u32 = 0x10_a000;
pub const BLOCK_STATUS: u32 = 0x10_b000;
pub const END: u32 = 0x10_c000;
/// Of the first device, see the machine's devices.
pub const IRQ: u32 = 5;
pub const VECTOR: u32 = 0x30;
pub const END_OF_INTERRUPT: u32 = 0xfee0_00b0;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// mov ebx, address; mov eax, [rbx]; then its four bytes go to the serial line, the lowest first.
pub fn print_word(address: u32) -> Vec<u8> {
    let mut code = vec![0xbb];
    code.extend(address.to_le_bytes());
    code.extend([0x8b, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]);
    for _ in 0..3 {
        code.extend([0xc1, 0xe8, 0x08, 0xee]);
    }
    code
}

pub fn poweroff() -> Vec<u8> {
    guest::out(0x601, 0x34)
}

/// Resets the first device, negotiates VERSION_1 alone, sets up `queues` queues of 8, and sets DRIVER_OK.
pub fn drive(queues: u32) -> Vec<u8> {
    let register = |register, value| guest::store(WINDOW + register, value);
    let mut code = vec![];
    for (at, value) in [
        (STATUS, 0),
        (STATUS, 1),
        (STATUS, 3),
        (DRIVER_FEATURES_SEL, 1),
        (DRIVER_FEATURES, 1),
        (STATUS, 11),
    ] {
        code.extend(register(at, value));
    }
    for (queue, rings) in (0..queues).zip(RINGS) {
        for (at, value) in [
            (QUEUE_SEL, queue),
            (QUEUE_SIZE, 8),
            (QUEUE_DESC, rings),
            (QUEUE_DRIVER, rings + 0x1000),
            (QUEUE_DEVICE, rings + 0x2000),
            (QUEUE_READY, 1),
        ] {
            code.extend(register(at, value));
        }
    }
    code.extend(register(STATUS, 15));
    code
}

/// Local APIC on; the first device's pin to [`VECTOR`]; lidt; the queues' notifications; sti; hlt for ever.
pub fn interrupts_and_notify(queues: u32) -> Vec<u8> {
    const IOAPIC_SELECT: u32 = 0xfec0_0000;
    const IOAPIC_DATA: u32 = 0xfec0_0010;
    // The old interrupt controllers get the same edges: they keep silent (8259A data sheet, OCW1).
    let mut code = [guest::out(0x21, 0xff), guest::out(0xa1, 0xff)].concat();
    for (at, value) in [
        (0xfee0_00f0, 0x1ff),
        (IOAPIC_SELECT, 0x11 + 2 * IRQ),
        (IOAPIC_DATA, 0),
        (IOAPIC_SELECT, 0x10 + 2 * IRQ),
        (IOAPIC_DATA, VECTOR),
    ] {
        code.extend(guest::store(at, value));
    }
    code.extend([0x0f, 0x01, 0x1c, 0x25]);
    code.extend(IDT_POINTER.to_le_bytes());
    for queue in 0..queues {
        code.extend(guest::store(WINDOW + QUEUE_NOTIFY, queue));
    }
    code.extend([0xfb, 0xf4, 0xeb, 0xfd]);
    code
}

/// The start of a handler that returns as long as queue 0 has fewer than `count` used elements: other queues interrupt too.
pub fn acknowledge_until_used(count: u8) -> Vec<u8> {
    let mut code = [
        guest::store(WINDOW + INTERRUPT_ACK, 3),
        guest::store(END_OF_INTERRUPT, 0),
    ]
    .concat();
    // cmp word [used index], count; jae over it; iretq
    code.extend([0x66, 0x83, 0x3c, 0x25]);
    code.extend((RINGS[0] + 0x2002).to_le_bytes());
    code.extend([count, 0x73, 0x02, 0x48, 0xcf]);
    code
}

/// An image of everything between the code and [`END`].
pub struct Image(pub Vec<u8>);

impl Image {
    pub fn new(code: &[u8], handler: &[u8]) -> Self {
        let mut image = Self(vec![0; (END - 0x10_0000) as usize]);
        assert!(code.len() <= 0x800 && handler.len() <= 0x800);
        image.put(0x10_0000, code);
        image.put(HANDLER, handler);
        // An interrupt gate (SDM volume 3, 7.14.1): selector 0x10 is the code segment of the entry.
        let gate = u64::from(HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(HANDLER >> 16) << 48;
        image.put(IDT + VECTOR * 16, &gate.to_le_bytes());
        image.put(IDT_POINTER, &0x7ffu16.to_le_bytes());
        image.put(IDT_POINTER + 2, &IDT.to_le_bytes());
        image
    }

    pub fn put(&mut self, address: u32, bytes: &[u8]) {
        let at = (address - 0x10_0000) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Descriptors, of which `heads` begin chains that are available.
    pub fn ring(&mut self, queue: usize, descriptors: &[(u32, u32, u16)], heads: &[u16]) {
        let rings = RINGS[queue];
        for ((index, address), (at, len, flags)) in (1u16..).zip((rings..).step_by(16)).zip(descriptors) {
            self.put(address, &u64::from(*at).to_le_bytes());
            self.put(address + 8, &len.to_le_bytes());
            self.put(address + 12, &flags.to_le_bytes());
            self.put(address + 14, &index.to_le_bytes());
        }
        self.put(rings + 0x1002, &u16::try_from(heads.len()).unwrap().to_le_bytes());
        for (address, head) in (rings + 0x1004..).step_by(2).zip(heads) {
            self.put(address, &head.to_le_bytes());
        }
    }
}

pub fn words<const N: usize>(serial: &mut UnixStream) -> [u32; N] {
    serial.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    [(); N].map(|()| {
        let mut bytes = [0; 4];
        serial.read_exact(&mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    })
}

pub fn disk_slot() -> DiskSlot {
    DiskSlot {
        serial: "scratch".into(),
        ..Default::default()
    }
}

pub fn net_slot() -> NetSlot {
    NetSlot {
        mac: vec![2, 0, 0, 0, 0, 1],
    }
}
