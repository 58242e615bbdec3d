//! virtio-block (virtio 1.3, 5.2): a disk slot, behind which a file or an image is bound at any time.
//!
//! - [`request`]: a request's life as types.
//! - [`engine`]: raw files by io_uring.
//! - [`backend`]: what can be bound.
//! - [`chunks`]: who has the chunks that an image lacks.
//!
//! An unbound slot has capacity 0. Binding changes the capacity, which a running driver learns by a configuration change
//! interrupt.
//!
//! System calls of the thread, beside those of every device thread: `io_uring_enter`, `timerfd_settime`, and for images
//! `pread64`, and `sendmsg` and `recvmsg` where a chunk is missing.

mod backend;
#[cfg(test)]
mod chunk_tests;
mod chunks;
mod engine;
mod request;
#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::epoll::EventSet;

use self::backend::Backend;
pub use self::backend::{BlockResource, ImageReadError, ImageSource};
pub use self::chunks::Chunks;
use self::chunks::Miss;
pub use self::engine::Ring;
use self::engine::{Engine, Submitted};
use self::request::{Disk, Finished, MAX_RANGE_SECTORS, Operation, Parsed, Pending, SECTOR_BYTES, Status};
use super::chain::{Chain, GuestBuffer};
use super::core::Core;
use super::device::{Activation, Device, DeviceError, Guest, GuestState};
use super::feature;
use super::worker::{DEVICE_TOKENS, ThreadKind};
use crate::memory::GuestMemory;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;
/// Data descriptors of a request: what a queue holds, without header and status.
const SEGMENTS: u32 = 126;
const MAX_QUEUES: u16 = 16;
const SERIAL_BYTES: usize = 20;
/// Images are read in pieces of this size at most.
const BOUNCE_BYTES: usize = 128 << 10;

const TOKEN_RING: u64 = DEVICE_TOKENS;
const TOKEN_LIMITER: u64 = DEVICE_TOKENS + 1;
const TOKEN_CHUNKS: u64 = DEVICE_TOKENS + 2;
const TOKEN_CHUNK_TIMER: u64 = DEVICE_TOKENS + 3;

/// What a slot is before anything is bound to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSlot {
    /// What the guest reads as the disk's serial: at most 20 bytes.
    pub serial: String,
    /// The guest may not write.
    pub read_only: bool,
    /// Request queues, 1 to 16.
    pub queues: u16,
}

// ---- config space

impl BlockSlot {
    fn check(&self) -> Result<(), DeviceError> {
        if self.serial.len() > SERIAL_BYTES || !self.serial.is_ascii() {
            return Err(DeviceError::Refused(format!(
                "serial {:?} is not at most 20 ASCII bytes",
                self.serial
            )));
        }
        if self.queues == 0 || self.queues > MAX_QUEUES {
            return Err(DeviceError::Refused(format!(
                "{} queues; a disk has 1 to {MAX_QUEUES}",
                self.queues
            )));
        }
        Ok(())
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_FLUSH,
        ];
        if self.read_only {
            bits.push(blk::VIRTIO_BLK_F_RO);
        } else {
            bits.extend([blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        if self.queues > 1 {
            bits.push(blk::VIRTIO_BLK_F_MQ);
        }
        bits.into_iter().map(feature).sum()
    }

    /// struct virtio_blk_config (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &u32::to_le_bytes(512));
        put(34, &self.queues.to_le_bytes());
        if !self.read_only {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &u32::to_le_bytes(1)); // max_discard_seg
            put(44, &u32::to_le_bytes(8)); // discard_sector_alignment: a page
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &u32::to_le_bytes(1)); // max_write_zeroes_seg
            put(56, &[1]); // write_zeroes_may_unmap
        }
        config
    }
}

// ---- state

/// A block device.
pub struct Block {
    core: Arc<Core>,
    slot: BlockSlot,
    bound: Option<BlockResource>,
    guest: Option<Guest>,
}

/// What is saved of a block device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlockState {
    /// The driver's side.
    #[prost(message, optional, tag = "1")]
    pub guest: Option<GuestState>,
}

