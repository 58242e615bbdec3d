//! The file tree that an image's layers give: virtual, so that no path can lead out of it.

use std::cell::Cell;
use std::collections::BTreeMap;

use crate::layer::{Attributes, DeviceNumber, Extent, MAX_NAME_LEN, MAX_PATH_LEN, shown};

/// Symbolic links on the way to one file; umoci and containerd allow as many.
const MAX_SYMLINKS: usize = 255;

/// Inodes of one image, those that upper layers replace and folders that no layer describes included. Such folders cost the
/// author of an image a few bytes and its reader memory.
const MAX_INODES: usize = 2_000_000;

/// Names that are looked up for one image. A hostile one makes each of its paths lead over hundreds of long symbolic links;
/// for all paths of a good one some millions are enough.
const MAX_STEPS: u64 = 1 << 28;

/// Of a folder that no layer describes, but in which a layer has a file.
static IMPLICIT_DIRECTORY: Attributes = Attributes {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: crate::layer::Timestamp {
        seconds: 0,
        nanoseconds: 0,
    },
    xattrs: Vec::new(),
};

/// An inode's place in [`Tree::inodes`].
pub(super) type InodeId = usize;

/// The root is the first inode.
pub(super) const ROOT: InodeId = 0;

/// A tree over the entries of layers, from which names, attributes and content are borrowed.
pub(super) struct Tree<'a> {
    pub(super) inodes: Vec<Inode<'a>>,
    /// Inodes that may come yet, and names that may be looked up.
    pub(super) room: usize,
    pub(super) steps: Cell<u64>,
}

pub(super) struct Inode<'a> {
    pub(super) kind: Kind<'a>,
    pub(super) attributes: &'a Attributes,
    /// Names it has; nobody sees an inode without one.
    pub(super) links: u32,
}

pub(super) enum Kind<'a> {
    Directory(Directory<'a>),
    /// A file; its extents point into the chunks of layer number `layer`.
    File {
        size: u64,
        extents: &'a [Extent],
        layer: usize,
    },
    Symlink(&'a [u8]),
    CharDevice(DeviceNumber),
    BlockDevice(DeviceNumber),
    Fifo,
}

pub(super) struct Directory<'a> {
    pub(super) parent: InodeId,
    pub(super) children: BTreeMap<&'a [u8], Child>,
    /// Bytes of its path.
    path_len: usize,
    /// The layer that removed last what lower layers have in here.
    cleared_by: Option<usize>,
}

/// A name in a directory.
#[derive(Clone, Copy)]
pub(super) struct Child {
    pub(super) inode: InodeId,
    /// The layer that brought it, or its attributes.
    pub(super) layer: usize,
}

/// Why an entry does not fit into the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A part of the path before the last is a file.
    #[error("{0:?} on its way is not a directory")]
    NotADirectory(String),
    /// Links lead to links without end.
    #[error("more than {MAX_SYMLINKS} symbolic links lie on its way")]
    SymlinkLoop,
    /// Through links it comes to lie deeper than Linux can name.
    #[error("its path, or a name in it, is longer than Linux allows")]
    TooLong,
    /// A hard link's target is not there.
    #[error("it is a hard link to {0:?}, which does not exist")]
    MissingTarget(String),
    /// A hard link's target is a directory.
    #[error("it is a hard link to the directory {0:?}")]
    LinkToDirectory(String),
    /// The root is something else.
    #[error("the root can only be a directory")]
    Root,
    /// A bomb, most likely.
    #[error("with it the image has more than {MAX_INODES} files and folders, which is the limit; build one with fewer")]
    TooManyFiles,
    /// As well.
    #[error(
        "with it the image's paths have led over more than {MAX_STEPS} names, which is the limit; build one with fewer or shorter symbolic links"
    )]
    TooManySteps,
}

