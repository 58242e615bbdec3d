//! Requests of the control protocol, carried out on the machine in its phase.

use std::error::Error as StdError;
use std::fmt::Write;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use flint_api::vmm::error::Code;
use flint_api::vmm::request::Command;
use flint_api::vmm::state::Phase as WirePhase;
use flint_api::vmm::{
    self, BindDisk, BindNet, ChunkServer, Claim, ClaimDisk, CreateMachine, LoadKernel, LoadSnapshot, MemoryState,
    SaveSnapshot, bind_disk,
};
use flint_snapshots::device::ImageDevice;
use nix::sys::socket::{UnixAddr, getsockname, getsockopt, sockopt};

use crate::boot;
use crate::machine::config::Config;
use crate::machine::snapshot::{LoadRequest, Report, SaveRequest};
use crate::machine::{self, Created, Machine, Parked, Paused, Reserved, Running, Saving, Shell, Step};
use crate::memory;
use crate::memory::file::Id;
use crate::memory::mapped::MAX_BASES;
use crate::memory::paged::{self, nonblocking};
use crate::vcpu::cpuid;
use crate::virtio::DeviceError;
use crate::virtio::block::{BlockResource, Chunks};
use crate::virtio::net::{NetResource, Tap};
use crate::virtio::rate_limit::RateLimit;

/// The machine in the phase that it is in.
pub enum Phase {
    /// No machine yet.
    Shell(Shell),
    /// Made, not started.
    Created(Created),
    /// Made for a snapshot.
    Reserved(Reserved),
    /// A snapshot is loaded.
    Parked(Parked),
    /// The guest runs.
    Running(Running),
    /// The guest runs and is being saved.
    Saving(Saving),
    /// The guest stands still.
    Paused(Paused),
}

/// What a request comes to, if it is not refused.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// Done.
    Ok,
    /// Begun: [`Phase::step`] comes to an answer.
    Later,
    /// Saved.
    Saved(Report),
    /// The phase, the counters, and what is known of the machine, if there is one.
    State(WirePhase, Vec<(String, u64)>, Option<About>),
    /// Done; the sandbox is to end.
    Stop,
}

/// What a machine is, and what its guest has of its memory.
#[derive(Debug, PartialEq)]
pub struct About {
    /// How far the guest has followed what it was told about memory.
    pub memory: MemoryState,
    /// What it was made as, without an identity.
    pub machine: CreateMachine,
}

/// A refusal, as it goes over the wire.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its kind.
    pub code: Code,
    /// What was being done and what went wrong.
    pub message: String,
}

impl Failure {
    /// A request that is wrong in itself.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self {
            code: Code::Invalid,
            message: message.into(),
        }
    }

    fn of(code: Code, error: &dyn StdError) -> Self {
        Self {
            code,
            message: chain(error),
        }
    }
}

impl From<machine::Error> for Failure {
    fn from(error: machine::Error) -> Self {
        use machine::Error as E;
        let code = match &error {
            E::Kvm { .. }
            | E::Vcpu(_)
            | E::Processor(cpuid::Error::Kvm(_))
            | E::Place(machine::devices::Error::Kvm { .. }) => Code::Kvm,
            E::NoSlot { .. } | E::NoVcpu { .. } | E::Boot(boot::Error::CommandLine(_)) => Code::Invalid,
            E::Device {
                source: DeviceError::AlreadyBound | DeviceError::Invalid(_),
                ..
            } => Code::Invalid,
            E::NoKernel | E::NotLoaded => Code::WrongPhase,
            E::Passport(_) | E::Processor(cpuid::Error::Level(_)) => Code::Unsupported,
            E::Memory(memory::Error::Paged(paged::Error::NotPaged)) => Code::Invalid,
            E::Shape { .. } | E::NoBase { .. } | E::InUse(_) | E::Unwritable(_) => Code::Invalid,
            E::Snapshot(_)
            | E::Generation(_)
            | E::Memory(_)
            | E::Boot(_)
            | E::Acpi(_)
            | E::Serial(_)
            | E::Device { .. } => Code::Resource,
            E::Place(_) | E::Bus(_) | E::Host { .. } => Code::Internal,
        };
        Self::of(code, &error)
    }
}

