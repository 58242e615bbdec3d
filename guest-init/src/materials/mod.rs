//! ConfigMaps, secrets and tokens of the pod, and what is made of them: environments and files.
//!
//! ```text
//! SetMaterials --> store (memory of PID 1) --CreateContainer--> environment, args, sub-paths     once for each container
//!                                          \-------------------> files of projected volumes      again with each SetMaterials
//! ```
//!
//! They are kept here, and nowhere on the host, so that a container can be made anew whoever asks for it: a flintd that was
//! started after the pod was, or one that has a fork of it.

mod environment;
mod expand;
mod files;
mod volume;

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc};

use flint_api::guest::{CreateContainerRequest, Materials, ProjectedVolume, SetMaterialsRequest, mount::Source};
use nix::mount::MsFlags;
use tokio::sync::Mutex;
use tonic::Status;

use crate::{
    error_chain::chain,
    paths::{self, BadName, Name},
};

/// What a container's configuration refers to and is not there, in Kubernetes' words.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Why materials could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum MaterialsError {
    /// A volume's name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A file's path.
    #[error("volume {volume}: {path:?} is not a relative path without \"..\"")]
    Path { volume: String, path: String },
    /// A container mounts what was never defined.
    #[error("volume {0} is not known; hand it over with SetMaterials first")]
    Unknown(String),
    /// The volume's files.
    #[error("volume {volume}: writing its files")]
    Files {
        volume: String,
        #[source]
        source: io::Error,
    },
}

impl From<MaterialsError> for Status {
    fn from(error: MaterialsError) -> Self {
        let text = chain(&error);
        match error {
            MaterialsError::Name(_) | MaterialsError::Path { .. } => Self::invalid_argument(text),
            MaterialsError::Unknown(_) => Self::failed_precondition(text),
            MaterialsError::Files { .. } => Self::internal(text),
        }
    }
}

/// Either.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The user's part.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Ours.
    #[error(transparent)]
    Materials(#[from] MaterialsError),
}

/// What is known, and which volumes are made.
#[derive(Debug, Default, Clone)]
pub struct Store(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    version: u64,
    materials: Materials,
    volumes: BTreeMap<String, Volume>,
}

#[derive(Debug, Default)]
struct Volume {
    definition: ProjectedVolume,
    /// Is it mounted? Then its files follow.
    made: bool,
}

impl Store {
    /// Takes what the host hands over, unless newer materials are known; answers with the version that is known now.
    pub async fn set(&self, request: SetMaterialsRequest) -> Result<u64, MaterialsError> {
        for volume in &request.volumes {
            volume::check(volume)?;
        }
        let mut known = self.0.lock().await;
        let newer = request.version == 0 || request.version > known.version;
        if let Some(materials) = request.materials.filter(|_| newer) {
            known.version = match request.version {
                0 => known.version.saturating_add(1),
                version => version,
            };
            known.materials = materials;
        }
        for definition in request.volumes {
            let volume = known.volumes.entry(definition.name.clone()).or_default();
            volume.definition = definition;
        }
        let Known {
            materials,
            volumes,
            version,
        } = &*known;
        for volume in volumes.values().filter(|volume| volume.made) {
            match volume::render(&volume.definition, materials) {
                Ok(files) => publish(&volume.definition, files).await?,
                // As a kubelet does: what is there stays until what is missing comes.
                Err(missing) => eprintln!("flint-init: {missing}"),
            }
        }
        Ok(*version)
    }

    /// Resolves what a request leaves to the materials, and makes the volumes that it mounts.
    pub async fn prepare(&self, request: &mut CreateContainerRequest) -> Result<(), PrepareError> {
        let mut known = self.0.lock().await;
        let Known { materials, volumes, .. } = &mut *known;
        environment::apply(request, materials)?;
        for mount in &request.mounts {
            let Some(Source::ProjectedVolume(name)) = &mount.source else {
                continue;
            };
            let volume = volumes
                .get_mut(name)
                .ok_or_else(|| MaterialsError::Unknown(name.clone()))?;
            if volume.made {
                continue;
            }
            let files = volume::render(&volume.definition, materials)?;
            mount_tmpfs(name)?;
            publish(&volume.definition, files).await?;
            volume.made = true;
        }
        Ok(())
    }
}

/// Secrets must not be on a disk, whatever the pod's scratch is.
fn mount_tmpfs(name: &str) -> Result<(), MaterialsError> {
    let failed = |source| MaterialsError::Files {
        volume: name.to_owned(),
        source,
    };
    let path = paths::projected_volume(&Name::parse("volume", name)?);
    if path.is_dir() {
        // An earlier try came so far.
        return Ok(());
    }
    std::fs::create_dir_all(&path).map_err(failed)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    nix::mount::mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some("mode=0755"))
        .map_err(|error| failed(error.into()))
}

async fn publish(definition: &ProjectedVolume, files: files::Files) -> Result<(), MaterialsError> {
    let root: PathBuf = paths::projected_volume(&Name::parse("volume", &definition.name)?);
    let written = tokio::task::spawn_blocking(move || files::publish(&root, &files)).await;
    let written = written.unwrap_or_else(|error| Err(io::Error::other(error)));
    written.map(drop).map_err(|source| MaterialsError::Files {
        volume: definition.name.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: u64, value: &str) -> SetMaterialsRequest {
        let secret = flint_api::guest::Secret {
            data: [("key".to_owned(), value.as_bytes().to_vec())].into(),
        };
        SetMaterialsRequest {
            version,
            materials: Some(Materials {
                secrets: [("login".to_owned(), secret)].into(),
                ..Materials::default()
            }),
            volumes: Vec::new(),
        }
    }

    async fn value(store: &Store) -> Vec<u8> {
        store.0.lock().await.materials.secrets["login"].data["key"].clone()
    }

    #[tokio::test]
    async fn an_older_version_never_overwrites_a_newer_one() {
        let store = Store::default();
        assert_eq!(store.set(request(5, "new")).await.unwrap(), 5);
        assert_eq!(store.set(request(4, "old")).await.unwrap(), 5);
        assert_eq!(store.set(request(5, "same version")).await.unwrap(), 5);
        assert_eq!(value(&store).await, b"new");
        assert_eq!(store.set(request(0, "next")).await.unwrap(), 6);
        assert_eq!(value(&store).await, b"next");
    }

    #[tokio::test]
    async fn without_materials_those_that_are_known_stay() {
        let store = Store::default();
        store.set(request(5, "new")).await.unwrap();
        let volumes_only = SetMaterialsRequest {
            version: 9,
            ..SetMaterialsRequest::default()
        };
        assert_eq!(store.set(volumes_only).await.unwrap(), 5);
        assert_eq!(value(&store).await, b"new");
    }

    #[tokio::test]
    async fn a_volume_with_a_hostile_name_or_path_is_refused() {
        let store = Store::default();
        for name in ["", "../etc", "a/b"] {
            let volume = ProjectedVolume {
                name: name.to_owned(),
                ..ProjectedVolume::default()
            };
            let request = SetMaterialsRequest {
                volumes: vec![volume],
                ..SetMaterialsRequest::default()
            };
            assert!(
                matches!(store.set(request).await, Err(MaterialsError::Name(_))),
                "{name}"
            );
        }
    }
}
