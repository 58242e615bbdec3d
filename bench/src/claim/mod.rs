//! What a claim costs: from flintd's message until the guest's first port write is seen, beside what KVM alone needs.
//!
//! ```text
//! guest   a few instructions that tell when they go on in a clone
//! vmm     flint-vmm, driven as flintd drives it
//! floor   the same by KVM alone, in turn with the clones
//! ```
//!
//! No flintd takes part: its part of a claim is this one message, with descriptors that are open. Machines have the slots of a
//! pod's: eight images and a scratch disk, a network, vsock, random numbers; the claim puts an image and a scratch disk into theirs.

mod floor;
mod guest;
mod vmm;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use flint_api::vmm::request::Command;
use flint_api::vmm::{
    BindDisk, BindSerial, BindVsock, Claim, ClaimDisk, CreateMachine, DiskSlot, LoadKernel, LoadSnapshot, NetSlot,
    Pause, RawFile, ReserveMachine, SaveSnapshot, Start, VsockSlot, bind_disk,
};
use kvm_ioctls::Kvm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use self::floor::Floor;
use self::vmm::Vmm;
use crate::Error;
use crate::report::Report;
use crate::samples::Samples;

const PATIENCE_MS: u16 = 10_000;
const IMAGES: u32 = 8;
const DISK_BYTES: u64 = 16 << 20;

/// What to measure.
#[derive(Debug, Args)]
pub struct Claims {
    /// Counted runs of each kind; one more comes first and is not counted.
    #[arg(short = 'n', long, default_value_t = 200)]
    runs: u32,
    /// Memory of the machines, in MiB; may be repeated.
    #[arg(long, value_name = "MIB", default_values_t = [128, 8192])]
    memory: Vec<u64>,
    /// So many parked clones of the first size are claimed at once; 0: none.
    #[arg(long, default_value_t = 50, value_name = "CLONES")]
    at_once: u32,
    /// How often that is done.
    #[arg(long, default_value_t = 4, value_name = "TIMES")]
    bursts: u32,
    /// flint-vmm.
    #[arg(long, env = "FLINT_VMM", default_value = "flint-vmm", value_name = "PATH")]
    vmm: PathBuf,
}

/// What there is of a sandbox when it is claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ahead {
    /// A parked clone: only its message is left.
    Clone,
    /// A shell: its template is mapped and set first.
    Shell,
    /// Nothing: a process is spawned first.
    Nothing,
}

impl Ahead {
    const ALL: [Self; 3] = [Self::Clone, Self::Shell, Self::Nothing];

    fn name(self) -> &'static str {
        match self {
            Self::Clone => "parked clone",
            Self::Shell => "shell",
            Self::Nothing => "no pool",
        }
    }
}

/// Takes all figures.
pub fn measure(wanted: &Claims, report: &mut Report) -> Result<(), Error> {
    report.fact("flint-vmm", wanted.vmm.display().to_string());
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    let sizes = u32::try_from(wanted.memory.len())?;
    let bursts = if wanted.at_once == 0 { 0 } else { wanted.bursts };
    let mut steps = (1..).map(|done| (done, sizes * (wanted.runs + 1) + bursts));
    let mut step = |report: &Report| {
        if let Some((done, of)) = steps.next() {
            report.progress(done, of);
        }
    };
    for (index, mib) in wanted.memory.iter().enumerate() {
        let bytes = mib.checked_mul(1 << 20).ok_or("so much memory cannot be asked for")?;
        let bench = Bench::new(wanted, bytes)?;
        let memory = floor::memory(bytes)?;
        let mut figures = Figures::new(*mib, wanted.at_once);
        for run in 0..=wanted.runs {
            let floor = Floor::measure(&kvm, &memory)?;
            for (samples, ahead) in figures.claims.iter_mut().zip(Ahead::ALL) {
                let took = bench.claim(ahead)?;
                if run > 0 {
                    samples.push(took);
                }
            }
            if run > 0 {
                figures.run.push(floor.run);
                figures.map.push(floor.map);
            }
            step(report);
        }
        for _ in (0..bursts).filter(|_| index == 0) {
            bench.burst(wanted.at_once, &mut figures.burst)?;
            step(report);
        }
        figures.finish(report);
    }
    Ok(())
}

/// Of one size.
struct Figures {
    run: Samples,
    map: Samples,
    claims: [Samples; 3],
    burst: Samples,
}

