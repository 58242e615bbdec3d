//! What a pod's start costs with all of flintd on its way: from the sending of ApplyPod until a clone's first port write.
//!
//! ```text
//! guest   a few instructions that dial as flint-init does, and tell when they go on in a clone
//! daemon  a flintd of this program's own, whose guests' kernel is that
//! ```
//!
//! The guest speaks no gRPC, so its pod never runs: it is ended once it has told. The port write goes to the sandbox's console,
//! a file that is watched from before the call: only what was parked then has one, so it is a clone that is seen.

mod daemon;
mod guest;

use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use clap::Args;

use self::daemon::Daemon;
use crate::Error;
use crate::host::Host;
use crate::report::Report;
use crate::samples::Samples;
use crate::timeline::Stages;

/// What to measure.
#[derive(Debug, Args)]
pub struct Applies {
    /// Counted runs; one more comes first and is not counted.
    #[arg(short = 'n', long, default_value_t = 100)]
    runs: u32,
    /// Clones that are parked.
    #[arg(long, default_value_t = 2, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pool: u32,
    /// flintd.
    #[arg(long, default_value = "flintd", value_name = "PATH")]
    flintd: PathBuf,
    /// flint-vmm, where flintd looks for it.
    #[arg(long, env = "FLINT_VMM", default_value = "/usr/bin/flint-vmm", value_name = "FILE")]
    vmm: PathBuf,
    /// The pods' image; nothing in it is run.
    image: String,
}

/// Takes all figures.
pub async fn measure(wanted: &Applies, report: &mut Report) -> Result<(), Error> {
    let daemon = Daemon::start(&wanted.flintd, &wanted.vmm, &guest::kernel(), wanted.pool)?;
    let outcome = starts(wanted, &daemon, report).await;
    outcome.map_err(|error| daemon.explain(&error))
}

async fn starts(wanted: &Applies, daemon: &Daemon, report: &mut Report) -> Result<(), Error> {
    let host = Host::connect(&daemon.socket()).await?;
    host.pull(&wanted.image).await?;
    let mut starts = Samples::new("ApplyPod sent until the guest's first port write");
    let mut stages = Stages::default();
    for run in 0..=wanted.runs {
        host.pool_is_full().await?;
        let consoles = daemon.consoles()?;
        let seen = thread::spawn(move || consoles.written());
        let sent = Instant::now();
        let uid = host.apply(&wanted.image, &[]).await?;
        let seen = seen.join().map_err(|_| "whoever waits for the guest panicked")??;
        let timeline = host.kill(&uid).await?;
        if run > 0 {
            starts.push(seen - sent);
            stages.add(&timeline)?;
        }
        report.progress(run, wanted.runs);
    }
    stages.finish(report);
    report.add(starts);
    Ok(())
}
