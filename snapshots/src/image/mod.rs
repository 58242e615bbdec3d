//! From layers to one file tree, and from the tree to an EROFS device.

mod apply;
#[cfg(test)]
mod oracle_tests;
mod place;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::HashMap;

use place::Placer;
pub use tree::Misfit;
use tree::{InodeId, Kind, ROOT, Tree};

use crate::chunk::{Chunk, ChunkSink, SinkError};
use crate::device::{BLOCK_LEN, DeviceExtent, MAX_DEVICE_LEN};
pub use crate::erofs::ErofsError;
use crate::erofs::{self, Body, Dirent, FileType};
use crate::layer::{LayerIndex, shown};

/// How long metadata chunks are: they are read in single blocks all over, so shorter than data.
pub(crate) const METADATA_CHUNK_LEN: usize = 64 * 1024;

/// An image as a device: EROFS metadata, and which chunk holds which of the device's bytes.
///
/// The same layers give the same image, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub(crate) metadata: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) extents: Vec<DeviceExtent>,
}

impl Image {
    /// A device without a file system: chunks that lie whole at these offsets, in rising order and without overlap; all the rest
    /// is zeros. `size` is a multiple of 4096. This is how a memory file lies in the store.
    pub fn of_pieces(size: u64, pieces: &[(u64, Chunk)]) -> Self {
        let mut numbers = HashMap::new();
        let mut chunks = Vec::new();
        let extents = pieces.iter().map(|(device_offset, chunk)| DeviceExtent {
            device_offset: *device_offset,
            chunk: *numbers.entry(chunk.id).or_insert_with(|| {
                chunks.push(*chunk);
                // A table has no room for 2^32 chunks, which is told when it is built.
                u32::try_from(chunks.len() - 1).unwrap_or(u32::MAX)
            }),
            offset: 0,
            len: chunk.len,
        });
        Self {
            metadata: Vec::new(),
            size,
            extents: extents.collect(),
            chunks,
        }
    }

    /// The device's length in bytes: a multiple of 4096.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All chunks of the device, each once; those of the metadata first, then data in the order in which it lies on the device.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Where chunks lie on the device, by ascending offset, not overlapping; all the rest is zeros.
    pub fn extents(&self) -> &[DeviceExtent] {
        &self.extents
    }

    /// The EROFS metadata: the device's first bytes, a multiple of 4096.
    pub fn metadata(&self) -> &[u8] {
        &self.metadata
    }

    /// Puts the metadata into `sink`: data is there since the layers were read, metadata is not. To be done before
    /// [`Table::build`](crate::device::Table::build) looks for it.
    ///
    /// # Errors
    /// Those of `sink`.
    pub fn store_metadata(&self, sink: &mut impl ChunkSink) -> Result<(), SinkError> {
        self.metadata
            .chunks(METADATA_CHUNK_LEN)
            .try_for_each(|chunk| sink.put(chunk).map(drop))
    }
}

/// The most layers of one image. Overlay mounts end at 500 and most engines at 127.
pub const MAX_LAYERS: usize = 1000;

/// Why layers do not make an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// There are too many of them.
    #[error("the image has {0} layers, at most {MAX_LAYERS} are possible")]
    TooManyLayers(usize),
    /// An entry does not fit to what is there.
    #[error("unpacking {path:?} of layer {layer}")]
    Entry {
        /// Which layer, counted from 1 at the bottom.
        layer: usize,
        /// The entry's path.
        path: String,
        /// Why it does not fit.
        #[source]
        source: Misfit,
    },
    /// The device would be too long.
    #[error("the image's files are longer than the {MAX_DEVICE_LEN} bytes that a device can have")]
    TooBig,
    /// Their maps would take too much room.
    #[error("the image's files with holes are too many or too long: leave them out, or fill them")]
    TooManyHoles,
    /// Two layers say different things of one chunk, or a layer names one that it does not have.
    #[error("the layers' indexes contradict themselves: pull the image again")]
    Inconsistent,
    /// EROFS cannot hold the tree.
    #[error("writing the image's file system")]
    Erofs(#[from] ErofsError),
}

