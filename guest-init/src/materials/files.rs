//! A volume's files, changed all at once as a kubelet does it: a reader sees the old ones or the new ones, never some of both.
//!
//! ```text
//! volume/..1764000000.5/app.conf      the files
//! volume/..data    -> ..1764000000.5  switched by one rename(2)
//! volume/app.conf  -> ..data/app.conf what programs open
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use super::ConfigError;

/// Link to the folder with the present files.
const DATA: &str = "..data";
/// What will be that link.
const NEXT: &str = "..data_tmp";
/// What a group that owns a volume may do with its read-only files (Kubernetes, `fsGroup`).
const GROUP_READS: u32 = 0o440;
/// And with its folders, whose new files would be the group's, too.
const GROUP_ENTERS: u32 = 0o2550;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// What is in it.
    pub bytes: Vec<u8>,
    /// Permissions.
    pub mode: u32,
    /// A user other than root.
    pub owner: Option<u32>,
}

/// All files of a volume, by relative path.
#[derive(Debug, Default)]
pub struct Files {
    /// The paths were checked.
    pub by_path: BTreeMap<String, File>,
    /// Group of all of them.
    pub group: Option<u32>,
}

impl Files {
    /// A path cannot lead through a file.
    pub fn check(&self) -> Result<(), ConfigError> {
        for path in self.by_path.keys() {
            let parents = path.match_indices('/').filter_map(|(at, _)| path.get(..at));
            for parent in parents {
                if self.by_path.contains_key(parent) {
                    return Err(ConfigError(format!("{parent:?} is a file and a folder")));
                }
            }
        }
        Ok(())
    }

    /// First parts of the paths: what stands in the volume's root.
    fn roots(&self) -> BTreeSet<&str> {
        self.by_path.keys().filter_map(|path| path.split('/').next()).collect()
    }
}

/// Has the volume at `root` have these files and no others. False: it had them already, and nothing was touched.
pub fn publish(root: &Path, files: &Files) -> io::Result<bool> {
    let former = fs::read_link(root.join(DATA)).ok();
    if let Some(former) = &former
        && has_all(&root.join(former), files)?
    {
        return Ok(false);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = format!("..{}.{:09}", now.as_secs(), now.subsec_nanos());
    let folder = root.join(&name);
    if let Err(error) = write_all(&folder, files).and_then(|()| switch(root, &name)) {
        // The switch was its last step: nobody reads this.
        let _ = fs::remove_dir_all(&folder);
        return Err(error);
    }
    link(root, files)?;
    if let Some(former) = former {
        fs::remove_dir_all(root.join(former))?;
    }
    own(root, None, files.group)?;
    Ok(true)
}

/// Whether a folder has just these files.
fn has_all(folder: &Path, files: &Files) -> io::Result<bool> {
    let mut seen = 0;
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let relative = path.strip_prefix(folder).map_err(io::Error::other)?;
            let known = relative.to_str().and_then(|relative| files.by_path.get(relative));
            let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
            let Some(file) = known.filter(|file| effective_mode(file, files) == mode) else {
                return Ok(false);
            };
            if fs::read(&path)? != file.bytes {
                return Ok(false);
            }
            seen += 1;
        }
    }
    Ok(seen == files.by_path.len())
}

fn effective_mode(file: &File, files: &Files) -> u32 {
    file.mode | files.group.map_or(0, |_| GROUP_READS)
}

fn write_all(folder: &Path, files: &Files) -> io::Result<()> {
    make_folder(folder, files.group)?;
    for (path, file) in &files.by_path {
        let mut parent = folder.to_owned();
        for part in Path::new(path).parent().into_iter().flat_map(Path::components) {
            parent.push(part);
            if !parent.is_dir() {
                make_folder(&parent, files.group)?;
            }
        }
        let path = folder.join(path);
        // Nobody's to read until it has its owner and mode; the folder has no link to it yet anyway.
        fs::write(&path, &file.bytes)?;
        own(&path, file.owner, files.group)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(effective_mode(file, files)))?;
    }
    Ok(())
}

fn make_folder(path: &Path, group: Option<u32>) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)?;
    own(path, None, group)?;
    let mode = 0o755 | group.map_or(0, |_| GROUP_ENTERS);
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn own(path: &Path, owner: Option<u32>, group: Option<u32>) -> io::Result<()> {
    if owner.is_none() && group.is_none() {
        return Ok(());
    }
    chown(path, owner, group)
}