/// Splits off the last component.
pub(super) fn split_path(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

impl<'a> Tree<'a> {
    pub(super) fn new() -> Self {
        let root = Directory {
            parent: ROOT,
            children: BTreeMap::new(),
            path_len: 0,
            cleared_by: None,
        };
        Self {
            inodes: vec![Inode {
                kind: Kind::Directory(root),
                attributes: &IMPLICIT_DIRECTORY,
                links: 1,
            }],
            room: MAX_INODES,
            steps: Cell::new(MAX_STEPS),
        }
    }

    pub(super) fn directory(&self, id: InodeId) -> Option<&Directory<'a>> {
        match &self.inodes[id].kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn directory_mut(&mut self, id: InodeId) -> Option<&mut Directory<'a>> {
        match &mut self.inodes[id].kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(super) fn child(&self, directory: InodeId, name: &[u8]) -> Option<Child> {
        self.directory(directory)?.children.get(name).copied()
    }

    /// The directory `path`, if it is there. Symbolic links are followed; absolute ones begin at the image's root, and
    /// `..` stays there.
    pub(super) fn find_directory(&self, path: &'a [u8]) -> Result<Option<InodeId>, Misfit> {
        let mut walk = Walk::new(path);
        while let Some(name) = walk.next(self)? {
            match self.child(walk.at, name) {
                Some(child) => walk.enter(self, child.inode, name)?,
                None => return Ok(None),
            }
        }
        Ok(Some(walk.at))
    }

    /// As [`Tree::find_directory`], and makes what is not there, on behalf of `layer`.
    pub(super) fn make_directory(&mut self, path: &'a [u8], layer: usize) -> Result<InodeId, Misfit> {
        let mut walk = Walk::new(path);
        while let Some(name) = walk.next(self)? {
            let inode = match self.child(walk.at, name) {
                Some(child) => child.inode,
                None => self.add_directory(walk.at, name, &IMPLICIT_DIRECTORY, layer)?,
            };
            walk.enter(self, inode, name)?;
        }
        Ok(walk.at)
    }

    /// Adds an empty directory under a name that is free.
    pub(super) fn add_directory(
        &mut self,
        parent: InodeId,
        name: &'a [u8],
        attributes: &'a Attributes,
        layer: usize,
    ) -> Result<InodeId, Misfit> {
        let path_len = self.directory(parent).map_or(0, |directory| directory.path_len) + 1 + name.len();
        let directory = Directory {
            parent,
            children: BTreeMap::new(),
            path_len,
            cleared_by: None,
        };
        self.add(parent, name, Kind::Directory(directory), attributes, layer)
    }

    /// Adds an inode under a name that is free.
    pub(super) fn add(
        &mut self,
        parent: InodeId,
        name: &'a [u8],
        kind: Kind<'a>,
        attributes: &'a Attributes,
        layer: usize,
    ) -> Result<InodeId, Misfit> {
        let inode = self.inodes.len();
        self.room = self.room.checked_sub(1).ok_or(Misfit::TooManyFiles)?;
        self.inodes.push(Inode {
            kind,
            attributes,
            links: 0,
        });
        self.link(parent, name, inode, layer)?;
        Ok(inode)
    }

    /// Gives `inode` one more name, which is free.
    pub(super) fn link(&mut self, parent: InodeId, name: &'a [u8], inode: InodeId, layer: usize) -> Result<(), Misfit> {
        let Some(directory) = self.directory_mut(parent) else {
            return Err(Misfit::NotADirectory(shown(name)));
        };
        if name.len() > MAX_NAME_LEN || directory.path_len + 1 + name.len() > MAX_PATH_LEN {
            return Err(Misfit::TooLong);
        }
        directory.children.insert(name, Child { inode, layer });
        self.inodes[inode].links += 1;
        Ok(())
    }

    /// Says that `layer` brought `name`, or new attributes for it.
    pub(super) fn claim(&mut self, parent: InodeId, name: &[u8], layer: usize) {
        if let Some(child) = self
            .directory_mut(parent)
            .and_then(|directory| directory.children.get_mut(name))
        {
            child.layer = layer;
        }
    }

    /// Removes a name and, if it is a directory's, all that is in it.
    pub(super) fn remove(&mut self, parent: InodeId, name: &[u8]) {
        let removed = self
            .directory_mut(parent)
            .and_then(|directory| directory.children.remove(name));
        let mut removed: Vec<_> = removed.into_iter().collect();
        while let Some(child) = removed.pop() {
            self.inodes[child.inode].links -= 1;
            if let Some(directory) = self.directory_mut(child.inode) {
                removed.extend(std::mem::take(&mut directory.children).into_values());
            }
        }
    }

    /// Removes a name as far as layers below `layer` brought it: a directory with something of `layer` in it stays.
    pub(super) fn remove_lower(&mut self, parent: InodeId, name: &[u8], layer: usize) {
        let Some(child) = self.child(parent, name) else { return };
        if self.directory(child.inode).is_some() {
            self.clear_lower(child.inode, layer);
        }
        if !self.stays(&child, layer) {
            self.remove(parent, name);
        }
    }

    /// Removes all that layers below `layer` have in a directory. What was cleared for this layer is not looked at again,
    /// so that a layer full of such marks costs no more than the tree is big.
    pub(super) fn clear_lower(&mut self, directory: InodeId, layer: usize) {
        let mut found = Vec::new();
        let mut todo = vec![directory];
        while let Some(id) = todo.pop() {
            if let Some(directory) = self
                .directory_mut(id)
                .filter(|directory| directory.cleared_by != Some(layer))
            {
                directory.cleared_by = Some(layer);
                todo.extend(directory.children.values().map(|child| child.inode));
                found.push(id);
            }
        }
        for &id in found.iter().rev() {
            let Some(children) = self.directory(id).map(|directory| &directory.children) else {
                continue;
            };
            let gone: Vec<_> = children
                .iter()
                .filter(|(_, child)| !self.stays(child, layer))
                .map(|(&name, _)| name)
                .collect();
            for name in gone {
                self.remove(id, name);
            }
        }
    }

    /// Whether a name survives the removal of lower layers, when this was done for what is below it.
    fn stays(&self, child: &Child, layer: usize) -> bool {
        child.layer == layer
            || self
                .directory(child.inode)
                .is_some_and(|directory| !directory.children.is_empty())
    }
}

/// A way through the tree that follows symbolic links.
struct Walk<'a> {
    at: InodeId,
    rest: Vec<&'a [u8]>,
    symlinks: usize,
}

