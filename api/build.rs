//! Compiles the .proto files with a compiler written in Rust, so that no `protoc` is needed to build Flint.

use std::{env, error::Error, fs, path::PathBuf};

use protox::prost::Message as _;

const CONTRACTS: [(&str, &[&str]); 3] = [
    ("VMM", &["flint/vmm/v1/vmm.proto"]),
    ("GUEST", &["flint/guest/v1/guest.proto"]),
    (
        "HOST",
        &[
            "flint/host/v1/host.proto",
            "flint/host/v1/pods.proto",
            "flint/host/v1/streams.proto",
            "flint/host/v1/images.proto",
            "flint/host/v1/snapshots.proto",
            "flint/host/v1/store.proto",
        ],
    ),
];

/// Messages that hold secrets: what they look like in a log is written by hand.
const SECRET: [&str; 8] = [
    ".flint.host.v1.RegistryCredentials",
    ".flint.host.v1.PodMaterials",
    ".flint.host.v1.ConfigMap",
    ".flint.host.v1.Secret",
    ".flint.guest.v1.Materials",
    ".flint.guest.v1.ConfigMap",
    ".flint.guest.v1.Secret",
    ".flint.guest.v1.ProjectedVolume",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (feature, files) in CONTRACTS {
        if env::var_os(format!("CARGO_FEATURE_{feature}")).is_none() {
            continue;
        }
        let descriptors = protox::compile(files.iter().copied(), ["proto"])?;
        fs::write(
            out.join(format!("{}.bin", feature.to_lowercase())),
            descriptors.encode_to_vec(),
        )?;
        tonic_prost_build::configure()
            .build_transport(false)
            .skip_debug(SECRET)
            .compile_fds(descriptors)?;
    }
    Ok(())
}