/// An error with all its causes, outermost first.
pub fn chain(error: &dyn StdError) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a String does not fail.
        let _ = write!(message, ": {error}");
        cause = error.source();
    }
    message
}

type Outcome = (Phase, Result<Answer, Failure>);

impl Phase {
    /// Carries a request out. The phase that comes back is the one to go on with, whether it was refused or not.
    pub fn handle(self, command: Command, fds: Vec<OwnedFd>) -> Outcome {
        let fds = match Fds::check(&command, fds) {
            Ok(fds) => fds,
            Err(failure) => return (self, Err(failure)),
        };
        match command {
            Command::CreateMachine(message) => self.create(message),
            Command::LoadKernel(message) => self.load_kernel(&message, fds),
            Command::BindDisk(message) => self.bind(|machine| bind_disk(machine, &message, fds)),
            Command::ServeChunks(message) => {
                self.bind(|machine| fds.only(|fd| Ok(machine.serve_chunks(message.slot, fd)?)))
            }
            Command::BindNet(message) => self.bind(|machine| fds.only(|fd| bind_net(machine, &message, fd))),
            Command::BindVsock(_) => self.bind(|machine| fds.only(|fd| bind_vsock(machine, fd))),
            Command::BindSerial(_) => self.bind(|machine| fds.only(|fd| Ok(machine.bind_serial(fd)?))),
            Command::RenewGeneration(_) => self.bind(|machine| Ok(machine.renew_generation()?)),
            Command::SetMemory(message) => self.bind(|machine| Ok(machine.set_memory(message.plugged_bytes)?)),
            Command::SetBalloon(message) => self.bind(|machine| set_balloon(machine, message.target_bytes)),
            Command::SetVcpus(message) => self.set_vcpus(message.vcpus),
            Command::Start(_) => self.start(),
            Command::Pause(_) => self.pause(),
            Command::Resume(_) => self.resume(),
            Command::Stop(_) => (self, Ok(Answer::Stop)),
            Command::ReserveMachine(message) => self.reserve(message.machine.unwrap_or_default(), message.paged),
            Command::LoadSnapshot(message) => self.load_snapshot(&message, fds),
            Command::Claim(message) => self.claim(&message, fds),
            Command::SaveSnapshot(message) => self.save_snapshot(&message, fds),
            Command::RecordWorkingSet(_) => self.record_working_set(fds),
            Command::ReplayWorkingSet(message) => self.replay_working_set(message.copy_bytes, fds),
            Command::GetState(_) => {
                let state = self.state();
                (self, Ok(state))
            }
        }
    }

    fn create(self, message: CreateMachine) -> Outcome {
        let Self::Shell(shell) = self else {
            return self.wrong("CreateMachine", "before there is a machine");
        };
        let config = match Config::try_from(message) {
            Ok(config) => config,
            Err(error) => return (Self::Shell(shell), Err(Failure::of(Code::Invalid, &error))),
        };
        match shell.create(&config) {
            Ok(created) => (Self::Created(created), Ok(Answer::Ok)),
            Err((shell, error)) => (Self::Shell(shell), Err(error.into())),
        }
    }

    fn reserve(self, message: CreateMachine, paged: bool) -> Outcome {
        let Self::Shell(shell) = self else {
            return self.wrong("ReserveMachine", "before there is a machine");
        };
        let config = match Config::try_from(message) {
            Ok(config) => config,
            Err(error) => return (Self::Shell(shell), Err(Failure::of(Code::Invalid, &error))),
        };
        match shell.reserve(&config, paged) {
            Ok(reserved) => (Self::Reserved(reserved), Ok(Answer::Ok)),
            Err((shell, error)) => (Self::Shell(shell), Err(error.into())),
        }
    }

    fn load_snapshot(self, message: &LoadSnapshot, fds: Fds) -> Outcome {
        let Self::Reserved(reserved) = self else {
            return self.wrong("LoadSnapshot", "after ReserveMachine");
        };
        let outcome = match load_request(message, fds) {
            Ok(request) => reserved.load(request).map_err(|(it, error)| (it, error.into())),
            Err(failure) => Err((reserved, failure)),
        };
        match outcome {
            Ok(parked) => (Self::Parked(parked), Ok(Answer::Ok)),
            Err((reserved, failure)) => (Self::Reserved(reserved), Err(failure)),
        }
    }