impl Figures {
    fn new(mib: u64, at_once: u32) -> Self {
        let samples = |what: &str| Samples::new(format!("{what}, {mib} MiB"));
        Self {
            run: samples("floor: KVM_RUN"),
            map: samples("floor: memory mapped, state set, KVM_RUN"),
            claims: Ahead::ALL.map(|ahead| samples(ahead.name())),
            burst: samples(&format!("parked clone, {at_once} at once")),
        }
    }

    fn finish(self, report: &mut Report) {
        for (samples, ahead) in self.claims.iter().zip(Ahead::ALL) {
            // What is left to do differs, and so does the least that it can cost.
            let floor = if ahead == Ahead::Clone { &self.run } else { &self.map };
            report.add_claim(samples, floor);
        }
        if self.burst.len() > 0 {
            report.add_claim(&self.burst, &self.run);
        }
        let all = [self.run, self.map].into_iter().chain(self.claims).chain([self.burst]);
        for samples in all.filter(|samples| samples.len() > 0) {
            report.add(samples);
        }
    }
}

/// A template, and what its clones get.
struct Bench<'a> {
    wanted: &'a Claims,
    folder: TempDir,
    machine: CreateMachine,
    image: File,
    scratch: File,
}

/// A sandbox on its way to its first instruction.
struct Sandbox {
    vmm: Vmm,
    serial: UnixStream,
    theirs: UnixStream,
    folder: TempDir,
}

impl<'a> Bench<'a> {
    fn new(wanted: &'a Claims, bytes: u64) -> Result<Self, Error> {
        let disk = || -> Result<File, Error> {
            let disk = tempfile::tempfile()?;
            disk.set_len(DISK_BYTES)?;
            Ok(disk)
        };
        let bench = Self {
            wanted,
            folder: tempfile::tempdir()?,
            machine: machine(bytes),
            image: disk()?,
            scratch: disk()?,
        };
        bench.make_template()?;
        Ok(bench)
    }

    fn make_template(&self) -> Result<(), Error> {
        let mut sandbox = self.spawn()?;
        let vmm = &mut sandbox.vmm;
        vmm.call(Command::CreateMachine(self.machine.clone()), &[])?;
        let mut kernel = tempfile::tempfile()?;
        kernel.write_all(&guest::kernel())?;
        vmm.call(Command::LoadKernel(LoadKernel::default()), &[kernel.as_fd()])?;
        sandbox.bind()?;
        sandbox.vmm.call(Command::Start(Start {}), &[])?;
        sandbox.told(guest::TEMPLATE)?;
        sandbox.vmm.call(Command::Pause(Pause {}), &[])?;
        let [state, memory] = ["state", "memory"].map(|name| File::create_new(self.folder.path().join(name)));
        let (state, memory) = (state?, memory?);
        let save = Command::SaveSnapshot(SaveSnapshot::default());
        sandbox.vmm.call(save, &[state.as_fd(), memory.as_fd()])
    }

    fn spawn(&self) -> Result<Sandbox, Error> {
        let (serial, theirs) = UnixStream::pair()?;
        serial.set_read_timeout(Some(Duration::from_millis(PATIENCE_MS.into())))?;
        Ok(Sandbox {
            vmm: Vmm::spawn(&self.wanted.vmm)?,
            serial,
            theirs,
            folder: tempfile::tempdir()?,
        })
    }

    /// A shell: a process with a machine that waits for a template.
    fn shell(&self) -> Result<Sandbox, Error> {
        let mut sandbox = self.spawn()?;
        let machine = Some(self.machine.clone());
        let reserve = Command::ReserveMachine(ReserveMachine {
            machine,
            ..ReserveMachine::default()
        });
        sandbox.vmm.call(reserve, &[])?;
        sandbox.bind()?;
        Ok(sandbox)
    }

    fn load(&self, sandbox: &mut Sandbox) -> Result<(), Error> {
        let [state, memory] = ["state", "memory"].map(|name| File::open(self.folder.path().join(name)));
        let (state, memory) = (state?, memory?);
        let load = Command::LoadSnapshot(LoadSnapshot::default());
        sandbox.vmm.call(load, &[state.as_fd(), memory.as_fd()])
    }

    fn parked(&self) -> Result<Sandbox, Error> {
        let mut sandbox = self.shell()?;
        self.load(&mut sandbox)?;
        Ok(sandbox)
    }

