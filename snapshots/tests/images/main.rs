//! The image store against a real registry (Debian's docker-registry), with images pushed by skopeo, and with everything
//! that can go wrong between the two.
#![cfg(feature = "store")]
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod access;
mod auth;
mod build;
mod crash;
mod demand;
mod faults;
mod hostile;
mod kinds;
mod layers;
mod local;
mod machines;
mod moves;
mod proxy;
mod pull;
mod registry;
mod route;
mod token;

use std::path::Path;
use std::time::Duration;

use flint_snapshots::device::ImageDevice;
use flint_snapshots::images::{
    DemandOptions, DeviceFiles, Image, ImageError, ImageStore, ImageStoreOptions, PullPolicy, PullRequest,
};
use flint_snapshots::registry::{Credentials, RegistryConfig, Retries, Timeouts};
use flint_snapshots::store::StoreOptions;

/// Options for tests: small reserve, no docker configuration of whoever runs them, short pauses.
pub fn options(dir: &Path) -> ImageStoreOptions {
    let docker_config = dir.join("docker.json");
    if !docker_config.exists() {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(&docker_config, "{}").unwrap();
    }
    ImageStoreOptions {
        store: StoreOptions {
            reserve_bytes: 1 << 20,
            ..StoreOptions::default()
        },
        registry: RegistryConfig {
            docker_config: Some(docker_config),
            retries: Retries {
                attempts: 3,
                base: Duration::from_millis(5),
                max: Duration::from_millis(50),
            },
            timeouts: Timeouts {
                first_byte: Duration::from_secs(10),
                stall: Duration::from_secs(10),
                ..Timeouts::default()
            },
            ..RegistryConfig::default()
        },
        demand: DemandOptions {
            deadline: Duration::from_secs(20),
        },
    }
}

pub async fn open(dir: &Path) -> ImageStore {
    ImageStore::open(dir, options(dir)).await.unwrap()
}

pub fn request(reference: impl Into<String>) -> PullRequest {
    PullRequest {
        reference: reference.into(),
        credentials: None,
        policy: PullPolicy::Always,
    }
}

pub fn with_credentials(reference: impl Into<String>, username: &str, password: &str) -> PullRequest {
    let credentials = Credentials {
        username: username.to_owned(),
        password: password.to_owned(),
    };
    PullRequest {
        credentials: Some(credentials),
        ..request(reference)
    }
}

pub async fn pull(store: &ImageStore, reference: &str) -> Result<Image, std::sync::Arc<ImageError>> {
    store.pull(request(reference)).unwrap().finish().await
}

/// An error with its causes, as a user sees it.
pub fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// All bytes of an image's device, as a VMM would read them.
pub fn read_device(files: DeviceFiles) -> Vec<u8> {
    let device = ImageDevice::open(files.table, files.packs).unwrap();
    let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
    device.read_at(0, &mut bytes).unwrap();
    bytes
}

/// The device is an EROFS and has `content` somewhere in it.
pub async fn assert_serves(store: &ImageStore, image: &Image, content: &[u8]) {
    let bytes = read_device(store.device(image.digest).await.unwrap());
    assert_eq!(bytes[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes(), "no EROFS superblock");
    assert_eq!(bytes.len() as u64, image.device_bytes);
    assert!(
        bytes.windows(content.len()).any(|window| window == content),
        "the content is not on the device"
    );
}

/// Nothing of a failed pull is visible, and the store works: another image can be pulled.
pub async fn assert_clean(store: &ImageStore) {
    assert_eq!(store.list().await.unwrap(), []);
    let tables = std::fs::read_dir(store.chunks().dir().join("tables")).unwrap();
    assert_eq!(tables.count(), 0, "a table was left behind");
}
