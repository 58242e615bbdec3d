//! What is known of an image.

use std::collections::BTreeMap;
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::registry::Digest;

/// An image that is on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the manifest for this platform.
    pub digest: Digest,
    /// Its names, complete ("docker.io/library/busybox:latest"), sorted.
    #[serde(skip)]
    pub references: Vec<String>,
    /// How its containers run unless told otherwise.
    pub config: ImageConfig,
    /// Its layers' diff ids, lowest first.
    pub layers: Vec<Digest>,
    /// Size of its layers as they were fetched.
    pub compressed_bytes: u64,
    /// Size of the block device.
    pub device_bytes: u64,
    /// What its chunks take in the store, those shared with other images counted in full.
    pub stored_bytes: u64,
    /// When it was made, as its configuration says (RFC 3339).
    pub created: Option<String>,
    /// When it came to this host.
    pub pulled_at: SystemTime,
    /// Whether somebody holds it.
    #[serde(skip)]
    pub in_use: bool,
}

/// How an image wants to be run (OCI image spec, "Properties", `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What is executed; `cmd` follows as arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or what is executed if there is no entrypoint.
    pub cmd: Vec<String>,
    /// "NAME=value".
    pub env: Vec<String>,
    /// "user", "uid", "user:group", "uid:gid"; empty: root.
    pub user: String,
    /// Where it starts; empty: the root.
    pub working_dir: String,
    /// The signal that asks it to end, by name or number; empty: TERM.
    pub stop_signal: String,
    /// "80/tcp".
    pub exposed_ports: Vec<String>,
    /// Folders that want a volume.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl From<&ImageConfiguration> for ImageConfig {
    fn from(image: &ImageConfiguration) -> Self {
        let Some(config) = image.config() else {
            return Self::default();
        };
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        let sorted = |all: &Option<Vec<String>>| {
            let mut all = list(all);
            all.sort_unstable();
            all
        };
        Self {
            entrypoint: list(config.entrypoint()),
            cmd: list(config.cmd()),
            env: list(config.env()),
            user: config.user().clone().unwrap_or_default(),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            stop_signal: config.stop_signal().clone().unwrap_or_default(),
            exposed_ports: sorted(config.exposed_ports()),
            volumes: sorted(config.volumes()),
            labels: config.labels().clone().unwrap_or_default().into_iter().collect(),
        }
    }
}
