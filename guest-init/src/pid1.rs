//! PID 1's own life: bring the machine up, serve until told otherwise, power off.

use std::{
    convert::Infallible,
    fs::File,
    io::{self, Read},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use flint_api::guest::{PORT, guest_server::GuestServer};
use futures::Stream;
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;

use crate::{
    boot::{self, BootError},
    container::Containers,
    error_chain::chain,
    identity,
    kernel_log::KernelLog,
    reaper::Reaper,
    server::GuestService,
    storage::Storage,
    uevent::Seen,
};

/// How long calls in flight may take to be answered once the machine is to go down.
const ANSWER_GRACE: Duration = Duration::from_secs(1);
/// Calls at once on one connection; each waiting reader and waiter is one.
const MAX_STREAMS: u32 = 1024;
/// A mount of an image may block one thread, a removal of files another.
const BLOCKING_THREADS: usize = 4;
const STACK: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error("bringing the machine up")]
    Boot(#[from] BootError),
    #[error("waiting for random numbers")]
    Random(#[source] io::Error),
    #[error("starting the event loop")]
    Runtime(#[source] io::Error),
    #[error("listening on vsock port {PORT}")]
    Listen(#[source] io::Error),
    #[error("installing signal handlers")]
    Signals(#[source] io::Error),
    #[error("serving the guest API")]
    Serve(#[source] tonic::transport::Error),
}

/// Never returns while the machine is up.
pub fn main() -> ExitCode {
    let started = Instant::now();
    // A panic in a task ends that task; its message goes to the console. PID 1 itself must not end: the kernel would panic.
    if let Err(error) = run(started) {
        eprintln!("flint-init: fatal: {}; powering off", chain(&error));
    }
    match power_off() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("flint-init: cannot power off: {error}");
            ExitCode::FAILURE
        }
    }
}

fn power_off() -> nix::Result<Infallible> {
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF)
}

fn run(started: Instant) -> Result<(), Fatal> {
    boot::bring_up()?;
    wait_for_randomness().map_err(Fatal::Random)?;
    // Ctrl-Alt-Delete becomes SIGINT, which is an orderly end.
    let _ = set_cad_enabled(false);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(STACK)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(Fatal::Runtime)?;
    runtime.block_on(serve(started))
}

async fn serve(started: Instant) -> Result<(), Fatal> {
    let reaper = Reaper::default();
    spawn_reaper(&reaper)?;
    if let Err(error) = identity::bring_up_loopback().await {
        // A kernel without networking can still run containers.
        eprintln!("flint-init: bringing lo up: {}", chain(&error));
    }
    let storage = Storage::default();
    let power_off = Arc::new(Notify::new());
    let containers = Containers::new(reaper, storage.clone());
    let service = GuestService::new(containers, storage.clone(), started, Arc::clone(&power_off));
    spawn_terminator(service.clone(), Arc::clone(&power_off))?;

    spawn_rebirth(service.clone());
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT)).map_err(Fatal::Listen)?;
    tokio::spawn(announce());
    let (closing, closed) = (Arc::clone(&power_off), Notify::new());
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .add_service(GuestServer::new(service))
        .serve_with_incoming_shutdown(connections(listener), async {
            closing.notified().await;
            closed.notify_one();
        });
    let deadline = async {
        closed.notified().await;
        tokio::time::sleep(ANSWER_GRACE).await;
    };
    tokio::select! {
        served = server => served.map_err(Fatal::Serve)?,
        () = deadline => {}
    }
    storage.unmount_scratch().await;
    Ok(())
}

fn spawn_reaper(reaper: &Reaper) -> Result<(), Fatal> {
    let mut children = signal(SignalKind::child()).map_err(Fatal::Signals)?;
    let reaper = reaper.clone();
    tokio::spawn(async move {
        while children.recv().await.is_some() {
            reaper.reap();
        }
    });
    Ok(())
}

/// SIGTERM and SIGINT end the machine as the Shutdown rpc does.
fn spawn_terminator(service: GuestService, power_off: Arc<Notify>) -> Result<(), Fatal> {
    let mut term = signal(SignalKind::terminate()).map_err(Fatal::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Fatal::Signals)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        service.end_containers().await;
        power_off.notify_one();
    });
    Ok(())
}

/// When this machine wakes up as a clone, Linux' vmgenid driver sees another generation id and has the random number generator take
/// it up, which says so in the log; there is no event for it. What the machine was is forgotten then, and the host is told that it may
/// connect. Streams from before are ended by the vsock driver, which the VMM tells on its own.
fn spawn_rebirth(service: GuestService) {
    let log = match KernelLog::listen() {
        Ok(log) => log,
        // Such a machine cannot be a template; as a pod it is good.
        Err(error) => return eprintln!("flint-init: cannot listen for a new generation id: {error}"),
    };
    tokio::spawn(async move {
        // add_vmfork_randomness in Linux' drivers/char/random.c.
        while let Ok(seen) = log.wait_for("crng reseeded due to virtual machine fork").await {
            // A loss may have held the word. To announce once too often does no harm; to forget the identity of a machine that
            // is none but itself would.
            if seen == Seen::Event {
                service.forget_identity();
            }
            announce().await;
        }
    });
}

/// Waits until the random number generator is seeded (random(4)): nothing that runs here is to see it before, and only then does it tell
/// of a new generation id.
fn wait_for_randomness() -> io::Result<()> {
    File::open("/dev/random")?.read_exact(&mut [0])
}

/// Tells flintd that it may connect: the listener exists by now.
async fn announce() {
    if let Err(error) = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, PORT)).await {
        // A host that does not listen may still connect.
        eprintln!("flint-init: announcing to the host (vsock port {PORT}): {error}");
    }
}

/// Connections of the host. A container can open vsock too, where the kernel has its loopback: such ones are dropped.
fn connections(listener: VsockListener) -> impl Stream<Item = io::Result<VsockStream>> {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => return Some((Ok(stream), listener)),
                Ok((_, peer)) => eprintln!("flint-init: dropped a connection from vsock CID {}", peer.cid()),
                // A connection that was reset before it was accepted; the server goes on after an error.
                Err(error) => return Some((Err(error), listener)),
            }
        }
    })
}
