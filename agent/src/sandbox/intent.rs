//! A sandbox's folder and intent file: what it holds on this host, written down before it is taken.
//!
//! ```text
//!   <run>/sandboxes/<id>/sandbox.json   the intent; made first, whole or not at all
//!                        control.sock   the VMM listens here
//!                        vsock.sock     and here, for streams into the guest
//!                        exit           the VMM's last words
//!                        serial.log     the guest's console
//!                        vmm.log        the VMM's standard error
//! ```
//!
//! Whoever finds a folder can remove everything the sandbox holds: what is not in the file has a name that follows from the
//! id (cgroup) or address (tap, rules), or no name at all (scratch disk). The folder goes last.

use std::{
    fs,
    io::{self, Write},
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{SandboxError, file_error};

/// What a sandbox holds.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Intent {
    /// Of the sandbox.
    pub id: String,
    /// User and group that its VMM runs as.
    pub uid: u32,
    /// Its address, if it has a network.
    pub address: Option<Ipv4Addr>,
    /// Names of the images that it reads, which must not be removed meanwhile.
    #[serde(default)]
    pub images: Vec<String>,
}

/// A sandbox's folder.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn of(sandboxes: &Path, id: &str) -> Self {
        Self(sandboxes.join(id))
    }

    /// Makes the folder with its intent; an error if it exists, since ids are never used twice.
    pub(super) fn create(sandboxes: &Path, intent: &Intent) -> Result<Self, SandboxError> {
        let folder = Self::of(sandboxes, &intent.id);
        fs::create_dir(&folder.0).map_err(file_error("make", &folder.0))?;
        folder.write(intent).inspect_err(|_| {
            let _ = fs::remove_dir_all(&folder.0);
        })?;
        Ok(folder)
    }

    fn write(&self, intent: &Intent) -> Result<(), SandboxError> {
        let path = self.path("sandbox.json");
        let draft = self.path("sandbox.json.new");
        let text = serde_json::to_vec(intent).map_err(|error| file_error("encode", &path)(error.into()))?;
        let written = fs::File::create(&draft).and_then(|mut file| file.write_all(&text));
        written
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(file_error("write", &path))
    }

    /// The intent, or `None` when flintd was killed before it was whole: then nothing but the folder was taken.
    pub(super) fn intent(&self) -> Result<Option<Intent>, SandboxError> {
        let path = self.path("sandbox.json");
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(file_error("read", &path))?,
        };
        let intent = serde_json::from_slice(&text).map_err(|error| file_error("understand", &path)(error.into()))?;
        Ok(Some(intent))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Removes it. May be repeated.
    pub(super) fn remove(&self) -> Result<(), SandboxError> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(file_error("remove", &self.0)),
        }
    }
}

/// Ids of all sandboxes with a folder. What is no folder, or has no name that could be an id, is none of ours.
pub(super) fn list(sandboxes: &Path) -> Result<Vec<String>, SandboxError> {
    let entries = fs::read_dir(sandboxes).map_err(file_error("list", sandboxes))?;
    Ok(entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_intent_comes_back_as_it_was_written_and_goes_with_its_folder() {
        let run = tempfile::tempdir().unwrap();
        let intent = Intent {
            id: "a".into(),
            uid: 70000,
            address: Some(Ipv4Addr::new(10, 88, 0, 2)),
            images: vec!["sha256:1".into()],
        };
        let folder = Folder::create(run.path(), &intent).unwrap();
        assert_eq!(folder.intent().unwrap(), Some(intent.clone()));
        assert!(Folder::create(run.path(), &intent).is_err(), "an id is used once");
        assert_eq!(list(run.path()).unwrap(), ["a"]);
        folder.remove().unwrap();
        folder.remove().unwrap();
        assert!(list(run.path()).unwrap().is_empty());
    }

    #[test]
    fn a_folder_without_an_intent_is_no_error_and_a_damaged_intent_is() {
        let run = tempfile::tempdir().unwrap();
        let folder = Folder::of(run.path(), "b");
        fs::create_dir(run.path().join("b")).unwrap();
        assert_eq!(folder.intent().unwrap(), None);
        fs::write(folder.path("sandbox.json"), "{\"id\":").unwrap();
        assert!(folder.intent().unwrap_err().to_string().contains("understand"));
    }
}
