//! The page server as a program: brings one template's memory, chunk by chunk, to the sandboxes that connect. Started by whoever
//! manages the host, and independent of it then: sandboxes live on when that one goes. It reads what came from outside and talks
//! to processes that guests may own, so it jails itself as flint-vmm does, before it reads anything.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::process::ExitCode;

use clap::Parser;
use flint_snapshots::device::{ImageDevice, OpenError};
use flint_vmm::control::commands::chain;
use flint_vmm::descriptors::{self, NotOpen};
use flint_vmm::jail::{self, Placed, seccomp};
use flint_vmm::pages::{self, PageSource, Server};
use thiserror::Error;

/// Serves the pages of one template's memory to sandboxes that have mapped it.
#[derive(Debug, Parser)]
#[command(name = "flint-pages", version)]
struct Arguments {
    /// A connected SOCK_SEQPACKET unix socket over which the connections of sandboxes come, one with each packet. Once it is closed
    /// the server ends with the last sandbox that needs it.
    #[arg(long)]
    door_fd: RawFd,
    /// A memfd of the memory file's size, empty, open for writing, that allows sealing.
    #[arg(long)]
    memory_fd: RawFd,
    /// The device table of the memory file's chunks.
    #[arg(long)]
    table_fd: RawFd,
    /// The packs that the table names, in its order.
    #[arg(long)]
    pack_fd: Vec<RawFd>,
    /// User to become.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    uid: u32,
    /// Group to become.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    gid: u32,
}

#[derive(Debug, Error)]
enum Error {
    #[error(transparent)]
    Descriptor(#[from] NotOpen),
    #[error(transparent)]
    Jail(#[from] jail::Error),
    #[error("the jailed process could not be set up; its own message is above")]
    Child,
    #[error("{what}")]
    Host { what: &'static str, source: io::Error },
    #[error("opening the memory file's chunks")]
    Chunks(#[from] OpenError),
    #[error(transparent)]
    Serve(#[from] pages::Error),
}

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| eprintln!("flint-pages: {info}")));
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flint-pages: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Serves to the end; the launcher leaves when the memory file can be mapped.
fn run(arguments: &Arguments) -> Result<(), Error> {
    let host = |what| move |source| Error::Host { what, source };
    let named = [
        ("door-fd", arguments.door_fd),
        ("memory-fd", arguments.memory_fd),
        ("table-fd", arguments.table_fd),
    ];
    // SAFETY: nothing was opened above standard error before this.
    let ([door, memory, table], packs) = unsafe { descriptors::take_with(named, "pack-fd", &arguments.pack_fd) }?;
    let ready = match jail::enter(arguments.uid, arguments.gid)? {
        Placed::Launcher { child_in_place: true } => return Ok(()),
        Placed::Launcher { child_in_place: false } => return Err(Error::Child),
        Placed::Jailed { ready, .. } => ready,
    };
    jail::landlock()?;
    seccomp::confine_page_server().map_err(host("confining the page server"))?;
    let packs = packs.into_iter().map(File::from).collect();
    let source: Box<dyn PageSource> = Box::new(ImageDevice::open(table.into(), packs)?);
    let server = Server::new(source, memory.into(), door)?;
    ready.tell().map_err(host("telling the launcher"))?;
    Ok(server.serve()?)
}
