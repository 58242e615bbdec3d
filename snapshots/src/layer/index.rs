//! What a layer holds, as values: one entry for each tar member, in the tar's order.
//!
//! Order is kept because it has a meaning: a later member replaces an earlier one of the same path, and a hard link
//! names what is there at that moment. Giving members their meaning is the job of [`image`](crate::image).

use crate::chunk::Chunk;

/// One layer of an image: its members, and the chunks that hold their content.
///
/// It depends on the uncompressed tar only, so it can be shared by all images and hosts that have the layer (by diff id).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerIndex {
    /// Distinct chunks, in the order of first use. [`Extent::chunk`] points in here.
    pub chunks: Vec<Chunk>,
    /// Members, in the tar's order.
    pub entries: Vec<Entry>,
}

impl LayerIndex {
    /// Bytes of memory that it takes, roughly.
    pub fn memory_len(&self) -> usize {
        let chunks = self.chunks.len() * size_of::<Chunk>();
        chunks + self.entries.iter().map(Entry::memory_len).sum::<usize>()
    }
}

/// One member of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path from the image's root: no leading slash, no empty, `.` or `..` component. Empty: the root itself.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Owner, permissions, times and extended attributes; without meaning for hard links, whiteouts and opaque marks.
    pub attributes: Attributes,
}

impl Entry {
    /// Bytes of memory that it takes, roughly; the one extent that a short file gets later is counted.
    pub(super) fn memory_len(&self) -> usize {
        let xattrs = self.attributes.xattrs.iter();
        let xattrs: usize = xattrs
            .map(|xattr| size_of::<Xattr>() + xattr.name.len() + xattr.value.len())
            .sum();
        let more = match &self.kind {
            EntryKind::File { extents, .. } => extents.len().max(1) * size_of::<Extent>(),
            EntryKind::Symlink { target } | EntryKind::HardLink { target } => target.len(),
            _ => 0,
        };
        size_of::<Self>() + self.path.len() + xattrs + more
    }
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Its length in bytes; what no extent covers is zero.
        size: u64,
        /// Its content by ascending file offset, not overlapping.
        extents: Vec<Extent>,
    },
    /// A directory. One that is there already keeps its children and takes the attributes.
    Directory,
    /// A symbolic link.
    Symlink {
        /// Where it points, as written in the tar.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
    /// Another name for a file that an earlier member or a lower layer brought.
    HardLink {
        /// That file's path, in the form of [`Entry::path`].
        target: Vec<u8>,
    },
    /// The path does not exist any more, as far as lower layers brought it (OCI image spec, "Whiteouts").
    Whiteout,
    /// The path is a directory whose children in lower layers do not exist any more ("Opaque Whiteout").
    Opaque,
}

/// A device's number, as far as Linux can represent it (12 and 20 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

impl DeviceNumber {
    /// The greatest major number Linux has.
    pub const MAX_MAJOR: u32 = (1 << 12) - 1;
    /// The greatest minor number Linux has.
    pub const MAX_MINOR: u32 = (1 << 20) - 1;
}

/// A file's attributes beside its type.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permissions with set-user-id, set-group-id and sticky bits: 12 bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Extended attributes by full name, sorted, each name once.
    pub xattrs: Vec<Xattr>,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// Full name, such as `security.capability`.
    pub name: Vec<u8>,
    /// Value; not text in general.
    pub value: Vec<u8>,
}

/// A moment: seconds since 1970, which may be negative, and nanoseconds to add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanoseconds: u32,
}

/// A piece of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where in the file.
    pub file_offset: u64,
    /// Which chunk, by its place in [`LayerIndex::chunks`].
    pub chunk: u32,
    /// Where in the chunk.
    pub offset: u32,
    /// How many bytes; more than none.
    pub len: u32,
}