/// The image that `layers`, from the bottom up, make.
///
/// # Errors
/// [`ImageError`] when a layer cannot be unpacked onto those below it, or the result is beyond what a device can hold.
pub fn assemble<L: std::borrow::Borrow<LayerIndex>>(layers: &[L]) -> Result<Image, ImageError> {
    if layers.len() > MAX_LAYERS {
        return Err(ImageError::TooManyLayers(layers.len()));
    }
    let mut tree = Tree::new();
    for (number, layer) in layers.iter().enumerate() {
        for entry in &layer.borrow().entries {
            tree.apply(entry, number).map_err(|source| ImageError::Entry {
                layer: number + 1,
                path: shown(&entry.path),
                source,
            })?;
        }
    }
    let mut placer = Placer::default();
    let mut contents = place_files(&tree, layers, &mut placer)?;
    let order = metadata_order(&tree);
    let inodes: Vec<_> = order
        .ids
        .iter()
        .map(|&id| erofs_inode(&tree, id, &order, &mut contents[id]))
        .collect();
    let metadata = erofs::write(&inodes, placer.blocks()?)?;
    let size = metadata.len() as u64 + u64::from(placer.blocks()?) * BLOCK_LEN;
    let (chunks, extents) = placer.finish(&metadata, METADATA_CHUNK_LEN)?;
    Ok(Image {
        metadata,
        size,
        chunks,
        extents,
    })
}

/// Places all files in the order in which layers brought them; a body for each inode that is a file with a name.
fn place_files<L: std::borrow::Borrow<LayerIndex>>(
    tree: &Tree<'_>,
    layers: &[L],
    placer: &mut Placer,
) -> Result<Vec<Option<Body<'static>>>, ImageError> {
    let place = |inode: &tree::Inode<'_>| match inode.kind {
        Kind::File { size, extents, layer } if inode.links > 0 => {
            placer.place(size, extents, layers[layer].borrow()).map(Some)
        }
        _ => Ok(None),
    };
    tree.inodes.iter().map(place).collect()
}

/// The order of inodes in the metadata, and the way back.
struct Order {
    ids: Vec<InodeId>,
    places: Vec<Option<usize>>,
}

/// A directory's children lie together, for `ls -l` and for whoever looks up all files of a folder; then come those of its
/// first subdirectory, and so on.
fn metadata_order(tree: &Tree<'_>) -> Order {
    let mut order = Order {
        ids: vec![ROOT],
        places: vec![None; tree.inodes.len()],
    };
    order.places[ROOT] = Some(0);
    let mut directories = vec![ROOT];
    while let Some(id) = directories.pop() {
        let Some(directory) = tree.directory(id) else { continue };
        let before = directories.len();
        for child in directory.children.values() {
            if order.places[child.inode].is_none() {
                order.places[child.inode] = Some(order.ids.len());
                order.ids.push(child.inode);
                directories.push(child.inode);
            }
        }
        directories[before..].reverse();
    }
    order
}

fn erofs_inode<'t>(
    tree: &'t Tree<'_>,
    id: InodeId,
    order: &Order,
    content: &mut Option<Body<'static>>,
) -> erofs::Inode<'t> {
    let inode = &tree.inodes[id];
    let mut links = inode.links;
    let body = match &inode.kind {
        Kind::Directory(directory) => {
            let entries = dirents(tree, id, directory, order);
            // A directory's links are its name, its `.`, and the `..` of each subdirectory.
            let subdirectories = entries
                .iter()
                .filter(|entry| entry.file_type == FileType::Directory)
                .count();
            links = u32::try_from(subdirectories).unwrap_or(u32::MAX);
            Body::Directory(entries)
        }
        // Each file with a name was placed; an empty one stands for it.
        Kind::File { .. } => content.take().unwrap_or(Body::Plain {
            size: 0,
            first_block: 0,
        }),
        Kind::Symlink(target) => Body::Symlink(target),
        Kind::CharDevice(number) => Body::CharDevice(*number),
        Kind::BlockDevice(number) => Body::BlockDevice(*number),
        Kind::Fifo => Body::Fifo,
    };
    let attributes = inode.attributes;
    erofs::Inode {
        mode: attributes.mode,
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: attributes.mtime,
        xattrs: &attributes.xattrs,
        links,
        body,
    }
}

/// A directory's entries with `.` and `..`, sorted.
fn dirents<'t>(tree: &'t Tree<'_>, id: InodeId, directory: &'t tree::Directory<'_>, order: &Order) -> Vec<Dirent<'t>> {
    let dots = [(&b"."[..], id), (&b".."[..], directory.parent)];
    let children = directory.children.iter().map(|(name, child)| (*name, child.inode));
    let mut entries: Vec<_> = dots
        .into_iter()
        .chain(children)
        .map(|(name, inode)| Dirent {
            name,
            // All inodes with a name have a place.
            inode: order.places[inode].unwrap_or(0),
            file_type: file_type(&tree.inodes[inode].kind),
        })
        .collect();
    entries.sort_unstable_by_key(|entry| entry.name);
    entries
}

fn file_type(kind: &Kind<'_>) -> FileType {
    match kind {
        Kind::Directory(_) => FileType::Directory,
        Kind::File { .. } => FileType::Regular,
        Kind::Symlink(_) => FileType::Symlink,
        Kind::CharDevice(_) => FileType::CharDevice,
        Kind::BlockDevice(_) => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
    }
}
