//! What clones that do nothing have of the host's memory, counted in three ways that each leave something out.
//!
//! ```text
//! PSS, private   what their processes map: nothing that the kernel keeps for them
//! memcg          all that was charged to their cgroup: page tables and kernel objects too, but a shared page only to who came first
//! free memory    what the host has less: all, also what others did meanwhile
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use super::clones::{Sandbox, Template};
use super::tap;
use crate::Error;
use crate::footprint::VmmMemory;
use crate::report::Report;

const CGROUPS: &str = "/sys/fs/cgroup";

/// What to measure.
#[derive(Debug, Args)]
pub struct Density {
    /// Clones.
    #[arg(short = 'n', long, default_value_t = 50)]
    clones: u32,
    /// Memory of each machine, in MiB.
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    memory: u64,
    /// flint-vmm.
    #[arg(long, env = "FLINT_VMM", default_value = "flint-vmm", value_name = "PATH")]
    vmm: PathBuf,
}

/// Takes all figures.
pub fn measure(wanted: &Density, report: &mut Report) -> Result<(), Error> {
    if wanted.clones == 0 {
        return Err("no clones, no memory: --clones must be at least 1".into());
    }
    report.fact("flint-vmm", wanted.vmm.display().to_string());
    report.fact("clones", format!("{} of {} MiB", wanted.clones, wanted.memory));
    tap::isolate()?;
    let cgroup = Cgroup::enter()?;
    if cgroup.is_none() {
        report.fact("memcg", format!("{CGROUPS} is no cgroup v2 with the memory controller"));
    }
    let bytes = wanted.memory.checked_mul(1 << 20);
    let template = Template::new(&wanted.vmm, bytes.ok_or("so much memory cannot be asked for")?)?;
    // What the first one brings into memory is everybody's.
    drop(template.parked()?);
    let before = Host::read(cgroup.as_ref())?;
    let mut clones = Vec::new();
    for done in 1..=wanted.clones {
        clones.push(template.parked()?);
        report.progress(done, wanted.clones);
    }
    tell("parked", &clones, before, &Host::read(cgroup.as_ref())?, report)?;
    for clone in &mut clones {
        template.claim(clone)?;
        clone.wait(1, || ())?;
    }
    tell("idle", &clones, before, &Host::read(cgroup.as_ref())?, report)
}

/// Tells what one parked clone of a template has beyond what is shared, of so many: its VMM's own, and what the host has less, which
/// has the kernel's part in it.
pub(super) fn of_parked(kind: &str, template: &Template, clones: u32, report: &mut Report) -> Result<(), Error> {
    // What the first one brings into memory is everybody's.
    drop(template.parked()?);
    let before = Host::read(None)?;
    let clones = (0..clones).map(|_| template.parked()).collect::<Result<Vec<_>, _>>()?;
    tell(kind, &clones, before, &Host::read(None)?, report)
}

/// Tells what one clone has, on average.
fn tell(kind: &str, clones: &[Sandbox], before: Host, now: &Host, report: &mut Report) -> Result<(), Error> {
    let mut sums = [0; 4];
    for clone in clones {
        let pid = clone.pid().ok_or("a VMM has not told its process id")?;
        let memory = VmmMemory::read(&fs::read_to_string(format!("/proc/{pid}/smaps"))?)?;
        let parts = [
            memory.own_private,
            memory.own_share,
            memory.guest_private,
            memory.guest_share,
        ];
        for (sum, part) in sums.iter_mut().zip(parts) {
            *sum += part;
        }
    }
    let count = clones.len() as u64;
    let [own_private, own_share, guest_private, guest_share] = sums.map(|sum| sum / count);
    let mut amount = |what: &str, bytes| report.amount(format!("{kind} clone: {what}"), bytes);
    amount("private memory, VMM's own and guest's", own_private + guest_private);
    amount("PSS, VMM's own and guest's", own_share + guest_share);
    amount("private memory, the VMM's own", own_private);
    amount("PSS, the VMM's own", own_share);
    if let (Some(now), Some(before)) = (now.charged, before.charged) {
        amount("memcg", now.saturating_sub(before) / count);
    }
    amount("free memory of the host", before.free.saturating_sub(now.free) / count);
    Ok(())
}

/// The host's memory at a moment.
#[derive(Debug, Clone, Copy)]
struct Host {
    /// What could be given to somebody (proc(5), MemAvailable): the page cache is not counted as taken.
    free: u64,
    charged: Option<u64>,
}

impl Host {
    fn read(cgroup: Option<&Cgroup>) -> Result<Self, Error> {
        let info = fs::read_to_string("/proc/meminfo")?;
        let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        Ok(Self {
            free: kib.ok_or("/proc/meminfo does not tell MemAvailable")? << 10,
            charged: cgroup.map(Cgroup::charged).transpose()?,
        })
    }
}

/// A cgroup of this program and its clones. It leaves it, and takes it away, in the end.
struct Cgroup(PathBuf);

impl Cgroup {
    /// None: this host has none that counts memory.
    fn enter() -> Result<Option<Self>, Error> {
        let root = Path::new(CGROUPS);
        let controllers = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap_or_default();
        if !controllers.split_whitespace().any(|controller| controller == "memory") {
            return Ok(None);
        }
        let folder = root.join(format!("flint-bench-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let cgroup = Self(folder);
        fs::write(cgroup.0.join("cgroup.procs"), "0")?;
        Ok(Some(cgroup))
    }

    fn charged(&self) -> Result<u64, Error> {
        Ok(fs::read_to_string(self.0.join("memory.current"))?.trim().parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its clones have ended. If it cannot be left, it stays behind empty.
        let _ = fs::write(Path::new(CGROUPS).join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.0);
    }
}