impl Block {
    /// An unbound slot.
    ///
    /// # Errors
    /// When the slot is described wrongly, or the process is out of file descriptors.
    pub fn new(slot: BlockSlot) -> Result<Self, DeviceError> {
        slot.check()?;
        let core = Core::new(usize::from(slot.queues), slot.config()).map_err(DeviceError::host("make eventfds"))?;
        Ok(Self {
            core: Arc::new(core),
            slot,
            bound: None,
            guest: None,
        })
    }

    fn disk(&self) -> Disk {
        let bound = self.bound.as_ref();
        Disk {
            size: bound.map_or(0, |bound| bound.size),
            read_only: self.slot.read_only || bound.is_none_or(|bound| bound.read_only),
            features: self.guest.as_ref().map_or(0, |guest| guest.features),
        }
    }

    fn engine(&mut self) -> Option<&mut Engine> {
        match self.bound.as_mut().map(|bound| &mut bound.backend) {
            Some(Backend::Raw(engine)) => Some(engine),
            Some(Backend::Image { .. }) | None => None,
        }
    }

    /// Who has the chunks that the image lacks, and the image.
    fn chunks(&mut self) -> Option<(&mut Chunks, &mut dyn ImageSource)> {
        match self.bound.as_mut().map(|bound| &mut bound.backend) {
            Some(Backend::Image {
                source,
                chunks: Some(chunks),
                ..
            }) => Some((chunks, source.as_mut())),
            _ => None,
        }
    }

    fn hear_of_chunks(&mut self) {
        let core = self.core.clone();
        if let Some((chunks, source)) = self.chunks() {
            chunks.receive(source, &core.counters);
        }
    }

    fn forget_chunks(&mut self) {
        if let Some((chunks, _)) = self.chunks() {
            chunks.forget();
        }
    }

    /// Takes another connection to the chunk server.
    ///
    /// # Errors
    /// When no image is bound that has one, or the descriptor is no socket.
    pub(crate) fn serve_chunks(&mut self, server: OwnedFd) -> Result<(), DeviceError> {
        let core = self.core.clone();
        let none = || DeviceError::Refused("no image with a chunk server is bound to the slot".to_owned());
        let (chunks, _) = self.chunks().ok_or_else(none)?;
        let taken = chunks.replace(server, &core.counters);
        taken.map_err(DeviceError::host("take the chunk server's socket"))?;
        watch_chunks(&core, chunks)
    }
}

/// By its edges: a device that is paused leaves packets where they are.
fn watch_chunks(core: &Core, chunks: &Chunks) -> Result<(), DeviceError> {
    let Some(server) = chunks.server() else {
        return Ok(());
    };
    core.watch(server, EventSet::IN | EventSet::EDGE_TRIGGERED, TOKEN_CHUNKS)
        .map_err(DeviceError::host("watch the chunk server's socket"))
}

// ---- process

/// What became of a chain.
enum Taken {
    Finished(Finished),
    InFlight,
    /// Back into the ring: it is taken again when a request finishes or the rate limiter's timer fires.
    Later,
    /// Nothing can be said of it: there is no room for a status.
    Nothing,
}

impl Block {
    fn process_all(&mut self) -> Result<(), DeviceError> {
        for index in 0..usize::from(self.slot.queues) {
            self.process_queue(index)?;
        }
        Ok(())
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let disk = self.disk();
        let Self {
            core,
            slot,
            bound,
            guest: Some(guest),
        } = self
        else {
            return Ok(());
        };
        let Some(Some(queue)) = guest.queues.get_mut(index) else {
            return Ok(());
        };
        let durable = guest.features & feature(blk::VIRTIO_BLK_F_FLUSH) == 0;
        let mut work = Work {
            disk,
            slot,
            bound: bound.as_mut(),
            memory: &guest.memory,
            durable,
            core,
        };
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            let head = chain.head;
            match work.take_up(index, chain)? {
                Taken::Finished(finished) => queue.push(finished.head, finished.len)?,
                Taken::Nothing => {
                    core.counters.bump("bad_chain");
                    queue.push(head, 0)?;
                }
                Taken::InFlight => {}
                Taken::Later => {
                    queue.undo();
                    break;
                }
            }
        }
        queue.end()?;
        queue.signal()?;
        match self.engine() {
            Some(engine) => engine.kick().map_err(DeviceError::host("submit to io_uring")),
            None => Ok(()),
        }
    }

    fn complete(&mut self, wait: bool) -> Result<(), DeviceError> {
        let Self {
            bound: Some(bound),
            guest: Some(guest),
            ..
        } = self
        else {
            return Ok(());
        };
        let Backend::Raw(engine) = &mut bound.backend else {
            return Ok(());
        };
        let push = |finished: Finished| match guest.queue(finished.queue) {
            Some(queue) => queue.push(finished.head, finished.len),
            None => Ok(()),
        };
        if wait {
            engine.drain(push)?;
        } else {
            engine.reap(push)?;
        }
        for queue in guest.queues.iter_mut().flatten() {
            queue.signal()?;
        }
        Ok(())
    }
}

