//! The entropy device under a driver that does whatever it likes.
#![no_main]

use flint_fuzz::virtio::{Script, run};
use flint_vmm::virtio::rate_limit::RateLimit;
use flint_vmm::virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: Script| {
    let mut device = Rng::new(RateLimit::default()).expect("descriptors");
    run(&mut device, &script, |_| ());
});
