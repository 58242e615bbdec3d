//! What the store knows of images and layers, and the files that VMMs read.
//!
//! Tables of the index: image digest to record, image digest to chunk ids, reference to image digest, diff id to layer
//! index. `tables/<digest>` holds an image's device table, which can be made again from its layers: whenever chunks have
//! moved, and at opening if it is not there or names packs that are gone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use redb::{ReadableTable, TableDefinition};

use super::accesses::Accesses;
use super::{Image, ImageError};
use crate::access::LayerAccess;
use crate::chunk::ChunkId;
use crate::device::{PackLocation, Table, content_name, packs_of, placed_chunks};
use crate::image::Image as DeviceImage;
use crate::layer::LayerIndex;
use crate::machines::shelf;
use crate::registry::{Digest, ImageReference};
use crate::store::{ChunkStore, Session, StoreError, sync_dir};

const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
const IMAGE_CHUNKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("image chunks");
const REFERENCES: TableDefinition<'_, &str, &str> = TableDefinition::new("references");
const LAYERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("layers");

/// Images, layers, references.
pub(crate) struct Catalog {
    chunks: ChunkStore,
    tables: PathBuf,
    accesses: Accesses,
    /// Held for reading while chunks' places are looked up and relied upon; for writing while a sweep may move them.
    places: RwLock<()>,
    /// One writes tables at a time.
    writing: Mutex<()>,
}

impl Catalog {
    /// Opens the catalog and makes it consistent: images that lost chunks are dropped, tables are made again, what nobody
    /// refers to is swept.
    pub(crate) fn open(chunks: ChunkStore) -> Result<Self, ImageError> {
        let tables = chunks.dir().join("tables");
        fs::create_dir_all(&tables).map_err(StoreError::io("creating", &tables))?;
        chunks.index().write("making tables", |txn| {
            txn.open_table(IMAGES)?;
            txn.open_table(IMAGE_CHUNKS)?;
            txn.open_table(REFERENCES)?;
            txn.open_table(LAYERS)?;
            Ok(())
        })?;
        shelf::open(&chunks)?;
        let accesses = Accesses::open(chunks.dir())?;
        let catalog = Self {
            chunks,
            tables,
            accesses,
            places: RwLock::new(()),
            writing: Mutex::new(()),
        };
        let images = catalog.digests()?;
        catalog.delete_stray_tables(&images)?;
        for digest in images {
            if !catalog.table_is_good(digest)?
                && let Err(error) = catalog.make_table_again(digest)
            {
                tracing::error!(%error, image = %digest, "dropping an image whose chunks are not all there; pull it again");
                catalog.forget(digest)?;
            }
        }
        catalog.sweep(false)?;
        Ok(catalog)
    }

    pub(crate) fn chunks(&self) -> &ChunkStore {
        &self.chunks
    }

    fn digests(&self) -> Result<Vec<Digest>, ImageError> {
        let keys = self.chunks.index().read("listing images", |txn| {
            let table = txn.open_table(IMAGES)?;
            table
                .iter()?
                .map(|row| Ok(row?.0.value().to_owned()))
                .collect::<Result<Vec<_>, redb::Error>>()
        })?;
        keys.iter()
            .map(|key| key.parse().map_err(|error| record_error(key, &error)))
            .collect()
    }

    /// Whether the image is here.
    pub(crate) fn has(&self, digest: Digest) -> Result<bool, ImageError> {
        Ok(self.record(digest)?.is_some())
    }

    fn record(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        self.chunks.index().read("reading an image's record", |txn| {
            Ok(txn
                .open_table(IMAGES)?
                .get(digest.to_string().as_str())?
                .map(|row| row.value().to_vec()))
        })
    }

    fn references(&self) -> Result<BTreeMap<String, String>, StoreError> {
        self.chunks.index().read("listing references", |txn| {
            let table = txn.open_table(REFERENCES)?;
            table
                .iter()?
                .map(|row| {
                    row.map(|(name, digest)| (name.value().to_owned(), digest.value().to_owned()))
                        .map_err(redb::Error::from)
                })
                .collect()
        })
    }