/// From here on the new files are what everybody sees.
fn switch(root: &Path, name: &str) -> io::Result<()> {
    let next = root.join(NEXT);
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(name, &next)?;
    fs::rename(&next, root.join(DATA))
}

/// Links for what is new, and none for what is gone.
fn link(root: &Path, files: &Files) -> io::Result<()> {
    let wanted = files.roots();
    for name in &wanted {
        match symlink(Path::new(DATA).join(name), root.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let gone = name
            .to_str()
            .is_some_and(|name| !name.starts_with("..") && !wanted.contains(name));
        if gone {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str, u32)]) -> Files {
        let by_path = list.iter().map(|(path, text, mode)| {
            let file = File {
                bytes: text.as_bytes().to_vec(),
                mode: *mode,
                owner: None,
            };
            ((*path).to_owned(), file)
        });
        Files {
            by_path: by_path.collect(),
            group: None,
        }
    }

    fn names(root: &Path) -> Vec<String> {
        let entries = fs::read_dir(root).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn files_appear_with_their_modes_behind_links() {
        let root = tempfile::tempdir().unwrap();
        let first = files(&[("a.conf", "1", 0o644), ("keys/deep/id", "2", 0o400)]);
        assert!(publish(root.path(), &first).unwrap());
        assert_eq!(fs::read_to_string(root.path().join("a.conf")).unwrap(), "1");
        assert_eq!(fs::read_to_string(root.path().join("keys/deep/id")).unwrap(), "2");
        assert_eq!(
            fs::read_link(root.path().join("keys")).unwrap(),
            Path::new("..data/keys")
        );
        let mode = |path: &str| fs::metadata(root.path().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            (mode("a.conf"), mode("keys/deep/id"), mode("keys/deep")),
            (0o644, 0o400, 0o755)
        );
    }

    #[test]
    fn a_change_switches_all_files_at_once_and_leaves_no_old_ones() {
        let root = tempfile::tempdir().unwrap();
        publish(
            root.path(),
            &files(&[("a", "1", 0o644), ("gone", "1", 0o644), ("dir/x", "1", 0o644)]),
        )
        .unwrap();
        let before = fs::read_link(root.path().join(DATA)).unwrap();
        // What is open stays what it was.
        let open = fs::File::open(root.path().join("a")).unwrap();
        assert!(publish(root.path(), &files(&[("a", "2", 0o644), ("new", "2", 0o644)])).unwrap());
        let now = fs::read_link(root.path().join(DATA)).unwrap();
        assert_ne!(before, now);
        assert_eq!(names(root.path()), [now.to_str().unwrap(), DATA, "a", "new"]);
        assert_eq!(fs::read_to_string(root.path().join("a")).unwrap(), "2");
        assert_eq!(io::read_to_string(open).unwrap(), "1");
    }

    #[test]
    fn what_is_there_already_is_not_touched() {
        let root = tempfile::tempdir().unwrap();
        let same = || files(&[("a", "1", 0o644), ("d/b", "2", 0o600)]);
        assert!(publish(root.path(), &same()).unwrap());
        let before = fs::read_link(root.path().join(DATA)).unwrap();
        assert!(!publish(root.path(), &same()).unwrap());
        assert_eq!(fs::read_link(root.path().join(DATA)).unwrap(), before);
        for change in [
            files(&[("a", "1", 0o644)]),
            files(&[("a", "1", 0o600), ("d/b", "2", 0o600)]),
            files(&[("a", "x", 0o600), ("d/b", "2", 0o600)]),
            files(&[("a", "x", 0o600), ("d/c", "2", 0o600)]),
            Files::default(),
        ] {
            assert!(publish(root.path(), &change).unwrap(), "{change:?}");
            assert!(!publish(root.path(), &change).unwrap(), "{change:?}");
        }
        assert_eq!(
            names(root.path()).len(),
            2,
            "a volume without files has its own names only"
        );
    }

    #[test]
    fn a_switch_that_was_broken_off_does_not_stand_in_the_way() {
        let root = tempfile::tempdir().unwrap();
        symlink("..nowhere", root.path().join(NEXT)).unwrap();
        assert!(publish(root.path(), &files(&[("a", "1", 0o644)])).unwrap());
        assert_eq!(fs::read_to_string(root.path().join("a")).unwrap(), "1");
    }
}
