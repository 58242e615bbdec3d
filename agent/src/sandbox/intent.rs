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
    sync::{Arc, PoisonError, RwLock},
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
    /// The name that it was made under, where that is another one: a clone that was parked before it got its id. Its cgroup
    /// keeps that name, for cgroups cannot be renamed.
    #[serde(default)]
    pub parked_as: Option<String>,
}

impl Intent {
    /// Name of its cgroup.
    pub(super) fn cgroup(&self) -> &str {
        self.parked_as.as_deref().unwrap_or(&self.id)
    }

    /// Whether a folder of this name is its own.
    pub(super) fn may_be_in(&self, folder: &str) -> bool {
        folder == self.id || folder == self.cgroup()
    }
}

/// A sandbox's folder. Clones are the same folder, by whatever name it goes.
#[derive(Clone, Debug)]
pub(super) struct Folder(Arc<RwLock<PathBuf>>);

impl Folder {
    pub(super) fn of(sandboxes: &Path, id: &str) -> Self {
        Self(Arc::new(RwLock::new(sandboxes.join(id))))
    }

    /// Makes the folder with its intent; an error if it exists, since ids are never used twice.
    pub(super) fn create(sandboxes: &Path, intent: &Intent) -> Result<Self, SandboxError> {
        let path = sandboxes.join(&intent.id);
        fs::create_dir(&path).map_err(file_error("make", &path))?;
        let folder = Self::of(sandboxes, &intent.id);
        folder.write(intent).inspect_err(|_| {
            let _ = fs::remove_dir_all(&path);
        })?;
        Ok(folder)
    }

    /// Gives it to a sandbox: the intent first, so that whoever finds the folder between the two knows whose it was to be.
    pub(super) fn hand_over(&self, sandboxes: &Path, intent: &Intent) -> Result<(), SandboxError> {
        self.write(intent)?;
        let to = sandboxes.join(&intent.id);
        let mut path = self.0.write().unwrap_or_else(PoisonError::into_inner);
        // What is there already has an intent in it, and a folder that is not empty is not replaced (rename(2)).
        fs::rename(&*path, &to).map_err(file_error("name", &to))?;
        *path = to;
        Ok(())
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
        self.0.read().unwrap_or_else(PoisonError::into_inner).join(name)
    }

    /// Removes it. May be repeated.
    pub(super) fn remove(&self) -> Result<(), SandboxError> {
        // Held, so that it does not get another name meanwhile.
        let path = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match fs::remove_dir_all(&*path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(file_error("remove", &*path)),
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
            parked_as: None,
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
    fn a_parked_folder_is_handed_over_once_and_all_who_hold_it_find_it() {
        let run = tempfile::tempdir().unwrap();
        let intent = |id: &str, parked_as: Option<&str>| Intent {
            id: id.into(),
            uid: 70000,
            address: None,
            images: Vec::new(),
            parked_as: parked_as.map(String::from),
        };
        let parked = Folder::create(run.path(), &intent("parked-1", None)).unwrap();
        let other = parked.clone();
        let of_a = intent("a", Some("parked-1"));
        parked.hand_over(run.path(), &of_a).unwrap();
        assert_eq!(list(run.path()).unwrap(), ["a"]);
        assert_eq!(other.intent().unwrap(), Some(of_a.clone()));
        assert_eq!(of_a.cgroup(), "parked-1");
        assert!(of_a.may_be_in("a") && of_a.may_be_in("parked-1") && !of_a.may_be_in("b"));

        let second = Folder::create(run.path(), &intent("parked-2", None)).unwrap();
        assert!(second.hand_over(run.path(), &of_a).is_err(), "an id is used once");
        assert_eq!(
            other.intent().unwrap(),
            Some(of_a),
            "the other one's folder is as it was"
        );
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
