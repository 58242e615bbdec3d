//! Files in a folder or in a tar, read where they lie.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

/// The files at a path.
#[derive(Debug)]
pub(crate) enum Files {
    Folder(PathBuf),
    Tar {
        path: PathBuf,
        members: HashMap<String, (u64, u64)>,
    },
}

/// A piece of a file.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    path: PathBuf,
    offset: u64,
    pub(crate) len: u64,
}

/// An image has some dozens of files; an archive with more members than this is something else.
const MAX_MEMBERS: usize = 100_000;

impl Files {
    /// Looks at the folder or tar at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        if path.is_dir() {
            return Ok(Self::Folder(path.to_path_buf()));
        }
        let mut archive = tar::Archive::new(BufReader::new(File::open(path)?));
        let mut members = HashMap::new();
        let mut links = Vec::new();
        for entry in archive.entries_with_seek()? {
            let entry = entry?;
            let Some(name) = entry.path().ok().as_deref().and_then(plain) else {
                continue;
            };
            match entry.header().entry_type() {
                kind if kind.is_file() => {
                    members.insert(name, (entry.raw_file_position(), entry.size()));
                }
                // docker save of old writes a layer that two images share as a link to the other one's.
                kind if kind.is_symlink() || kind.is_hard_link() => {
                    links.extend(entry.link_name()?.map(|to| (name, to.into_owned(), kind.is_symlink())));
                }
                _ => {}
            }
            if members.len() + links.len() > MAX_MEMBERS {
                return Err(io::Error::other(format!("it has more than {MAX_MEMBERS} members")));
            }
        }
        for (name, to, relative) in links {
            let to = if relative {
                Path::new(&name).parent().unwrap_or(Path::new("")).join(to)
            } else {
                to
            };
            if let Some(section) = normal(&to).and_then(|to| members.get(&to)).copied() {
                members.insert(name, section);
            }
        }
        Ok(Self::Tar {
            path: path.to_path_buf(),
            members,
        })
    }

    /// Whether there is a file of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.section(name).is_ok()
    }

    /// Where the file `name` is. A name comes from the image: it must not lead out of the folder.
    pub(crate) fn section(&self, name: &str) -> io::Result<Section> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("it has no {name}"));
        let plain = plain(Path::new(name)).ok_or_else(missing)?;
        match self {
            Self::Folder(folder) => {
                let path = folder.join(&plain);
                let metadata = path.metadata().map_err(|_| missing())?;
                if !metadata.is_file() {
                    return Err(missing());
                }
                Ok(Section {
                    path,
                    offset: 0,
                    len: metadata.len(),
                })
            }
            Self::Tar { path, members } => {
                let (offset, len) = *members.get(&plain).ok_or_else(missing)?;
                Ok(Section {
                    path: path.clone(),
                    offset,
                    len,
                })
            }
        }
    }

    /// A small file, whole.
    pub(crate) fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let section = self.section(name)?;
        if section.len > limit {
            return Err(io::Error::other(format!(
                "its {name} has {} bytes, the limit is {limit}",
                section.len
            )));
        }
        let mut bytes = Vec::new();
        section.open()?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Section {
    /// The bytes.
    pub(crate) fn open(&self) -> io::Result<impl Read + Send + use<>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        Ok(file.take(self.len))
    }
}

/// A path that goes down only, without `./`; `None` for every other one.
fn plain(path: &Path) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// A path with its `..` applied; `None` if it leads out.
fn normal(path: &Path) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::ParentDir => drop(parts.pop()?),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_an_image_do_not_lead_out() {
        for name in ["../x", "/etc/passwd", "a/../../x", ""] {
            assert_eq!(plain(Path::new(name)), None, "{name}");
        }
        assert_eq!(plain(Path::new("./a/./b")).as_deref(), Some("a/b"));
        assert_eq!(normal(Path::new("a/../b")).as_deref(), Some("b"));
        assert_eq!(normal(Path::new("a/../../b")), None);
    }
}
