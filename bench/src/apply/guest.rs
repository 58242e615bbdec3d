//! A guest of a few instructions that dials as flint-init does, so that flintd takes it for a template, and tells when it goes on in
//! a clone.
//!
//! ```text
//!      mov ebx, first window
//!   1: cmp [rbx + DeviceID], vsock  whichever slot it has
//!      je 2f
//!      add rbx, a window
//!      jmp 1b
//!   2: ...                          rings, driver's negotiation, a packet that asks for a stream to flintd
//!      mov rcx, [GENERATION]        from here on as in `claim::guest`
//! ```

use crate::tiny::{CLONE, Code};

/// The windows of virtio devices, and what is in them (virtio 1.3, 4.2.2).
const WINDOWS: u32 = 0xd000_0000;
const WINDOW_BYTES: u32 = 0x1000;
const DEVICE_ID: u8 = 0x08;
const VSOCK: u8 = 19;
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SELECT: u32 = 0x24;
const QUEUE_SELECT: u32 = 0x30;
const QUEUE_SIZE: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const QUEUE_NOTIFY: u32 = 0x50;
const STATUS: u32 = 0x70;
/// Addresses of a queue's three parts.
const QUEUE_PARTS: [u32; 3] = [0x80, 0x90, 0xa0];

/// Rings of queue 0 (to the guest) and 1 (from it), a page for each of their parts; then the packet and the buffers.
const RINGS: [u32; 2] = [0x20_0000, 0x20_4000];
const PAGE: u32 = 0x1000;
const PACKET: u32 = 0x20_8000;
const BUFFERS: u32 = 0x20_9000;
const BUFFER_BYTES: u32 = 0x800;
/// struct virtio_vsock_hdr (virtio 1.3, 5.10.6).
const HEADER_BYTES: u32 = 44;

/// The guest as an ELF file.
pub fn kernel() -> Vec<u8> {
    let mut code = Code::default();
    rings(&mut code);
    code.find_window(WINDOWS, WINDOW_BYTES, DEVICE_ID, VSOCK);
    dial(&mut code);
    code.remember_generation();
    code.await_generation();
    code.out(CLONE);
    code.halt();
    code.elf()
}

/// A packet that asks for CID 2, port 1024, from port 5000; two buffers for answers.
fn rings(code: &mut Code) {
    const WRITE: u32 = 2;
    let descriptors = [
        (RINGS[0], BUFFERS, BUFFER_BYTES, WRITE),
        (RINGS[0] + 16, BUFFERS + BUFFER_BYTES, BUFFER_BYTES, WRITE),
        (RINGS[1], PACKET, HEADER_BYTES, 0),
    ];
    for (at, address, length, flags) in descriptors {
        code.store(at, address);
        code.store(at + 8, length);
        code.store(at + 12, flags);
    }
    // Source and destination CID, both ports, a stream's request, room for its answer.
    let request = [
        (0, 3),
        (8, 2),
        (16, 5000),
        (20, flint_api::guest::PORT),
        (28, 1 | 1 << 16),
        (36, 0x1_0000),
    ];
    for (offset, value) in request {
        code.store(PACKET + offset, value);
    }
    // Available: flags and index, then descriptors 0 and 1.
    code.store(RINGS[0] + PAGE, 2 << 16);
    code.store(RINGS[0] + PAGE + 4, 1 << 16);
    code.store(RINGS[1] + PAGE, 1 << 16);
}

/// Negotiates VIRTIO_F_VERSION_1 (3.1.1), sets up both queues, and sends.
fn dial(code: &mut Code) {
    let start = [
        (STATUS, 0),
        (STATUS, 1),
        (STATUS, 3),
        (DRIVER_FEATURES_SELECT, 1),
        (DRIVER_FEATURES, 1),
        (STATUS, 11),
    ];
    for (register, value) in start {
        code.store_in_window(register, value);
    }
    for (queue, rings) in (0..).zip(RINGS) {
        code.store_in_window(QUEUE_SELECT, queue);
        code.store_in_window(QUEUE_SIZE, 2);
        for (part, register) in (0..).zip(QUEUE_PARTS) {
            code.store_in_window(register, rings + part * PAGE);
        }
        code.store_in_window(QUEUE_READY, 1);
    }
    code.store_in_window(STATUS, 15);
    code.store_in_window(QUEUE_NOTIFY, 0);
    code.store_in_window(QUEUE_NOTIFY, 1);
}