    fn claim(self, message: &Claim, fds: Fds) -> Outcome {
        let Self::Parked(parked) = self else {
            return self.wrong("Claim", "once, after LoadSnapshot");
        };
        if let Err(failure) = bind_all(parked.as_ref(), message, fds) {
            return (Self::Parked(parked), Err(failure));
        }
        match parked.claim() {
            Ok(running) => (Self::Running(running), Ok(Answer::Ok)),
            Err((parked, error)) => (Self::Parked(parked), Err(error.into())),
        }
    }

    fn save_snapshot(self, message: &SaveSnapshot, fds: Fds) -> Outcome {
        let request = match save_request(message, fds) {
            Ok(request) => request,
            Err(failure) => return (self, Err(failure)),
        };
        let saved = match self {
            Self::Running(running) => {
                return match running.save(request) {
                    Ok(saving) => (Self::Saving(saving), Ok(Answer::Later)),
                    Err((running, error)) => (Self::Running(running), Err(error.into())),
                };
            }
            Self::Paused(ref paused) => paused.save(request),
            Self::Parked(ref parked) => parked.save(request),
            other => return other.wrong("SaveSnapshot", "after Start, Pause or LoadSnapshot"),
        };
        (self, saved.map(Answer::Saved).map_err(Failure::from))
    }

    fn record_working_set(self, fds: Fds) -> Outcome {
        let (Self::Parked(_) | Self::Running(_) | Self::Paused(_), Some(machine)) = (&self, self.machine()) else {
            return self.wrong("RecordWorkingSet", "after LoadSnapshot");
        };
        let recorded = fds.only(|fd| Ok(machine.record_working_set(&fd.into())?));
        (self, recorded.map(|()| Answer::Ok))
    }

    fn replay_working_set(self, copy_bytes: u64, fds: Fds) -> Outcome {
        let Self::Parked(parked) = &self else {
            return self.wrong("ReplayWorkingSet", "between LoadSnapshot and Claim");
        };
        let replayed = fds.only(|fd| Ok(parked.replay(&fd.into(), copy_bytes)?));
        (self, replayed.map(|()| Answer::Ok))
    }

    /// Whether there is something to do for the guest when nobody asks for anything.
    #[must_use]
    pub fn has_spare_work(&self) -> bool {
        matches!(self, Self::Running(running) if running.has_copies())
    }

    /// Does a part of that.
    pub fn do_spare_work(&self) {
        if let Self::Running(running) = self {
            running.copy_some();
        }
    }