/// Everything that one chain's way needs.
struct Work<'a> {
    disk: Disk,
    slot: &'a BlockSlot,
    bound: Option<&'a mut BlockResource>,
    memory: &'a GuestMemory,
    durable: bool,
    core: &'a Core,
}

impl Work<'_> {
    fn take_up(&mut self, queue: usize, chain: Chain) -> Result<Taken, DeviceError> {
        let Some(parsed) = Parsed::parse(queue, chain, self.memory)? else {
            return Ok(Taken::Nothing);
        };
        let (pending, operation) = match parsed.admit(&self.disk) {
            Ok(admitted) => admitted,
            Err((pending, status)) => {
                self.core.counters.bump("refused_request");
                return self.finish(pending, status);
            }
        };
        if let Operation::GetId { buffer } = &operation {
            let status = self.write_serial(buffer)?;
            return self.finish(pending, status);
        }
        let Some(bound) = self.bound.as_deref_mut() else {
            // Nothing is bound, so nothing can be lost: a flush is done. All else failed at the bounds.
            return self.finish(pending, Status::Ok);
        };
        match &bound.backend {
            Backend::Raw(engine) if !engine.has_room() => return Ok(Taken::Later),
            Backend::Image {
                chunks: Some(chunks), ..
            } if chunks.is_waiting() => return Ok(Taken::Later),
            _ => {}
        }
        if !bound
            .limiter
            .take(operation.bytes())
            .map_err(DeviceError::host("set the rate limit's timer"))?
        {
            self.core.counters.bump("rate_limited");
            return Ok(Taken::Later);
        }
        match &mut bound.backend {
            Backend::Raw(engine) => match engine.submit(pending, &operation, self.memory, self.durable)? {
                Submitted::Yes => Ok(Taken::InFlight),
                Submitted::Full => Ok(Taken::Later),
            },
            Backend::Image { source, bounce, chunks } => {
                let read = match &operation {
                    Operation::Read { offset, buffer } => {
                        read_image(source.as_mut(), bounce, *offset, buffer, self.memory)?
                    }
                    _ => Ok(()),
                };
                let status = match (read, chunks) {
                    (Ok(()), None) => Status::Ok,
                    (Ok(()), Some(chunks)) => {
                        chunks.hit();
                        Status::Ok
                    }
                    (Err(ImageReadError::Missing(id)), Some(chunks)) => {
                        let miss = chunks.miss(id, &self.core.counters);
                        match miss.map_err(DeviceError::host("set the timer for a chunk"))? {
                            Miss::Wait => return Ok(Taken::Later),
                            Miss::Fail => Status::IoError,
                        }
                    }
                    (Err(_), _) => Status::IoError,
                };
                if status != Status::Ok {
                    self.core.counters.bump("image_read_failed");
                }
                self.finish(pending, status)
            }
        }
    }

    fn finish(&self, pending: Pending, status: Status) -> Result<Taken, DeviceError> {
        Ok(Taken::Finished(pending.finish(self.memory, status)?))
    }

    /// Up to 20 bytes; a shorter serial ends with a zero (5.2.6).
    fn write_serial(&self, buffer: &GuestBuffer) -> Result<Status, DeviceError> {
        if buffer.len() < SERIAL_BYTES as u64 {
            return Ok(Status::IoError);
        }
        let mut serial = [0; SERIAL_BYTES];
        serial[..self.slot.serial.len()].copy_from_slice(self.slot.serial.as_bytes());
        buffer.write_at(self.memory, 0, &serial)?;
        Ok(Status::Ok)
    }
}