    /// Claims one; the time until its first port write is seen.
    fn claim(&self, ahead: Ahead) -> Result<Duration, Error> {
        let made = match ahead {
            Ahead::Clone => Some(self.parked()?),
            Ahead::Shell => Some(self.shell()?),
            Ahead::Nothing => None,
        };
        let begin = Instant::now();
        let mut sandbox = match made {
            Some(sandbox) => sandbox,
            None => self.shell()?,
        };
        if ahead != Ahead::Clone {
            self.load(&mut sandbox)?;
        }
        self.send_claim(&mut sandbox)?;
        let told = sandbox.told(guest::CLONE);
        let took = begin.elapsed();
        // A claim that was refused tells why; then nobody has to be told that its guest is silent.
        sandbox.vmm.answer()?;
        told?;
        Ok(took)
    }

    /// Claims many at the same moment; the time of each from that moment on.
    fn burst(&self, count: u32, samples: &mut Samples) -> Result<(), Error> {
        let mut sandboxes = (0..count).map(|_| self.parked()).collect::<Result<Vec<_>, _>>()?;
        let begin = Instant::now();
        for sandbox in &mut sandboxes {
            self.send_claim(sandbox)?;
        }
        let mut waiting: Vec<_> = sandboxes.iter_mut().collect();
        while !waiting.is_empty() {
            let mut ready = ready(&waiting)?.into_iter();
            let now = begin.elapsed();
            let told: Vec<_> = waiting.extract_if(.., |_| ready.next().unwrap_or_default()).collect();
            for sandbox in told {
                sandbox.told(guest::CLONE)?;
                samples.push(now);
            }
        }
        // All end only now: the end of one would take the processors from those on their way.
        Ok(())
    }

    fn send_claim(&self, sandbox: &mut Sandbox) -> Result<(), Error> {
        let disk = |slot| ClaimDisk {
            disk: Some(BindDisk {
                slot,
                source: Some(bind_disk::Source::RawFile(RawFile { direct: false })),
                rate_limit: None,
            }),
            fds: 1,
        };
        let claim = Claim {
            disks: vec![disk(0), disk(IMAGES)],
            ..Claim::default()
        };
        let fds = [self.image.as_fd(), self.scratch.as_fd()];
        sandbox.vmm.begin(Command::Claim(claim), &fds)
    }
}

impl Sandbox {
    /// What is bound to every machine, whatever becomes of it.
    fn bind(&mut self) -> Result<(), Error> {
        let listener = UnixListener::bind(self.folder.path().join("vsock.sock"))?;
        self.vmm.call(Command::BindVsock(BindVsock {}), &[listener.as_fd()])?;
        self.vmm
            .call(Command::BindSerial(BindSerial {}), &[self.theirs.as_fd()])
    }

    /// Waits until the guest writes this.
    fn told(&mut self, what: u8) -> Result<(), Error> {
        let mut byte = [0];
        let read = self.serial.read_exact(&mut byte);
        read.map_err(|error| format!("the guest does not write to its serial line: {error}"))?;
        if byte == [what] {
            Ok(())
        } else {
            Err(format!("the guest wrote {byte:?} instead of {what}").into())
        }
    }
}

/// Waits until at least one has written; which have.
fn ready(sandboxes: &[&mut Sandbox]) -> Result<Vec<bool>, Error> {
    let mut lines: Vec<_> = sandboxes
        .iter()
        .map(|sandbox| PollFd::new(sandbox.serial.as_fd(), PollFlags::POLLIN))
        .collect();
    if poll(&mut lines, PollTimeout::from(PATIENCE_MS))? == 0 {
        return Err(format!("{} clones do not go on", lines.len()).into());
    }
    Ok(lines.iter().map(|line| line.any().unwrap_or_default()).collect())
}

/// A machine with the slots of a pod's.
fn machine(memory_bytes: u64) -> CreateMachine {
    let slot = |serial: String, read_only| DiskSlot {
        serial,
        read_only,
        queues: 0,
    };
    CreateMachine {
        vcpus: 1,
        memory_bytes,
        disks: (0..IMAGES)
            .map(|number| slot(format!("image-{number}"), true))
            .chain([slot("scratch".into(), false)])
            .collect(),
        nets: vec![NetSlot {
            mac: vec![2, 0, 0, 0, 0, 1],
        }],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        ..CreateMachine::default()
    }
}

/// What a reader must know of this host.
pub fn facts() -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let profile = if cfg!(debug_assertions) {
        "development"
    } else {
        "release"
    };
    [
        (
            "cpu",
            model.map_or_else(String::new, |(_, model)| model.trim().to_owned()),
        ),
        ("kernel", read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("load", read("/proc/loadavg").trim().to_owned()),
        ("flint-bench is built for", profile.to_owned()),
    ]
    .map(|(name, fact)| (name.to_owned(), fact))
    .into()
}