    /// Whether a loaded machine waits to be claimed.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        matches!(self, Self::Parked(_))
    }

    /// Whether the machine was claimed before there was time for [`Self::settle`].
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        matches!(self, Self::Running(running) if running.is_unsettled())
    }

    /// Gives up what only loading needed.
    pub fn settle(&mut self) {
        match self {
            Self::Parked(parked) => parked.settle(),
            Self::Running(running) => running.settle(),
            _ => {}
        }
    }

    /// Whether there is something to do beside waiting for requests.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Saving(_))
    }

    /// Does a part of that. None: there is more.
    pub fn step(self) -> (Self, Option<Result<Answer, Failure>>) {
        let Self::Saving(saving) = self else {
            return (self, None);
        };
        match saving.step() {
            Step::More(saving) => (Self::Saving(saving), None),
            Step::Running(running, saved) => {
                let outcome = saved.map(Answer::Saved).map_err(Failure::from);
                (Self::Running(running), Some(outcome))
            }
            Step::Paused(paused, saved) => {
                let outcome = saved.map(Answer::Saved).map_err(Failure::from);
                (Self::Paused(paused), Some(outcome))
            }
        }
    }

    fn load_kernel(self, message: &LoadKernel, fds: Fds) -> Outcome {
        let Self::Created(mut created) = self else {
            return self.wrong("LoadKernel", "between CreateMachine and Start");
        };
        let mut files = fds.0.into_iter().map(File::from);
        // Fds::check counted them.
        let Some(kernel) = files.next() else {
            return (
                Self::Created(created),
                Err(Failure::invalid("LoadKernel without a kernel")),
            );
        };
        let request = boot::Request {
            kernel,
            initrd: files.next(),
            cmdline: &message.cmdline,
        };
        let outcome = created.load_kernel(request);
        (
            Self::Created(created),
            outcome.map(|()| Answer::Ok).map_err(Failure::from),
        )
    }

    fn start(self) -> Outcome {
        let Self::Created(created) = self else {
            return self.wrong("Start", "once, after CreateMachine and LoadKernel");
        };
        match created.start() {
            Ok(running) => (Self::Running(running), Ok(Answer::Ok)),
            Err((created, error)) => (Self::Created(created), Err(error.into())),
        }
    }

    fn set_vcpus(self, vcpus: u32) -> Outcome {
        let Self::Running(running) = self else {
            return self.wrong("SetVcpus", "while the guest runs");
        };
        let outcome = running.use_vcpus(vcpus);
        (
            Self::Running(running),
            outcome.map(|()| Answer::Ok).map_err(Failure::from),
        )
    }

    fn pause(self) -> Outcome {
        let Self::Running(running) = self else {
            return self.wrong("Pause", "while the guest runs");
        };
        match running.pause() {
            Ok(paused) => (Self::Paused(paused), Ok(Answer::Ok)),
            Err((running, error)) => (Self::Running(running), Err(error.into())),
        }
    }

    fn resume(self) -> Outcome {
        let Self::Paused(paused) = self else {
            return self.wrong("Resume", "after Pause");
        };
        match paused.resume() {
            Ok(running) => (Self::Running(running), Ok(Answer::Ok)),
            Err((paused, error)) => (Self::Paused(paused), Err(error.into())),
        }
    }

    fn bind(self, bind: impl FnOnce(&Machine) -> Result<(), Failure>) -> Outcome {
        let Some(machine) = self.machine() else {
            return self.wrong("this request", "after CreateMachine");
        };
        let outcome = bind(machine);
        (self, outcome.map(|()| Answer::Ok))
    }

    fn machine(&self) -> Option<&Machine> {
        match self {
            Self::Shell(_) => None,
            Self::Created(created) => Some(created.as_ref()),
            Self::Reserved(reserved) => Some(reserved.as_ref()),
            Self::Parked(parked) => Some(parked.as_ref()),
            Self::Running(running) => Some(running.as_ref()),
            Self::Saving(saving) => Some(saving.as_ref()),
            Self::Paused(paused) => Some(paused.as_ref()),
        }
    }

    /// Whether the process has made all its threads.
    #[must_use]
    pub fn has_machine(&self) -> bool {
        self.machine().is_some()
    }

    fn state(&self) -> Answer {
        let machine = self.machine();
        let counters = machine.map(Machine::counters).unwrap_or_default();
        let about = machine.map(|machine| About {
            memory: machine.memory_state(),
            machine: machine.shape().clone(),
        });
        Answer::State(self.wire(), counters, about)
    }

    fn wire(&self) -> WirePhase {
        match self {
            Self::Shell(_) => WirePhase::Shell,
            Self::Created(_) => WirePhase::Created,
            Self::Reserved(_) => WirePhase::Reserved,
            Self::Parked(_) => WirePhase::Parked,
            Self::Running(_) | Self::Saving(_) => WirePhase::Running,
            Self::Paused(_) => WirePhase::Paused,
        }
    }

    fn wrong(self, step: &str, allowed: &str) -> Outcome {
        let message = format!(
            "{step} is allowed {allowed}; the machine is in phase {}",
            self.wire().as_str_name()
        );
        (
            self,
            Err(Failure {
                code: Code::WrongPhase,
                message,
            }),
        )
    }
}

fn load_request(message: &LoadSnapshot, mut fds: Fds) -> Result<LoadRequest, Failure> {
    let socket = message.paged.then(|| fds.0.pop()).flatten();
    let server = socket.map(nonblocking).transpose();
    let server = server.map_err(|error| Failure::of(Code::Resource, &error))?;
    let mut files = fds.0.into_iter().map(File::from);
    // Fds::check counted them.
    let state = files.next();
    let state = state.ok_or_else(|| Failure::invalid("LoadSnapshot without a state file"))?;
    let memory = files.collect();
    Ok(LoadRequest { state, memory, server })
}

