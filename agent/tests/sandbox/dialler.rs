//! A guest of a few instructions that dials as flint-init does.

use super::guest;

/// The window of the first device, the distance to the next, and where a disk's capacity is (virtio 1.3, 4.2.2).
const WINDOW: u32 = 0xd000_0000;
const WINDOW_BYTES: u32 = 0x1000;
const CONFIG: u32 = 0x100;
/// Rings of queue 0 (to the guest) and 1 (from it): descriptors, available, used, a page each. Then the packets.
const RINGS: [u32; 2] = [0x20_0000, 0x20_4000];
const PACKETS: [u32; 2] = [0x20_8000, 0x20_8100];
const BUFFER: u32 = 0x20_9000;

/// Dials, by the vsock device behind so many images, the scratch disk and the network; waits until the first disk has a capacity; says so;
/// and dials again if it is `eager`.
pub fn dialler(images: u32, eager: bool) -> Vec<u8> {
    let vsock = WINDOW + (images + 2) * WINDOW_BYTES;
    let mut code = Vec::new();
    let mut store = |address, value| code.extend(guest::store(address, value));
    for (queue, rings) in (0..).zip(RINGS) {
        for (index, packet) in (0..).zip(PACKETS) {
            let (at, length, flags) = if queue == 0 {
                (BUFFER + 0x800 * index, 0x800, 2)
            } else {
                (packet, 44, 0)
            };
            store(rings + 16 * index, at);
            store(rings + 16 * index + 8, length);
            store(rings + 16 * index + 12, flags);
        }
        // Both descriptors, one after the other, of which the second packet is not there yet.
        store(rings + 0x1004, 1 << 16);
    }
    // struct virtio_vsock_hdr (virtio 1.3, 5.10.6): CID 3, a port each, asks for CID 2, port 1024, as a stream.
    for (index, packet) in (0..).zip(PACKETS) {
        for (offset, value) in [
            (0, 3),
            (8, 2),
            (16, 5000 + index),
            (20, 1024),
            (28, 1 | 1 << 16),
            (36, 0x1_0000),
        ] {
            store(packet + offset, value);
        }
    }
    store(RINGS[0] + 0x1000, 2 << 16);
    store(RINGS[1] + 0x1000, 1 << 16);
    for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
        store(vsock + register, value);
    }
    for (queue, rings) in (0..).zip(RINGS) {
        for (register, value) in [
            (0x30, queue),
            (0x38, 2),
            (0x80, rings),
            (0x90, rings + 0x1000),
            (0xa0, rings + 0x2000),
            (0x44, 1),
        ] {
            store(vsock + register, value);
        }
    }
    store(vsock + 0x70, 15);
    store(vsock + 0x50, 0);
    store(vsock + 0x50, 1);
    // mov ebx, capacity; cmp dword [rbx], 0; je to the comparison
    code.push(0xbb);
    code.extend((WINDOW + CONFIG).to_le_bytes());
    code.extend([0x83, 0x3b, 0x00, 0x74, 0xfb]);
    code.extend(guest::print("up"));
    if eager {
        code.extend(guest::store(RINGS[1] + 0x1000, 2 << 16));
        code.extend(guest::store(vsock + 0x50, 1));
    }
    code.extend(guest::halt());
    guest::elf(&code)
}