fn read_image(
    source: &mut dyn ImageSource,
    bounce: &mut Vec<u8>,
    offset: u64,
    buffer: &GuestBuffer,
    memory: &GuestMemory,
) -> Result<Result<(), ImageReadError>, DeviceError> {
    let mut done = 0;
    while done < buffer.len() {
        let piece = usize::try_from(buffer.len() - done)
            .unwrap_or(usize::MAX)
            .min(BOUNCE_BYTES);
        if bounce.len() < piece {
            bounce.resize(piece, 0);
        }
        // The whole of the request was found to lie on the disk.
        if let Err(error) = source.read_at(offset + done, &mut bounce[..piece]) {
            return Ok(Err(error));
        }
        buffer.write_at(memory, done, &bounce[..piece])?;
        done += piece as u64;
    }
    Ok(Ok(()))
}

impl Device for Block {
    type Resource = BlockResource;
    type State = BlockState;
    const KIND: ThreadKind = ThreadKind::Block;

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.slot.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.slot.queues)]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.guest = Some(Guest::new(activation, &self.core)?);
        Ok(())
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        self.process_queue(index)
    }

    fn device_event(&mut self, token: u64, _events: EventSet) -> Result<(), DeviceError> {
        match token {
            TOKEN_RING => self.complete(false)?,
            TOKEN_LIMITER => {
                if let Some(bound) = &mut self.bound {
                    bound.limiter.acknowledge();
                }
            }
            TOKEN_CHUNKS => self.hear_of_chunks(),
            TOKEN_CHUNK_TIMER => {
                let core = self.core.clone();
                if let Some((chunks, _)) = self.chunks() {
                    chunks.expire(&core.counters);
                }
            }
            _ => return Ok(()),
        }
        // There may be room now for what was held back.
        self.process_all()
    }

    fn bind(&mut self, resource: BlockResource) -> Result<(), DeviceError> {
        if self.bound.is_some() {
            return Err(DeviceError::AlreadyBound);
        }
        if resource.read_only && !self.slot.read_only {
            return Err(DeviceError::Refused(
                "a disk that is read-only needs a slot that is read-only".to_owned(),
            ));
        }
        let watch = |fd, token| {
            self.core
                .watch(fd, EventSet::IN, token)
                .map_err(DeviceError::host("watch the disk"))
        };
        match &resource.backend {
            Backend::Raw(engine) => watch(engine.as_raw_fd(), TOKEN_RING)?,
            Backend::Image {
                chunks: Some(chunks), ..
            } => {
                watch_chunks(&self.core, chunks)?;
                watch(chunks.timer(), TOKEN_CHUNK_TIMER)?;
            }
            Backend::Image { chunks: None, .. } => {}
        }
        if let Some(timer) = resource.limiter.timer() {
            watch(timer, TOKEN_LIMITER)?;
        }
        let capacity = (resource.size / SECTOR_BYTES).to_le_bytes();
        self.bound = Some(resource);
        self.core.change_config(|config| config[..8].copy_from_slice(&capacity));
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        self.complete(true)?;
        // Who waits for a chunk is in the ring.
        self.forget_chunks();
        if let Some(bound) = &mut self.bound {
            bound.limiter.acknowledge();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        // What came meanwhile would be told by no further edge.
        self.hear_of_chunks();
        self.process_all()
    }

    fn has_work(&self) -> bool {
        self.guest.as_ref().is_some_and(Guest::has_chains)
    }

    fn reset(&mut self) {
        let drained = self.engine().map_or(Ok(()), |engine| engine.drain(|_| Ok(())));
        if drained.is_err() {
            // The engine keeps its share of guest memory for ever, see its `Drop`. Without it the disk is gone.
            self.core.counters.bump("drain_failed");
            self.bound = None;
            self.core.config.update(|config| config[..8].fill(0));
        }
        if let Some(bound) = &mut self.bound {
            bound.limiter.acknowledge();
        }
        self.forget_chunks();
        self.guest = None;
    }

    fn save(&self) -> BlockState {
        BlockState {
            guest: self.guest.as_ref().map(Guest::state),
        }
    }

    fn restore(&mut self, state: BlockState, memory: GuestMemory) -> Result<(), DeviceError> {
        self.reset();
        let guest = state.guest.map(|guest| Guest::restore(guest, memory, &self.core));
        self.guest = guest.transpose()?;
        Ok(())
    }
}