    /// All images, by digest.
    pub(crate) fn list(&self) -> Result<Vec<Image>, ImageError> {
        let references = self.references()?;
        self.digests()?
            .into_iter()
            .filter_map(|digest| self.image(digest, &references).transpose())
            .collect()
    }

    /// The image of that reference or digest.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Image>, ImageError> {
        if let Ok(digest) = name.parse() {
            return self.by_digest(digest);
        }
        let reference: ImageReference = name.parse()?;
        let digest = self.chunks.index().read("looking up a reference", |txn| {
            Ok(txn
                .open_table(REFERENCES)?
                .get(reference.to_string().as_str())?
                .map(|row| row.value().to_owned()))
        })?;
        match (digest, reference.digest()) {
            (Some(digest), _) => self.by_digest(digest.parse().map_err(|error| record_error(name, &error))?),
            (None, Some(digest)) => self.by_digest(digest),
            (None, None) => Ok(None),
        }
    }

    fn by_digest(&self, digest: Digest) -> Result<Option<Image>, ImageError> {
        self.image(digest, &self.references()?)
    }

    /// The image of that digest, with its names out of `references`.
    fn image(&self, digest: Digest, references: &BTreeMap<String, String>) -> Result<Option<Image>, ImageError> {
        let Some(record) = self.record(digest)? else {
            return Ok(None);
        };
        let mut image: Image =
            serde_json::from_slice(&record).map_err(|error| record_error(&digest.to_string(), &error))?;
        let key = digest.to_string();
        image.references = references
            .iter()
            .filter(|(_, to)| **to == key)
            .map(|(name, _)| name.clone())
            .collect();
        Ok(Some(image))
    }

    /// A layer that is here with all its chunks, which `session` then holds.
    pub(crate) fn layer(&self, diff_id: Digest, session: &Session) -> Result<Option<LayerIndex>, ImageError> {
        let Some(layer) = self.layer_record(diff_id)? else {
            return Ok(None);
        };
        let ids: Vec<_> = layer.chunks.iter().map(|chunk| chunk.id).collect();
        Ok(session.pin_all(&ids)?.then_some(layer))
    }

    fn layer_record(&self, diff_id: Digest) -> Result<Option<LayerIndex>, ImageError> {
        let bytes = self.chunks.index().read("looking up a layer", |txn| {
            Ok(txn
                .open_table(LAYERS)?
                .get(diff_id.to_string().as_str())?
                .map(|row| row.value().to_vec()))
        })?;
        bytes
            .map(|bytes| LayerIndex::decode(&bytes).map_err(|error| record_error(&diff_id.to_string(), &error)))
            .transpose()
    }

    /// How the layer can be read in part, if that is known.
    pub(crate) fn layer_access(&self, diff_id: Digest) -> Result<Option<LayerAccess>, ImageError> {
        Ok(self.accesses.get(diff_id)?)
    }

    /// Keeps a layer, all of whose chunks are committed, and how it can be read in part.
    pub(crate) fn add_layer(&self, layer: &LayerIndex, access: &LayerAccess) -> Result<(), ImageError> {
        let diff_id = access.diff_id;
        self.accesses.put(access);
        let (key, bytes) = (diff_id.to_string(), layer.encode());
        self.chunks.index().write("adding a layer", |txn| {
            txn.open_table(LAYERS)?.insert(key.as_str(), bytes.as_slice())?;
            Ok(())
        })?;
        Ok(())
    }

    /// Makes an image visible, all of whose chunks are committed. Its layers, in the order of `image.layers`, are kept with
    /// it: a sweep that began before this work did may just have dropped some.
    pub(crate) fn publish(
        &self,
        mut image: Image,
        device: &DeviceImage,
        layers: &[LayerIndex],
        names: &[String],
    ) -> Result<Image, ImageError> {
        let _still = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let key = image.digest.to_string();
        let places = self.places_of(device)?;
        image.stored_bytes = places.values().map(|place| u64::from(place.stored_len)).sum();
        self.write_table(image.digest, device, &places)?;
        let record = serde_json::to_vec(&image).map_err(|error| record_error(&key, &error))?;
        let chunks: Vec<u8> = device.chunks().iter().flat_map(|chunk| *chunk.id.as_bytes()).collect();
        let added = self.chunks.index().write("adding an image", |txn| {
            txn.open_table(IMAGES)?.insert(key.as_str(), record.as_slice())?;
            txn.open_table(IMAGE_CHUNKS)?.insert(key.as_str(), chunks.as_slice())?;
            let mut kept = txn.open_table(LAYERS)?;
            for (diff_id, layer) in image.layers.iter().zip(layers) {
                let diff_id = diff_id.to_string();
                if kept.get(diff_id.as_str())?.is_none() {
                    kept.insert(diff_id.as_str(), layer.encode().as_slice())?;
                }
            }
            let mut references = txn.open_table(REFERENCES)?;
            for name in names {
                references.insert(name.as_str(), key.as_str())?;
            }
            Ok(())
        });
        if let Err(error) = added {
            // Without an image its table is litter; another pull may have published it meanwhile.
            if !self.has(image.digest)? {
                self.delete_table(image.digest)?;
            }
            return Err(error.into());
        }
        self.by_digest(image.digest)?.ok_or(ImageError::NotHere { image: key })
    }

    /// Gives an image that is here further names; `None`: it is not here.
    pub(crate) fn name(&self, digest: Digest, names: &[String]) -> Result<Option<Image>, ImageError> {
        let key = digest.to_string();
        let found = self.chunks.index().write("adding a reference", |txn| {
            if txn.open_table(IMAGES)?.get(key.as_str())?.is_none() {
                return Ok(false);
            }
            let mut references = txn.open_table(REFERENCES)?;
            for name in names {
                references.insert(name.as_str(), key.as_str())?;
            }
            Ok(true)
        })?;
        if found { self.by_digest(digest) } else { Ok(None) }
    }

    /// Takes an image and its names out of the index; what it took is given back by a sweep.
    pub(crate) fn forget(&self, digest: Digest) -> Result<(), ImageError> {
        let key = digest.to_string();
        self.chunks.index().write("removing an image", |txn| {
            txn.open_table(IMAGES)?.remove(key.as_str())?;
            txn.open_table(IMAGE_CHUNKS)?.remove(key.as_str())?;
            txn.open_table(REFERENCES)?.retain(|_, to| to != key)?;
            Ok(())
        })?;
        self.delete_table(digest)
    }

    fn delete_table(&self, digest: Digest) -> Result<(), ImageError> {
        let path = self.table_path(digest);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("deleting", &path)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// Gives back what neither an image nor a machine needs; returns how many bytes. While work is under way, layers without an image stay: they
    /// may be that work's.
    pub(crate) fn sweep(&self, under_way: bool) -> Result<u64, ImageError> {
        let _moving = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let collected = self
            .chunks
            .collect(|| self.live(under_way), || self.make_tables_again())?;
        if collected.chunks > 0 {
            tracing::info!(
                chunks = collected.chunks,
                bytes = collected.bytes,
                moved = collected.moved,
                "swept the chunk store"
            );
        }
        Ok(collected.bytes)
    }

    fn live(&self, under_way: bool) -> Result<HashSet<ChunkId>, ImageError> {
        let needed: HashSet<String> = self
            .list()?
            .iter()
            .flat_map(|image| &image.layers)
            .map(Digest::to_string)
            .collect();
        if !under_way {
            self.chunks.index().write("removing layers", |txn| {
                txn.open_table(LAYERS)?.retain(|diff_id, _| needed.contains(diff_id))?;
                Ok(())
            })?;
            self.accesses.retain(&needed)?;
        }
        let (mut live, layers) = self.chunks.index().read("listing what lives", |txn| {
            let mut live = HashSet::new();
            for row in txn.open_table(IMAGE_CHUNKS)?.iter()? {
                let (_, ids) = row?;
                live.extend(ids.value().as_chunks().0.iter().map(|id| ChunkId::from_bytes(*id)));
            }
            shelf::live(txn, &mut live)?;
            let layers = txn.open_table(LAYERS)?;
            let layers = layers
                .iter()?
                .map(|row| Ok(row?.1.value().to_vec()))
                .collect::<Result<Vec<_>, redb::Error>>()?;
            Ok((live, layers))
        })?;
        for layer in layers {
            let layer = LayerIndex::decode(&layer).map_err(|error| record_error("a layer", &error))?;
            live.extend(layer.chunks.iter().map(|chunk| chunk.id));
        }
        Ok(live)
    }

    /// The table and the packs of an image, opened.
    pub(crate) fn device(&self, digest: Digest) -> Result<(File, Vec<File>), ImageError> {
        let _still = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let path = self.table_path(digest);
        let open = || File::open(&path).map_err(StoreError::io("opening", &path));
        let packs = packs_of(open()?).map_err(|error| record_error(&format!("the device of {digest}"), &error))?;
        let packs = packs
            .into_iter()
            .map(|pack| self.chunks.open_pack(pack))
            .collect::<Result<_, _>>()?;
        Ok((open()?, packs))
    }

    /// A table for chunks that lie anywhere, and the packs that it names, opened.
    pub(crate) fn open_device(
        &self,
        image: &crate::image::Image,
        what: &str,
    ) -> Result<(Table, Vec<File>), ImageError> {
        let _still = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let ids: Vec<_> = image.chunks().iter().map(|chunk| chunk.id).collect();
        let places: HashMap<_, _> = ids.iter().copied().zip(self.chunks.locate(&ids)?).collect();
        let table = Table::build(image, |id| places.get(id).copied()).map_err(|error| record_error(what, &error))?;
        let packs = table.packs().iter().map(|pack| self.chunks.open_pack(*pack));
        let packs = packs.collect::<Result<_, _>>()?;
        Ok((table, packs))
    }

    /// The name of the bytes that its device has.
    pub(crate) fn device_name(&self, digest: Digest) -> Result<String, ImageError> {
        let _still = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let path = self.table_path(digest);
        let table = File::open(&path).map_err(StoreError::io("opening", &path))?;
        content_name(table).map_err(|error| record_error(&format!("the device of {digest}"), &error))
    }

    fn table_path(&self, digest: Digest) -> PathBuf {
        self.tables.join(digest.hex())
    }

    fn places_of(&self, device: &DeviceImage) -> Result<HashMap<ChunkId, PackLocation>, StoreError> {
        let ids: Vec<_> = device.chunks().iter().map(|chunk| chunk.id).collect();
        let places = self.chunks.locate(&ids)?;
        Ok(ids.into_iter().zip(places).collect())
    }

    /// Writes a table aside, then puts it in its place: whoever opens it sees the old one or the new one.
    fn write_table(
        &self,
        digest: Digest,
        device: &DeviceImage,
        places: &HashMap<ChunkId, PackLocation>,
    ) -> Result<(), ImageError> {
        let table = Table::build(device, |id| places.get(id).copied());
        let table = table.map_err(|source| ImageError::Table {
            image: digest.to_string(),
            source,
        })?;
        let (path, aside) = (
            self.table_path(digest),
            self.tables.join(format!("{}.new", digest.hex())),
        );
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let written = write_synced(&aside, table.as_bytes()).and_then(|()| fs::rename(&aside, &path));
        if let Err(error) = written {
            // What is left of it only takes room, of which there may be none; opening the store would delete it, too.
            let _ = fs::remove_file(&aside);
            return Err(StoreError::io("writing", &path)(error).into());
        }
        Ok(sync_dir(&self.tables)?)
    }

    /// Whether the table says of each chunk what the index says.
    fn table_is_good(&self, digest: Digest) -> Result<bool, ImageError> {
        let Ok(placed) = File::open(self.table_path(digest))
            .map_err(drop)
            .and_then(|file| placed_chunks(file).map_err(drop))
        else {
            return Ok(false);
        };
        let (ids, places): (Vec<_>, Vec<_>) = placed.into_iter().unzip();
        let known: HashSet<_> = self.chunks.index().packs()?.into_iter().map(|(pack, _)| pack).collect();
        let there = places.iter().all(|place| known.contains(&place.pack));
        // A chunk whose copy was damaged lies elsewhere by now, and its old pack may go.
        Ok(there && self.chunks.locate(&ids).is_ok_and(|now| now == places))
    }

    /// Whether the image's device has the chunk.
    pub(crate) fn has_chunk(&self, digest: Digest, id: ChunkId) -> Result<bool, ImageError> {
        let key = digest.to_string();
        Ok(self.chunks.index().read("reading an image's chunks", |txn| {
            let table = txn.open_table(IMAGE_CHUNKS)?;
            let ids = table.get(key.as_str())?;
            Ok(ids.is_some_and(|ids| ids.value().as_chunks().0.contains(id.as_bytes())))
        })?)
    }

    /// The images whose devices have the chunk.
    pub(crate) fn images_with(&self, id: ChunkId) -> Result<Vec<Digest>, ImageError> {
        let mut with = Vec::new();
        for digest in self.digests()? {
            if self.has_chunk(digest, id)? {
                with.push(digest);
            }
        }
        Ok(with)
    }

    /// The diff ids of an image's layers, the lowest first.
    pub(crate) fn layers_of(&self, digest: Digest) -> Result<Vec<Digest>, ImageError> {
        Ok(self.known(digest)?.layers)
    }

    fn known(&self, digest: Digest) -> Result<Image, ImageError> {
        self.by_digest(digest)?.ok_or_else(|| ImageError::NotHere {
            image: digest.to_string(),
        })
    }

    /// The device of an image, made of its layers again.
    pub(crate) fn assemble(&self, digest: Digest) -> Result<DeviceImage, ImageError> {
        let not_here = || ImageError::NotHere {
            image: digest.to_string(),
        };
        let image = self.known(digest)?;
        let layers = image
            .layers
            .iter()
            .map(|diff_id| self.layer_record(*diff_id)?.ok_or_else(not_here));
        let layers: Vec<_> = layers.collect::<Result<_, _>>()?;
        super::ingest::assemble(&layers, &digest.to_string())
    }

    /// Writes the image's table anew, for chunks that lie elsewhere by now.
    pub(crate) fn renew_table(&self, digest: Digest) -> Result<(), ImageError> {
        let _still = self.places.read().unwrap_or_else(PoisonError::into_inner);
        self.make_table_again(digest)
    }

    fn make_table_again(&self, digest: Digest) -> Result<(), ImageError> {
        let device = self.assemble(digest)?;
        let places = self.places_of(&device)?;
        self.write_table(digest, &device, &places)
    }

    fn make_tables_again(&self) -> Result<(), ImageError> {
        self.digests()?
            .into_iter()
            .try_for_each(|digest| self.make_table_again(digest))
    }

    fn delete_stray_tables(&self, images: &[Digest]) -> Result<(), ImageError> {
        let good: HashSet<_> = images.iter().map(Digest::hex).collect();
        for entry in fs::read_dir(&self.tables).map_err(StoreError::io("listing", &self.tables))? {
            let entry = entry.map_err(StoreError::io("listing", &self.tables))?;
            if !entry.file_name().to_str().is_some_and(|name| good.contains(name)) {
                fs::remove_file(entry.path()).map_err(StoreError::io("deleting", &entry.path()))?;
            }
        }
        Ok(())
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn record_error(what: &str, error: &dyn std::fmt::Display) -> ImageError {
    ImageError::Record {
        what: what.to_owned(),
        reason: error.to_string(),
    }
}
