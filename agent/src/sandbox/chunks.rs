//! Brings VMMs the chunks that their images lack, on a connection for each image disk (`ChunkWanted` in `vmm.proto`).
//!
//! ```text
//!   VMM ──ChunkWanted──> a task for each connection ──> ChunkSource (the image store): here, or from the registry
//!       <──ChunkAnswer── file and place
//! ```
//!
//! A connection ends with its VMM, or with flintd; VMMs wait then, and the next flintd gives them new ones as it takes them over.

use std::{
    fmt,
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use flint_api::vmm::{
    self, ChunkAnswer, ChunkPlace, ChunkWanted, CreateMachine, ServeChunks, chunk_answer, request::Command,
};
use flint_snapshots::chunk::ChunkId;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;
use tonic::async_trait;

use super::{
    control::Control,
    packet::{Packet, PacketSocket},
    pages::memory_file,
};
use crate::chain;

/// A chunk in a file.
#[derive(Debug)]
pub struct ChunkFile {
    /// Open for reading.
    pub file: File,
    /// Where in it.
    pub place: ChunkPlace,
}

impl ChunkFile {
    /// A file in memory with the bytes of a chunk.
    ///
    /// # Errors
    /// When the host has no memory for it.
    pub fn of_bytes(bytes: &[u8]) -> io::Result<Self> {
        let mut file = memory_file("chunk", 0)?;
        file.write_all(bytes)?;
        // A chunk has 256 KiB at most.
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Ok(Self {
            file,
            place: ChunkPlace {
                pack: 0,
                offset: 0,
                stored_length: length,
                length,
            },
        })
    }
}

/// Somebody who has the chunks of images.
#[async_trait]
pub trait ChunkSource: fmt::Debug + Send + Sync {
    /// Chunk `id` of the image of that name, or for people why it cannot be had. May be dropped at any time.
    async fn chunk(&self, image: &str, id: ChunkId) -> Result<ChunkFile, String>;
}

/// How VMMs get what their images lack.
#[derive(Clone, Debug)]
pub struct ChunkServer {
    /// Who has it.
    pub source: Arc<dyn ChunkSource>,
    /// How long a guest's read waits for it: 1 ms to a day.
    pub deadline: Duration,
}

/// The VMM's end of a connection.
#[derive(Debug)]
pub(super) struct Line {
    pub socket: OwnedFd,
    pub terms: vmm::ChunkServer,
}

impl ChunkServer {
    /// A connection for one disk of one VMM.
    pub(super) fn line(&self, image: &str) -> io::Result<Line> {
        let (ours, socket) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let ours = PacketSocket::of(ours)?;
        tokio::spawn(serve(ours, image.to_owned(), Arc::clone(&self.source)));
        Ok(Line {
            socket,
            terms: vmm::ChunkServer {
                deadline_ms: u32::try_from(self.deadline.as_millis()).unwrap_or(u32::MAX),
            },
        })
    }

    /// Gives a VMM that was started by an earlier flintd new connections for its images.
    pub(super) async fn take_over(&self, control: &Control, machine: &CreateMachine, images: &[String]) {
        for (number, image) in images.iter().enumerate() {
            let serial = format!("image-{number}");
            let slot = (0..).zip(&machine.disks).find(|(_, disk)| disk.serial == serial);
            let Some((slot, _)) = slot else { continue };
            if let Err(error) = self.take_over_disk(control, slot, image).await {
                tracing::warn!(
                    image,
                    error = chain(&*error),
                    "damaged or missing chunks of an image in use are errors of its guest's reads"
                );
            }
        }
    }

    async fn take_over_disk(
        &self,
        control: &Control,
        slot: u32,
        image: &str,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let line = self.line(image)?;
        let command = Command::ServeChunks(ServeChunks { slot });
        Ok(control.command(command, &[line.socket.as_fd()]).await?)
    }
}

/// Answers a VMM until it ends. A newer question takes the place of an older one. A VMM that breaks the protocol is answered no more.
async fn serve(socket: PacketSocket, image: String, source: Arc<dyn ChunkSource>) {
    let mut wanted = None;
    loop {
        let answer = async {
            match wanted {
                Some(id) => answer(&image, id, &*source).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            packet = socket.receive() => match packet {
                Ok(Some(packet)) => match question(&packet) {
                    Some(id) => wanted = Some(id),
                    None => {
                        tracing::warn!(image, "a VMM breaks the protocol of chunks: it is answered no more");
                        return;
                    }
                },
                // The VMM has ended.
                Ok(None) | Err(_) => return,
            },
            (answer, file) = answer => {
                wanted = None;
                let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
                if socket.send(&answer.encode_to_vec(), &files).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn question(packet: &Packet) -> Option<ChunkId> {
    let wanted = ChunkWanted::decode(packet.bytes.as_slice()).ok()?;
    let id = wanted.id.try_into().ok()?;
    packet.fds.is_empty().then(|| ChunkId::from_bytes(id))
}

async fn answer(image: &str, id: ChunkId, source: &dyn ChunkSource) -> (ChunkAnswer, Option<File>) {
    let (result, file) = match source.chunk(image, id).await {
        Ok(ChunkFile { file, place }) => (chunk_answer::Result::Place(place), Some(file)),
        Err(why) => {
            tracing::warn!(image, chunk = %id, why, "a chunk that a guest reads cannot be had");
            (chunk_answer::Result::Refused(why), None)
        }
    };
    let answer = ChunkAnswer {
        id: id.as_bytes().to_vec(),
        result: Some(result),
    };
    (answer, file)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Mutex};

    use nix::sys::socket::setsockopt;
    use tokio::sync::oneshot;

    use super::*;

    /// What it has, and who is told when it is asked for what it never answers.
    #[derive(Debug, Default)]
    struct Fake {
        chunks: HashMap<ChunkId, Vec<u8>>,
        silent: Mutex<HashMap<ChunkId, oneshot::Sender<()>>>,
    }

    #[async_trait]
    impl ChunkSource for Fake {
        async fn chunk(&self, image: &str, id: ChunkId) -> Result<ChunkFile, String> {
            assert_eq!(image, "sha256:1");
            let silent = self.silent.lock().unwrap().remove(&id);
            if let Some(asked) = silent {
                asked.send(()).unwrap();
                std::future::pending::<()>().await;
            }
            let bytes = self.chunks.get(&id).ok_or("nobody has it")?;
            ChunkFile::of_bytes(bytes).map_err(|error| error.to_string())
        }
    }

    fn connect(fake: Fake) -> PacketSocket {
        let server = ChunkServer {
            source: Arc::new(fake),
            deadline: Duration::from_secs(2),
        };
        let line = server.line("sha256:1").unwrap();
        assert_eq!(line.terms.deadline_ms, 2000);
        setsockopt(&line.socket, nix::sys::socket::sockopt::PassCred, &true).unwrap();
        PacketSocket::of(line.socket).unwrap()
    }

    async fn ask(socket: &PacketSocket, id: ChunkId) {
        let id = id.as_bytes().to_vec();
        socket.send(&ChunkWanted { id }.encode_to_vec(), &[]).await.unwrap();
    }

    async fn hear(socket: &PacketSocket) -> (ChunkAnswer, Vec<OwnedFd>) {
        let packet = socket.receive().await.unwrap().unwrap();
        (ChunkAnswer::decode(packet.bytes.as_slice()).unwrap(), packet.fds)
    }

    #[tokio::test]
    async fn a_chunk_comes_as_a_file_and_what_cannot_be_had_is_said() {
        use std::os::unix::fs::FileExt;
        let id = ChunkId::of(b"chunk");
        let socket = connect(Fake {
            chunks: HashMap::from([(id, b"chunk".to_vec())]),
            ..Fake::default()
        });

        ask(&socket, id).await;
        let (answer, mut fds) = hear(&socket).await;
        assert_eq!(answer.id, id.as_bytes());
        let Some(chunk_answer::Result::Place(place)) = answer.result else {
            panic!("{answer:?}")
        };
        assert_eq!((place.stored_length, place.length, fds.len()), (5, 5, 1));
        let mut bytes = [0; 5];
        File::from(fds.remove(0))
            .read_exact_at(&mut bytes, place.offset)
            .unwrap();
        assert_eq!(&bytes, b"chunk");

        ask(&socket, ChunkId::of(b"another")).await;
        let (answer, fds) = hear(&socket).await;
        assert_eq!(
            answer.result,
            Some(chunk_answer::Result::Refused("nobody has it".into()))
        );
        assert!(fds.is_empty());
    }

    #[tokio::test]
    async fn a_newer_question_takes_the_place_of_an_older_one() {
        let (slow, quick) = (ChunkId::of(b"slow"), ChunkId::of(b"quick"));
        let (asked, is_asked) = oneshot::channel();
        let socket = connect(Fake {
            chunks: HashMap::from([(quick, b"quick".to_vec())]),
            silent: Mutex::new(HashMap::from([(slow, asked)])),
        });
        ask(&socket, slow).await;
        is_asked.await.unwrap();
        ask(&socket, quick).await;
        assert_eq!(hear(&socket).await.0.id, quick.as_bytes());
    }

    #[tokio::test]
    async fn a_vmm_that_breaks_the_protocol_loses_its_connection() {
        let null = File::open("/dev/null").unwrap();
        let id = ChunkWanted {
            id: ChunkId::of(b"x").as_bytes().to_vec(),
        };
        for (bytes, fds) in [
            (vec![0xff; 10], vec![]),
            (ChunkWanted { id: vec![0; 31] }.encode_to_vec(), vec![]),
            (id.encode_to_vec(), vec![null.as_fd()]),
        ] {
            let socket = connect(Fake::default());
            socket.send(&bytes, &fds).await.unwrap();
            assert!(socket.receive().await.unwrap().is_none(), "{bytes:?} was taken");
        }
    }
}
