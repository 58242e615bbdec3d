//! The page server as a program: brings one template's memory, chunk by chunk, to the sandboxes that connect. Started by whoever
//! manages the host, and independent of it then: sandboxes live on when that one goes.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use clap::Parser;
use flint_snapshots::device::{ImageDevice, OpenError};
use flint_vmm::control::commands::chain;
use flint_vmm::pages::{self, PageSource, Server};
use thiserror::Error;

/// Serves the pages of one template's memory to sandboxes that have mapped it.
#[derive(Debug, Parser)]
#[command(name = "flint-pages", version)]
struct Arguments {
    /// A listening SOCK_SEQPACKET unix socket.
    #[arg(long)]
    listen_fd: RawFd,
    /// A memfd of the memory file's size, empty, open for writing, that allows sealing.
    #[arg(long)]
    memory_fd: RawFd,
    /// The device table of the memory file's chunks.
    #[arg(long)]
    table_fd: RawFd,
    /// The packs that the table names, in its order.
    #[arg(long)]
    pack_fd: Vec<RawFd>,
}

#[derive(Debug, Error)]
enum Error {
    #[error("--{name} {fd}: not an open file descriptor of this process above 2, or named twice")]
    Descriptor { name: &'static str, fd: RawFd },
    #[error("opening the memory file's chunks")]
    Chunks(#[from] OpenError),
    #[error(transparent)]
    Serve(#[from] pages::Error),
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flint-pages: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let mut taken = Vec::new();
    let mut take = |name, fd: RawFd| {
        // SAFETY: F_GETFD only asks.
        if fd <= 2 || taken.contains(&fd) || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(Error::Descriptor { name, fd });
        }
        taken.push(fd);
        // SAFETY: it is open, and nobody else's: this program has opened nothing yet, and each is taken once.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let listener = take("listen-fd", arguments.listen_fd)?;
    let memory = File::from(take("memory-fd", arguments.memory_fd)?);
    let table = File::from(take("table-fd", arguments.table_fd)?);
    let packs = arguments.pack_fd.iter().map(|fd| Ok(File::from(take("pack-fd", *fd)?)));
    let packs = packs.collect::<Result<Vec<_>, Error>>()?;
    let source: Box<dyn PageSource> = Box::new(ImageDevice::open(table, packs)?);
    Ok(Server::new(source, memory, listener)?.serve()?)
}