impl<'a> Walk<'a> {
    fn new(path: &'a [u8]) -> Self {
        let mut walk = Self {
            at: ROOT,
            rest: Vec::new(),
            symlinks: 0,
        };
        walk.put_off(path);
        walk
    }

    fn put_off(&mut self, path: &'a [u8]) {
        self.rest.extend(
            path.rsplit(|&byte| byte == b'/')
                .filter(|name| !matches!(*name, b"" | b".")),
        );
    }

    /// The next name to look up in `at`.
    fn next(&mut self, tree: &Tree<'a>) -> Result<Option<&'a [u8]>, Misfit> {
        while let Some(name) = self.rest.pop() {
            let left = tree.steps.get().checked_sub(1).ok_or(Misfit::TooManySteps)?;
            tree.steps.set(left);
            if name != b".." {
                return Ok(Some(name));
            }
            self.at = tree.directory(self.at).map_or(ROOT, |directory| directory.parent);
        }
        Ok(None)
    }

    /// Goes on at `inode`, which was found under `name`.
    fn enter(&mut self, tree: &Tree<'a>, inode: InodeId, name: &[u8]) -> Result<(), Misfit> {
        match tree.inodes[inode].kind {
            Kind::Directory(_) => self.at = inode,
            Kind::Symlink(target) => {
                self.symlinks += 1;
                if self.symlinks > MAX_SYMLINKS {
                    return Err(Misfit::SymlinkLoop);
                }
                if target.starts_with(b"/") {
                    self.at = ROOT;
                }
                self.put_off(target);
            }
            _ => return Err(Misfit::NotADirectory(shown(name))),
        }
        Ok(())
    }
}
