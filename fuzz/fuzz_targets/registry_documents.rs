//! What registries answer with: manifests, indexes, configurations; and docker's configuration file.
#![no_main]

use flint_snapshots::fuzzing::{docker_configuration, image_configuration, registry_document};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    registry_document(bytes);
    image_configuration(bytes);
    docker_configuration(bytes, "registry.example:5000");
});
