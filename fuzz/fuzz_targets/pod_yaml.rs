//! Pods as people write them.
#![no_main]

use flint_api::kubernetes::pods_from_yaml;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // An error has to name something.
    if let Err(error) = pods_from_yaml(text) {
        assert!(!error.to_string().is_empty());
    }
});
