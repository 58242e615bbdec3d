//! Images, the scratch disk and pod directories: what containers' files are made of.

mod disks;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{errno::Errno, mount::MsFlags};
use tokio::sync::Mutex;
use tonic::Status;

use crate::{
    error_chain::chain,
    paths::{self, Name},
};

/// Why storage could not be had.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// No such disk came.
    #[error("disk with serial {serial:?} did not appear within {seconds} seconds; present: {present}")]
    NoDisk {
        serial: String,
        seconds: u64,
        present: String,
    },
    /// Devices could not be looked at.
    #[error("looking for disk {serial:?}")]
    Search {
        serial: String,
        #[source]
        source: io::Error,
    },
    /// mount(2) failed.
    #[error("mounting {source_name} ({file_system}) on {target}", target = .target.display())]
    Mount {
        source_name: String,
        file_system: &'static str,
        target: PathBuf,
        #[source]
        source: Errno,
    },
    /// A folder could not be made.
    #[error("creating {path}", path = .path.display())]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The caller used one id for two disks.
    #[error("image {image} is mounted from disk {mounted:?}, not {asked:?}")]
    OtherDisk {
        image: String,
        mounted: String,
        asked: String,
    },
    /// An emptyDir with a limit on a disk without quotas.
    #[error("pod directory {name}: size_bytes cannot be kept to on a scratch disk; use memory, or no limit")]
    NoQuota { name: String },
    /// Two containers disagree on one directory.
    #[error("pod directory {name} exists with a size limit of {present} bytes; {asked} were asked for")]
    OtherSize { name: String, present: u64, asked: u64 },
    /// The blocking task was cancelled.
    #[error("the mounting thread ended early")]
    Cancelled(#[source] tokio::task::JoinError),
}

impl From<StorageError> for Status {
    fn from(error: StorageError) -> Self {
        let text = chain(&error);
        match error {
            StorageError::NoDisk { .. } => Self::not_found(text),
            StorageError::OtherDisk { .. } | StorageError::OtherSize { .. } => Self::failed_precondition(text),
            StorageError::NoQuota { .. } => Self::unimplemented(text),
            _ => Self::internal(text),
        }
    }
}

/// What is mounted.
#[derive(Debug, Default, Clone)]
pub struct Storage(Arc<Mutex<Mounted>>);

#[derive(Debug, Default)]
struct Mounted {
    /// Serial by image.
    images: HashMap<String, String>,
    scratch: Vec<PathBuf>,
    /// Size limit by folder.
    directories: HashMap<PathBuf, u64>,
}

impl Storage {
    /// Mounts the EROFS on the disk with `serial` as `image`; done already is done.
    pub async fn mount_image(&self, image: &Name, serial: &Name) -> Result<(), StorageError> {
        let mut mounted = self.0.lock().await;
        if let Some(present) = mounted.images.get(image.as_str()) {
            if present == serial.as_str() {
                return Ok(());
            }
            return Err(StorageError::OtherDisk {
                image: image.to_string(),
                mounted: present.clone(),
                asked: serial.to_string(),
            });
        }
        let device = disks::find_disk(serial).await?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
        mount(device.display().to_string(), "erofs", paths::image(image), flags, None).await?;
        mounted.images.insert(image.to_string(), serial.to_string());
        Ok(())
    }

    /// Is it mounted?
    pub async fn has_image(&self, image: &Name) -> bool {
        self.0.lock().await.images.contains_key(image.as_str())
    }

    /// Mounts the scratch disk, or a tmpfs where there is none; done already is done.
    pub async fn mount_scratch(&self, serial: Option<&Name>) -> Result<(), StorageError> {
        let target = paths::scratch(serial);
        let mut mounted = self.0.lock().await;
        if mounted.scratch.contains(&target) {
            return Ok(());
        }
        let flags = MsFlags::MS_NODEV;
        match serial {
            Some(serial) => {
                let device = disks::find_disk(serial).await?;
                mount(device.display().to_string(), "ext4", target.clone(), flags, None).await?;
            }
            None => {
                mount(
                    "tmpfs".to_owned(),
                    "tmpfs",
                    target.clone(),
                    flags,
                    Some("mode=0700".to_owned()),
                )
                .await?;
            }
        }
        for folder in ["containers", "pods"] {
            create(&target.join(folder))?;
        }
        mounted.scratch.push(target);
        Ok(())
    }

    /// Makes a pod directory exist; the scratch is mounted already.
    pub async fn pod_directory(
        &self,
        serial: Option<&Name>,
        name: &Name,
        memory: bool,
        size: u64,
        group: Option<u32>,
    ) -> Result<(), StorageError> {
        let path = paths::pod_directory(serial, name, memory);
        let mut mounted = self.0.lock().await;
        if let Some(present) = mounted.directories.get(&path).copied() {
            if present == size {
                return Ok(());
            }
            return Err(StorageError::OtherSize {
                name: name.to_string(),
                present,
                asked: size,
            });
        }
        if memory || serial.is_none() {
            // Every user of a pod may write, as in a kubelet's emptyDir.
            let limit = if size == 0 {
                String::new()
            } else {
                format!(",size={size}")
            };
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
            mount(
                "tmpfs".to_owned(),
                "tmpfs",
                path.clone(),
                flags,
                Some(format!("mode=0777{limit}")),
            )
            .await?;
        } else if size == 0 {
            create(&path)?;
            set_mode(&path, 0o777)?;
        } else {
            return Err(StorageError::NoQuota { name: name.to_string() });
        }
        if let Some(group) = group {
            // New files in it are the group's, too (Kubernetes, fsGroup).
            std::os::unix::fs::chown(&path, None, Some(group)).map_err(|source| StorageError::Create {
                path: path.clone(),
                source,
            })?;
            set_mode(&path, 0o2777)?;
        }
        mounted.directories.insert(path, size);
        Ok(())
    }

    /// Unmounts scratch disks, so that their journals are clean.
    pub async fn unmount_scratch(&self) {
        for target in self.0.lock().await.scratch.drain(..) {
            if let Err(error) = nix::mount::umount2(&target, nix::mount::MntFlags::MNT_DETACH) {
                eprintln!("flint-init: unmounting {}: {error}", target.display());
            }
        }
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), StorageError> {
    let open = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(path, open).map_err(|source| StorageError::Create {
        path: path.to_owned(),
        source,
    })
}

fn create(path: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(path).map_err(|source| StorageError::Create {
        path: path.to_owned(),
        source,
    })
}

/// On a thread of its own: an image's blocks may have to come from far away, and PID 1 has to go on.
async fn mount(
    source_name: String,
    file_system: &'static str,
    target: PathBuf,
    flags: MsFlags,
    options: Option<String>,
) -> Result<(), StorageError> {
    create(&target)?;
    let mounting = move || {
        nix::mount::mount(
            Some(source_name.as_str()),
            &target,
            Some(file_system),
            flags,
            options.as_deref(),
        )
        .map_err(|source| StorageError::Mount {
            source_name,
            file_system,
            target,
            source,
        })
    };
    tokio::task::spawn_blocking(mounting)
        .await
        .map_err(StorageError::Cancelled)?
}