fn save_request(message: &SaveSnapshot, fds: Fds) -> Result<SaveRequest, Failure> {
    let base = match &message.base[..] {
        [] => None,
        id => Some(Id::try_from(id).map_err(|_| {
            Failure::invalid(format!(
                "base has {} bytes: must be none or a snapshot's id of 16",
                id.len()
            ))
        })?),
    };
    let mut files = fds.0.into_iter().map(File::from);
    // Fds::check counted them.
    let pair = files.next().zip(files.next());
    let (state, memory) = pair.ok_or_else(|| Failure::invalid("a state file and a memory file are needed"))?;
    Ok(SaveRequest {
        state,
        memory,
        base,
        stay_paused: message.stay_paused,
    })
}

/// The descriptors of a request, as many as it needs.
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn check(command: &Command, fds: Vec<OwnedFd>) -> Result<Self, Failure> {
        let (name, least, most) = match command {
            Command::LoadKernel(message) if message.has_initrd => ("LoadKernel with initrd", 2, 2),
            Command::LoadKernel(_) => ("LoadKernel without initrd", 1, 1),
            Command::BindDisk(message) => match message.source {
                Some(bind_disk::Source::Image(image)) if image.chunks.is_some() => {
                    ("BindDisk of an image with a chunk server", 2, vmm::MAX_FDS)
                }
                Some(bind_disk::Source::Image(_)) => ("BindDisk of an image", 1, vmm::MAX_FDS),
                _ => ("BindDisk of a file", 1, 1),
            },
            Command::ServeChunks(_) => ("ServeChunks", 1, 1),
            Command::BindNet(_) => ("BindNet", 1, 1),
            Command::BindVsock(_) => ("BindVsock", 1, 1),
            Command::BindSerial(_) => ("BindSerial", 1, 1),
            Command::LoadSnapshot(message) if message.paged => ("LoadSnapshot of paged memory", 3, 3 + MAX_BASES),
            Command::LoadSnapshot(_) => ("LoadSnapshot", 2, 2 + MAX_BASES),
            Command::SaveSnapshot(_) => ("SaveSnapshot", 2, 2),
            Command::RecordWorkingSet(_) => ("RecordWorkingSet", 1, 1),
            Command::ReplayWorkingSet(_) => ("ReplayWorkingSet", 1, 1),
            Command::Claim(message) => {
                let count = claimed_fds(message);
                ("this Claim", count, count)
            }
            _ => ("this request", 0, 0),
        };
        if (least..=most).contains(&fds.len()) {
            return Ok(Self(fds));
        }
        let wanted = if least == most {
            least.to_string()
        } else {
            format!("{least} to {most}")
        };
        Err(Failure::invalid(format!(
            "{name} takes {wanted} file descriptors, {} came",
            fds.len()
        )))
    }

    /// The first so many of them.
    fn take(&mut self, count: usize) -> Self {
        let rest = self.0.split_off(count.min(self.0.len()));
        Self(std::mem::replace(&mut self.0, rest))
    }

    fn only(mut self, take: impl FnOnce(OwnedFd) -> Result<(), Failure>) -> Result<(), Failure> {
        take(self.first()?)
    }

    /// Takes the first one out.
    fn first(&mut self) -> Result<OwnedFd, Failure> {
        if self.0.is_empty() {
            return Err(Self::missing());
        }
        Ok(self.0.remove(0))
    }

    fn missing() -> Failure {
        Failure::invalid("a file descriptor is missing")
    }
}

fn disk_fds(disk: &ClaimDisk) -> usize {
    usize::try_from(disk.fds.max(1)).unwrap_or(usize::MAX)
}

fn claimed_fds(message: &Claim) -> usize {
    let others = message.nets.len() + usize::from(message.vsock.is_some()) + usize::from(message.serial.is_some());
    message.disks.iter().map(disk_fds).fold(others, usize::saturating_add)
}

