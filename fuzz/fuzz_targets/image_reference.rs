//! Names of images, as people type them.
#![no_main]

use flint_snapshots::registry::ImageReference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<ImageReference>() {
        // What is taken has a form that is taken again and means the same: records of the store are kept under it.
        let complete = reference.to_string();
        assert_eq!(
            complete.parse().as_ref(),
            Ok(&reference),
            "{text:?} became {complete:?}"
        );
    }
});
