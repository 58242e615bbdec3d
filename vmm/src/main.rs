//! The flint-vmm program: takes its descriptors, jails itself, serves.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use flint_api::vmm::ExitReason;
use flint_vmm::control::{End, Server, commands};
use flint_vmm::descriptors::{self, NotOpen};
use flint_vmm::dial;
use flint_vmm::exit::{Exit, ExitLatch, on_lost_memory};
use flint_vmm::jail::{self, Confine, Placed};
use flint_vmm::machine::{HostFiles, Shell};
use flint_vmm::memory::pagemap::Pagemap;
use flint_vmm::pages::uffd;
use flint_vmm::vcpu::thread::install_kick;
use kvm_ioctls::Kvm;
use prost::Message;
use thiserror::Error;

/// One sandbox: a jailed process with one virtual machine, driven over its control socket. Started by flintd.
#[derive(Debug, Parser)]
#[command(name = "flint-vmm", version)]
struct Arguments {
    /// Sandbox id, for logs and process lists.
    #[arg(long)]
    id: String,
    /// A listening SOCK_SEQPACKET unix socket.
    #[arg(long)]
    control_fd: RawFd,
    /// A file that gets the serialized `Exited` message at the end.
    #[arg(long)]
    exit_fd: RawFd,
    /// User to become.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    uid: u32,
    /// Group to become.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    gid: u32,
    /// No user change, namespaces, Landlock or seccomp: for debugging only.
    #[arg(long)]
    no_jail: bool,
}

#[derive(Debug, Error)]
enum Error {
    #[error(transparent)]
    Descriptor(#[from] NotOpen),
    #[error("opening /dev/kvm: is KVM loaded, and may this user open it? `flint doctor` tells more")]
    Kvm(#[source] kvm_ioctls::Error),
    #[error(transparent)]
    Jail(#[from] jail::Error),
    #[error("the jailed process could not be set up; its own message is above")]
    Child,
    #[error("{what}")]
    Host { what: &'static str, source: std::io::Error },
}

fn main() -> ExitCode {
    let born = Instant::now();
    let arguments = Arguments::parse();
    std::panic::set_hook(Box::new(|info| eprintln!("flint-vmm: {info}")));
    share_one_heap();
    let named = [("control-fd", arguments.control_fd), ("exit-fd", arguments.exit_fd)];
    // SAFETY: nothing was opened above standard error before this.
    let [listener, exit_file] = match unsafe { descriptors::take(named) } {
        Ok(taken) => taken,
        Err(error) => return report(&arguments.id, &error.into()),
    };
    let mut exit_file = File::from(exit_file);
    if let Err(source) = on_lost_memory(exit_file.as_fd()) {
        let what = "installing the handler of SIGBUS";
        return report(&arguments.id, &Error::Host { what, source });
    }
    match run(&arguments, listener, born) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(end)) => finish(&arguments.id, &mut exit_file, &end.exit),
        Err(error @ Error::Child) => report(&arguments.id, &error),
        Err(error) => {
            report(&arguments.id, &error);
            finish(
                &arguments.id,
                &mut exit_file,
                &Exit::new(ExitReason::VmmError, commands::chain(&error)),
            )
        }
    }
}

/// One heap for all threads. With one for each, glibc opens /proc/sys/vm/overcommit_memory when it gives memory back, which the
/// jail forbids; and each would keep memory of its own.
fn share_one_heap() {
    // SAFETY: no other thread exists yet, and the option takes a number only.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Makes room for the descriptors of a machine and of a claim. The kernel makes room by itself, but in a process with threads it
/// waits for an RCU grace period each time, some 10 ms (Linux, fs/file.c, expand_fdtable).
fn enlarge_descriptor_table(any: BorrowedFd<'_>) {
    const DESCRIPTORS: libc::c_int = 256;
    // SAFETY: a new descriptor, whatever is behind it.
    let last = unsafe { libc::fcntl(any.as_raw_fd(), libc::F_DUPFD_CLOEXEC, DESCRIPTORS - 1) };
    // A limit that is lower is no harm but the time.
    if last >= 0 {
        // SAFETY: it was just made, and is nobody else's.
        drop(unsafe { OwnedFd::from_raw_fd(last) });
    }
}

/// Serves the sandbox to its end. None: this is the launcher, and its child serves.
fn run(arguments: &Arguments, listener: OwnedFd, born: Instant) -> Result<Option<End>, Error> {
    let host = |what| move |source| Error::Host { what, source };
    let kvm = Kvm::new().map_err(Error::Kvm)?;
    // Not on every host, and not for every machine: who needs it says that it is missing.
    let uffd = File::options().read(true).write(true).open(uffd::DEVICE).ok();
    let (ready, pagemap) = if arguments.no_jail {
        let pagemap = Pagemap::of_this_process().map_err(host("opening /proc/self/pagemap"))?;
        (None, pagemap)
    } else {
        match jail::enter(arguments.uid, arguments.gid)? {
            Placed::Launcher { child_in_place: true } => return Ok(None),
            Placed::Launcher { child_in_place: false } => return Err(Error::Child),
            Placed::Jailed { ready, pagemap } => {
                jail::landlock()?;
                (Some(ready), pagemap)
            }
        }
    };
    enlarge_descriptor_table(listener.as_fd());
    let exit = ExitLatch::new().map_err(host("making the exit latch"))?;
    let (dialer, dials) = dial::channel().map_err(host("making the dial channel"))?;
    install_kick().map_err(host("installing the kick signal"))?;
    let confine = match ready {
        None => Confine::off(),
        Some(ready) => {
            let confine = Confine::on()?;
            ready.tell().map_err(host("telling the launcher"))?;
            confine
        }
    };
    let server = Server::new(listener, exit.clone(), dials, confine.clone(), born)
        .map_err(host("serving the control socket"))?;
    Ok(Some(server.serve(Shell::new(
        HostFiles { kvm, pagemap, uffd },
        exit,
        confine,
        dialer,
    ))))
}

/// Leaves the last word in the exit file, and the process.
fn finish(id: &str, exit_file: &mut File, exit: &Exit) -> ExitCode {
    if let Err(error) = exit_file.write_all(&exit.to_message().encode_to_vec()) {
        eprintln!("flint-vmm {id}: writing the exit file: {error}");
    }
    eprintln!("flint-vmm {id}: {}: {}", exit.reason.as_str_name(), exit.detail);
    // Not a return: threads of vCPUs and devices end here, wherever they are.
    std::process::exit(exit.code())
}

fn report(id: &str, error: &Error) -> ExitCode {
    eprintln!("flint-vmm {id}: {}", commands::chain(error));
    // 64 + VMM_ERROR fits a byte.
    ExitCode::from(70)
}