/// Binds what a claim brings, whose descriptors were counted.
fn bind_all(machine: &Machine, message: &Claim, mut fds: Fds) -> Result<(), Failure> {
    for disk in &message.disks {
        let bind = disk
            .disk
            .as_ref()
            .ok_or_else(|| Failure::invalid("a disk of the Claim names no slot"))?;
        bind_disk(machine, bind, fds.take(disk_fds(disk)))?;
    }
    for net in &message.nets {
        fds.take(1).only(|fd| bind_net(machine, net, fd))?;
    }
    if message.vsock.is_some() {
        fds.take(1).only(|fd| bind_vsock(machine, fd))?;
    }
    if message.serial.is_some() {
        fds.take(1).only(|fd| Ok(machine.bind_serial(fd)?))?;
    }
    Ok(())
}

fn bind_disk(machine: &Machine, message: &BindDisk, mut fds: Fds) -> Result<(), Failure> {
    let limit = message.rate_limit.map(rate_limit).unwrap_or_default();
    let disk = match &message.source {
        None => return Err(Failure::invalid("BindDisk names no source")),
        Some(bind_disk::Source::RawFile(raw)) => {
            let file = File::from(fds.first()?);
            BlockResource::raw_file_by(machine.take_ring(), file, raw.direct, limit)
        }
        Some(bind_disk::Source::Image(image)) => {
            let chunks = image.chunks.as_ref().map(|server| chunk_server(server, &mut fds));
            let chunks = chunks.transpose()?;
            let table = File::from(fds.first()?);
            let packs = fds.0.into_iter().map(File::from).collect();
            let device = ImageDevice::open(table, packs).map_err(|error| Failure::of(Code::Resource, &error))?;
            BlockResource::image(Box::new(device), chunks, limit)
        }
    };
    let disk = disk.map_err(|error| Failure::of(Code::Resource, &error))?;
    Ok(machine.bind_disk(message.slot, disk)?)
}

/// The longest that a read may wait: a day.
const MAX_CHUNK_DEADLINE_MS: u32 = 86_400_000;

/// Its socket is the last descriptor.
fn chunk_server(server: &ChunkServer, fds: &mut Fds) -> Result<Chunks, Failure> {
    let deadline = server.deadline_ms;
    if !(1..=MAX_CHUNK_DEADLINE_MS).contains(&deadline) {
        return Err(Failure::invalid(format!(
            "chunks.deadline_ms is {deadline}: must be 1 to {MAX_CHUNK_DEADLINE_MS}"
        )));
    }
    let socket = fds.0.pop().ok_or_else(Fds::missing)?;
    let chunks = Chunks::new(socket, Duration::from_millis(deadline.into()));
    chunks.map_err(|error| Failure::of(Code::Resource, &error))
}

fn bind_net(machine: &Machine, message: &BindNet, fd: OwnedFd) -> Result<(), Failure> {
    let [rx, tx] = [message.rx_limit, message.tx_limit].map(|limit| limit.map(rate_limit).unwrap_or_default());
    let net = Tap::from_fd(fd).and_then(|tap| NetResource::new(tap, rx, tx));
    let net = net.map_err(|error| Failure::of(Code::Resource, &error))?;
    Ok(machine.bind_net(message.slot, net)?)
}

fn set_balloon(machine: &Machine, bytes: u64) -> Result<(), Failure> {
    /// The balloon's unit (virtio 1.3, 5.5.6).
    const PAGE: u64 = 4096;
    match u32::try_from(bytes / PAGE) {
        Ok(pages) if bytes.is_multiple_of(PAGE) => Ok(machine.set_balloon(pages)?),
        _ => Err(Failure::invalid(format!(
            "target_bytes is {bytes}: must be a multiple of 4 KiB below 16 TiB"
        ))),
    }
}

fn bind_vsock(machine: &Machine, fd: OwnedFd) -> Result<(), Failure> {
    let listening = getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false);
    let address = getsockname::<UnixAddr>(fd.as_raw_fd());
    if !listening || address.is_err() {
        return Err(Failure {
            code: Code::Resource,
            message: "binding the vsock device: the descriptor is no listening unix socket".to_owned(),
        });
    }
    Ok(machine.bind_vsock(UnixListener::from(fd))?)
}

fn rate_limit(limit: vmm::RateLimit) -> RateLimit {
    RateLimit {
        bytes_per_second: limit.bytes_per_second,
        operations_per_second: limit.operations_per_second,
        burst_bytes: limit.burst_bytes,
        burst_operations: limit.burst_operations,
    }
}
