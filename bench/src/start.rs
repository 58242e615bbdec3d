//! Pods from their acceptance to their first output: one after the other, a peer in turn with them, and many at once.
//!
//! As pods come into being, so does the peer: beside pods that are booted QEMU boots, beside clones it restores.

use std::path::PathBuf;

use clap::Args;
use flint_api::host::Stage;
use tokio::task::JoinSet;

use crate::Error;
use crate::host::Host;
use crate::qemu::{self, Saved};
use crate::report::Report;
use crate::samples::Samples;
use crate::timeline::{Boundaries, Stages, Way};

/// What to measure.
#[derive(Debug, Args)]
pub struct Start {
    /// Counted runs of each; one more comes first and is not counted.
    #[arg(short = 'n', long, default_value_t = 10)]
    runs: u32,
    /// Then so many at once; 0: none. For clones, flintd's --pool has to be as large.
    #[arg(long, default_value_t = 0, value_name = "PODS")]
    at_once: u32,
    /// Also have QEMU's microvm boot, or restore if the pods are clones, in turn with them.
    #[arg(long, requires_all = ["kernel", "initrd"])]
    qemu: Option<PathBuf>,
    /// The guest kernel that flintd uses.
    #[arg(long, env = "FLINT_KERNEL")]
    kernel: Option<PathBuf>,
    /// The initrd that flintd uses.
    #[arg(long, env = "FLINT_INITRD")]
    initrd: Option<PathBuf>,
    /// The kernel's command line for the peer.
    #[arg(long, default_value = qemu::CMDLINE)]
    cmdline: String,
    /// The peer's memory, in MiB: a guest with more of it has more to set up. The default is what flintd gives a pod that asks for
    /// nothing.
    #[arg(long, default_value_t = 320, value_name = "MIB")]
    memory: u32,
    /// The image; its program must print something.
    image: String,
    /// The program.
    #[arg(last = true, default_values = ["echo", "ready"])]
    command: Vec<String>,
}

impl Start {
    fn peer(&self) -> Option<qemu::Machine<'_>> {
        Some(qemu::Machine {
            qemu: self.qemu.as_ref()?,
            kernel: self.kernel.as_ref()?,
            initrd: self.initrd.as_ref()?,
            cmdline: &self.cmdline,
            memory_mib: self.memory,
        })
    }
}

/// Takes all figures.
pub async fn measure(host: &Host, start: &Start, report: &mut Report) -> Result<(), Error> {
    host.pull(&start.image).await?;
    let machine = start.peer();
    let (_, Boundaries { way, .. }) = one(host, start).await?;
    let mut peer = machine.as_ref().map(|machine| Peer::new(machine, way)).transpose()?;
    let mut figures = Figures::new(way);
    for run in 0..start.runs {
        let (timeline, boundaries) = one(host, start).await?;
        figures.add(&timeline, &boundaries)?;
        if let Some(peer) = &mut peer {
            peer.run().await?;
        }
        report.progress(run + 1, start.runs);
    }
    let burst = many(host, start, way).await?;
    match peer {
        Some(peer) => peer.finish(&figures.ready, report),
        None => report.fact("peers", "QEMU microvm: not asked for (--qemu)"),
    }
    figures.finish(&burst, report);
    Ok(())
}

/// Starts a pod when as many clones are parked as there should be.
async fn one(host: &Host, start: &Start) -> Result<(Vec<Stage>, Boundaries), Error> {
    host.pool_is_full().await?;
    let timeline = host.start(&start.image, &start.command).await?;
    let boundaries = Boundaries::of(&timeline)?;
    Ok((timeline, boundaries))
}

/// Starts many at once; how long each took until its first output.
async fn many(host: &Host, start: &Start, way: Way) -> Result<Samples, Error> {
    let mut burst = Samples::new(format!(
        "Flint: pod accepted until first output, {} at once",
        start.at_once
    ));
    host.pool_is_full().await?;
    let mut pods = JoinSet::new();
    for _ in 0..start.at_once {
        let (host, image, command) = (host.clone(), start.image.clone(), start.command.clone());
        pods.spawn(async move {
            // An error's source need not go between threads; its text can.
            let timeline = host.start(&image, &command).await.map_err(|error| error.to_string())?;
            Boundaries::of(&timeline).map_err(|error| error.to_string())
        });
    }
    while let Some(pod) = pods.join_next().await {
        let boundaries = pod??;
        if boundaries.way != way {
            return Err(
                "of the pods that came at once some were clones and some were not: flintd needs a larger --pool".into(),
            );
        }
        burst.push(boundaries.output);
    }
    Ok(burst)
}

/// Of pods one after the other.
struct Figures {
    stages: Stages,
    ready: Samples,
    output: Samples,
}

impl Figures {
    fn new(way: Way) -> Self {
        let ready = match way {
            Way::Booted => "Flint: spawn until flint-init has dialled",
            Way::Cloned => "Flint: claim until flint-init has acknowledged its identity",
        };
        Self {
            stages: Stages::default(),
            ready: Samples::new(ready),
            output: Samples::new("Flint: pod accepted until first output"),
        }
    }

    fn add(&mut self, timeline: &[Stage], boundaries: &Boundaries) -> Result<(), Error> {
        self.ready.push(boundaries.ready);
        self.output.push(boundaries.output);
        self.stages.add(timeline)
    }

    fn finish(self, burst: &Samples, report: &mut Report) {
        report.ratio(
            "slowest of those at once / one alone",
            burst.quantile(1, 1),
            self.output.median(),
        );
        self.stages.finish(report);
        report.add(self.ready);
        report.add(self.output);
        if burst.len() > 0 {
            report.add(burst.clone());
        }
    }
}

/// QEMU's microvm.
enum Peer<'a> {
    Boots(&'a qemu::Machine<'a>, Samples),
    Restores(Saved<'a>, [Samples; 2]),
}

impl<'a> Peer<'a> {
    fn new(machine: &'a qemu::Machine<'a>, way: Way) -> Result<Self, Error> {
        let samples = |what: &str| Samples::new(format!("QEMU microvm: {what}"));
        Ok(match way {
            Way::Booted => Self::Boots(machine, samples("spawn until flint-init has dialled")),
            Way::Cloned => {
                let samples = [
                    samples("spawn with -incoming until flint-init has answered"),
                    samples("migrate-incoming to one that was spawned before, until flint-init has answered"),
                ];
                Self::Restores(machine.save()?, samples)
            }
        })
    }

    async fn run(&mut self) -> Result<(), Error> {
        match self {
            Self::Boots(machine, boots) => boots.push(machine.boot()?),
            Self::Restores(saved, [from_spawn, from_command]) => {
                let restored = saved.restore().await?;
                from_spawn.push(restored.from_spawn);
                from_command.push(restored.from_command);
            }
        }
        Ok(())
    }

    fn finish(self, ours: &Samples, report: &mut Report) {
        let samples = match self {
            Self::Boots(_, boots) => vec![boots],
            Self::Restores(_, restored) => restored.into(),
        };
        for theirs in samples {
            let what = format!("{} / {}", ours.name, theirs.name);
            report.ratio(&what, ours.median(), theirs.median());
            report.add(theirs);
        }
    }
}
