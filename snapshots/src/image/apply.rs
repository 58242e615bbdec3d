//! What each entry of a layer does to the tree.
//!
//! Where the OCI specification leaves a choice, it is what containerd and umoci do when they unpack a layer: later entries
//! win; a directory over a directory keeps the children; anything else replaces, with all below it; symbolic links on the
//! way to an entry are followed inside the image; whiteouts concern lower layers only, wherever they stand in the layer. A
//! hard link's own attributes are not applied (umoci; containerd applies them, and in practice they are the same).

use super::tree::{InodeId, Kind, Misfit, ROOT, Tree, split_path};
use crate::layer::{Entry, EntryKind, shown};

impl<'a> Tree<'a> {
    /// Applies `entry` of layer number `layer`; layers come in order, and entries in the order of their layer.
    pub(super) fn apply(&mut self, entry: &'a Entry, layer: usize) -> Result<(), Misfit> {
        if entry.path.is_empty() {
            return self.apply_to_root(entry, layer);
        }
        let (parent, name) = split_path(&entry.path);
        let kind = match &entry.kind {
            EntryKind::Whiteout => {
                if let Some(parent) = self.find_directory(parent)? {
                    self.remove_lower(parent, name, layer);
                }
                return Ok(());
            }
            EntryKind::Opaque => {
                if let Some(directory) = self.find_directory(&entry.path)? {
                    self.clear_lower(directory, layer);
                }
                return Ok(());
            }
            EntryKind::Directory => return self.apply_directory(entry, parent, name, layer),
            EntryKind::HardLink { target } => return self.apply_hard_link(target, parent, name, layer),
            EntryKind::File { size, extents } => Kind::File {
                size: *size,
                extents,
                layer,
            },
            EntryKind::Symlink { target } => Kind::Symlink(target),
            EntryKind::CharDevice(number) => Kind::CharDevice(*number),
            EntryKind::BlockDevice(number) => Kind::BlockDevice(*number),
            EntryKind::Fifo => Kind::Fifo,
        };
        let parent = self.make_directory(parent, layer)?;
        self.remove(parent, name);
        self.add(parent, name, kind, &entry.attributes, layer).map(drop)
    }

    fn apply_to_root(&mut self, entry: &'a Entry, layer: usize) -> Result<(), Misfit> {
        match entry.kind {
            EntryKind::Directory => self.inodes[ROOT].attributes = &entry.attributes,
            EntryKind::Opaque => self.clear_lower(ROOT, layer),
            _ => return Err(Misfit::Root),
        }
        Ok(())
    }

    fn apply_directory(
        &mut self,
        entry: &'a Entry,
        parent: &'a [u8],
        name: &'a [u8],
        layer: usize,
    ) -> Result<(), Misfit> {
        let parent = self.make_directory(parent, layer)?;
        match self.child(parent, name).map(|child| child.inode) {
            Some(inode) if self.directory(inode).is_some() => {
                self.inodes[inode].attributes = &entry.attributes;
                self.claim(parent, name, layer);
            }
            _ => {
                self.remove(parent, name);
                self.add_directory(parent, name, &entry.attributes, layer)?;
            }
        }
        Ok(())
    }

    fn apply_hard_link(
        &mut self,
        target: &'a [u8],
        parent: &'a [u8],
        name: &'a [u8],
        layer: usize,
    ) -> Result<(), Misfit> {
        let parent = self.make_directory(parent, layer)?;
        // Looked up first and checked again after: what is at the new name goes away, and the target may be just that.
        let inode = self.hard_link_target(target)?;
        self.remove(parent, name);
        if self.inodes[inode].links == 0 {
            return Err(Misfit::MissingTarget(shown(target)));
        }
        self.link(parent, name, inode, layer)
    }

    fn hard_link_target(&self, target: &'a [u8]) -> Result<InodeId, Misfit> {
        let (parent, name) = split_path(target);
        let directory = self.find_directory(parent)?;
        let inode = match directory.and_then(|directory| self.child(directory, name)) {
            Some(child) => child.inode,
            None if target.is_empty() => ROOT,
            None => return Err(Misfit::MissingTarget(shown(target))),
        };
        if self.directory(inode).is_some() {
            return Err(Misfit::LinkToDirectory(shown(target)));
        }
        Ok(inode)
    }
}
