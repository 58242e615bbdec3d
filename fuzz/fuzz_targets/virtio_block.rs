//! A disk under a driver that does whatever it likes: a file, or an image by the input's first bit.
#![no_main]

use flint_fuzz::chunks::file_with;
use flint_fuzz::virtio::{Script, run};
use flint_vmm::virtio::Device;
use flint_vmm::virtio::block::{Block, BlockResource, BlockSlot};
use flint_vmm::virtio::rate_limit::RateLimit;
use libfuzzer_sys::fuzz_target;

static DISK: [u8; 64 << 10] = [7; 64 << 10];

fuzz_target!(|input: (bool, u8, Script)| {
    let (read_only, queues, script) = input;
    let slot = BlockSlot {
        serial: "fuzz".to_owned(),
        read_only,
        queues: 1 + u16::from(queues % 3),
    };
    let mut device = Block::new(slot).expect("a good slot");
    let disk = BlockResource::raw_file(file_with(&DISK), false, RateLimit::default()).expect("io_uring");
    device.bind(disk).expect("an empty slot");
    run(&mut device, &script, |_| ());
});
