//! What a claim costs: from flintd's message until the guest's first port write is seen, beside what KVM alone needs.
//!
//! ```text
//! guest   a few instructions that tell when they go on in a clone
//! vmm     flint-vmm, driven as flintd drives it
//! clones  a template of that guest, and sandboxes on their way to being its clones; tap: their taps
//! floor   the same by KVM alone, in turn with the clones
//! crowd   each step beside many parked clones
//! sizes   clones that become small and large pods
//! density what idle and parked clones have of the host's memory
//! ```
//!
//! No flintd takes part: its part of a claim is this one message, with descriptors that are open. Machines have the slots of a
//! pod's: eight images and a scratch disk, a network, vsock, random numbers; the claim puts an image, a scratch
//! disk and a tap into theirs.

mod clones;
mod crowd;
pub mod density;
mod floor;
mod guest;
mod sizes;
mod tap;
mod vmm;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use kvm_ioctls::Kvm;

use self::clones::{Template, ready};
use self::floor::Floor;
use crate::Error;
use crate::report::Report;
use crate::samples::Samples;

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
    /// Also take each step beside so many parked clones; may be repeated.
    #[arg(long, value_name = "CLONES")]
    beside: Vec<u32>,
    /// Only whether a claim takes longer for a large pod: the smallest and the largest, clones of one template.
    #[arg(long)]
    sizes: bool,
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
    tap::isolate()?;
    if wanted.sizes {
        return sizes::measure(&wanted.vmm, wanted.runs, report);
    }
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
        let template = Template::new(&wanted.vmm, bytes)?;
        let memory = floor::memory(bytes)?;
        let mut figures = Figures::new(*mib, wanted.at_once);
        for run in 0..=wanted.runs {
            let floor = Floor::measure(&kvm, &memory)?;
            for (samples, ahead) in figures.claims.iter_mut().zip(Ahead::ALL) {
                let took = claim(&template, ahead)?;
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
            burst(&template, wanted.at_once, &mut figures.burst)?;
            step(report);
        }
        figures.finish(report);
        if index == 0 {
            crowd::measure(&template, &wanted.beside, wanted.runs, report)?;
        }
    }
    Ok(())
}

/// Claims a clone; the time until its first port write is seen.
fn claim(template: &Template, ahead: Ahead) -> Result<Duration, Error> {
    let outside = template.outside()?;
    let begin = Instant::now();
    let mut sandbox = template.spawn(outside)?;
    template.reserve(&mut sandbox)?;
    let reserved = Instant::now();
    template.begin_load(&mut sandbox)?;
    let mut answers = 2;
    if ahead == Ahead::Clone {
        sandbox.answer()?;
        answers = 1;
    }
    let loaded = Instant::now();
    template.claim(&mut sandbox)?;
    let mut told = loaded;
    sandbox.wait(answers, || told = Instant::now())?;
    Ok(told
        - match ahead {
            Ahead::Nothing => begin,
            Ahead::Shell => reserved,
            Ahead::Clone => loaded,
        })
}

/// Claims many at the same moment; the time of each from that moment on.
fn burst(template: &Template, count: u32, samples: &mut Samples) -> Result<(), Error> {
    let mut sandboxes = (0..count).map(|_| template.parked()).collect::<Result<Vec<_>, _>>()?;
    let begin = Instant::now();
    for sandbox in &mut sandboxes {
        template.claim(sandbox)?;
    }
    let mut waiting: Vec<_> = sandboxes.iter_mut().collect();
    while !waiting.is_empty() {
        let mut ready = ready(&waiting)?.into_iter();
        let now = begin.elapsed();
        let told: Vec<_> = waiting.extract_if(.., |_| ready.next().unwrap_or_default()).collect();
        for sandbox in told {
            sandbox.wait(1, || ())?;
            samples.push(now);
        }
    }
    // All end only now: the end of one would take the processors from those on their way.
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
