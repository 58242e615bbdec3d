//! The file in which flint-vmm leaves why it ended, as whoever comes later reads it.
#![no_main]

use flint_api::vmm::{ExitReason, Exited};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(exited) = Exited::decode(bytes) {
        let _: ExitReason = exited.reason();
        assert_eq!(Exited::decode(&exited.encode_to_vec()[..]).as_ref(), Ok(&exited));
    }
});
