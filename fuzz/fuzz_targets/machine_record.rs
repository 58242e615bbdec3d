//! The record of a machine snapshot, which may come from any registry. What is taken comes back as it was.
#![no_main]

use flint_snapshots::fuzzing::machine_record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| assert!(machine_record(data)));
