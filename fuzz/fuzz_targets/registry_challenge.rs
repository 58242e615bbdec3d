//! The header by which a registry says what it wants to be shown.
#![no_main]

use flint_snapshots::fuzzing::challenge;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|header: &str| {
    if let Some(address) = challenge(header) {
        assert!(
            address.starts_with("http://") || address.starts_with("https://"),
            "a token would be fetched from {address}"
        );
    }
});
