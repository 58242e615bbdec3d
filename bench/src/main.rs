//! `flint-bench`: what starts cost, stage by stage, beside peers on the same host.
//!
//! ```text
//! start      pods to their first output, beside a peer, and many at once
//! host       drives flintd as any client does: pull, start to first output, remove
//! timeline   what flintd says of a start
//! qemu       the peer: QEMU's microvm machine, same kernel, same initrd, booted or restored
//! claim      flint-vmm alone: from the claim of a clone to its first port write, beside what KVM alone needs
//! apply      all of flintd on the way: from ApplyPod to a clone's first port write
//! density    memory of many clones that do nothing (in claim/)
//! footprint  memory of flint-vmm beside its guest's, of flint-init, sizes of the binaries
//! tiny       guests of a few instructions
//! samples    raw samples and what is said of them
//! report     tables for people, JSON with every sample, Markdown for docs/results.md
//! ```
//!
//! Figures mean something only with their command, their host and their level of proof: the report carries all three.

mod apply;
mod claim;
mod footprint;
mod host;
mod qemu;
mod report;
mod samples;
mod start;
mod timeline;
mod tiny;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use report::Report;
use samples::Samples;

/// Measure what pod starts cost on this host.
#[derive(Debug, Parser)]
#[command(name = "flint-bench", version, arg_required_else_help = true)]
struct Bench {
    /// Socket of flintd.
    #[arg(
        long,
        global = true,
        env = "FLINT_SOCKET",
        default_value = "/run/flint/flintd.sock",
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// How to print the results.
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// The same as `--format json`.
    #[arg(long, global = true, conflicts_with = "format")]
    json: bool,
    /// What the figures prove: "native" on bare metal, "emulated host" inside one.
    #[arg(long, global = true, default_value = "native")]
    level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// Tables.
    Text,
    /// Every sample.
    Json,
    /// Tables for docs/results.md.
    Markdown,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pull an image that is not here, again and again.
    Pull(Pull),
    /// Start pods to their first output, one after the other with a peer in turn, and at once.
    Start(start::Start),
    /// Claim clones of a tiny guest: needs no flintd and no Linux guest, but root and /dev/kvm.
    Claim(claim::Claims),
    /// Start pods of a tiny guest through a flintd of this program's own: needs root, /dev/kvm, nft, and the image's registry.
    Apply(apply::Applies),
    /// Memory of many clones of a tiny guest that do nothing: needs what `claim` needs.
    Density(claim::density::Density),
    /// Memory of a running pod's processes, and sizes of binaries.
    Footprint(Footprint),
}

#[derive(Debug, Args)]
struct Pull {
    /// Runs.
    #[arg(short = 'n', long, default_value_t = 5)]
    runs: u32,
    /// The image; it is removed before each run.
    image: String,
}

#[derive(Debug, Args)]
struct Footprint {
    /// flintd's run folder.
    #[arg(long, default_value = "/run/flint")]
    run_dir: PathBuf,
    /// Binaries whose sizes to tell.
    #[arg(long, value_name = "PATH")]
    binary: Vec<PathBuf>,
    /// An image whose shell stays: it is started with `sleep 1000`.
    image: String,
}

fn main() -> ExitCode {
    let bench = Bench::parse();
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::from)
        .and_then(|runtime| runtime.block_on(measure(&bench)));
    let printed = result.and_then(|report| report.print(if bench.json { Format::Json } else { bench.format }));
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flint-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What went wrong; a benchmark that cannot be finished tells no figures.
type Error = Box<dyn std::error::Error>;

async fn measure(bench: &Bench) -> Result<Report, Error> {
    if let Command::Claim(wanted) = &bench.command {
        let mut report = Report::new(&bench.level, claim::facts());
        claim::measure(wanted, &mut report)?;
        return Ok(report);
    }
    if let Command::Density(wanted) = &bench.command {
        let mut report = Report::new(&bench.level, claim::facts());
        claim::density::measure(wanted, &mut report)?;
        return Ok(report);
    }
    if let Command::Apply(wanted) = &bench.command {
        let mut report = Report::new(&bench.level, claim::facts());
        apply::measure(wanted, &mut report).await?;
        return Ok(report);
    }
    let host = host::Host::connect(&bench.socket).await?;
    let mut report = Report::new(&bench.level, host.facts().await?);
    match &bench.command {
        Command::Pull(pull) => measure_pulls(&host, pull, &mut report).await?,
        Command::Start(wanted) => start::measure(&host, wanted, &mut report).await?,
        // Done above: they need no host.
        Command::Claim(_) | Command::Apply(_) | Command::Density(_) => {}
        Command::Footprint(wanted) => footprint::measure(&host, wanted, &mut report).await?,
    }
    Ok(report)
}

async fn measure_pulls(host: &host::Host, pull: &Pull, report: &mut Report) -> Result<(), Error> {
    let mut samples = Samples::new("image.pull, whole");
    for run in 0..pull.runs {
        host.remove_image(&pull.image).await?;
        let (elapsed, image) = host.pull(&pull.image).await?;
        samples.push(elapsed);
        report.progress(run + 1, pull.runs);
        if run == 0 {
            report.fact(
                "image",
                format!("{}: {} bytes compressed", pull.image, image.compressed_bytes),
            );
        }
    }
    report.add(samples);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Bench::command().debug_assert();
    }
}
