//! `flint`: pods in microVMs on this host, from the command line.
//!
//! ```text
//! main      the command line and its exit codes
//! client    the connection to flintd, and pods by name
//! target    which flintd: by unix socket, or by mutual TLS
//! failure   what went wrong, said for a person, with the next step
//! output    tables, protobuf JSON, durations
//! terminal  raw mode and window sizes
//! the rest  one file a command, or a family of them
//! ```

mod apply;
mod client;
mod doctor;
mod exec;
mod failure;
mod fork;
mod images;
mod logs;
mod output;
mod pods;
mod run;
mod snapshots;
mod standstill;
mod store;
mod target;
mod template;
mod terminal;
mod timeline;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use failure::Failure;
use output::Format;

/// Run container pods in microVMs on this host.
///
/// flint talks to flintd, the host agent, over its unix socket, or over the network with --host. Pods are named NAME, NAMESPACE/NAME, or by their uid or
/// the beginning of it.
#[derive(Debug, Parser)]
#[command(name = "flint", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Flint {
    #[command(flatten)]
    target: target::Target,

    /// Print JSON (the API's own messages) instead of tables.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes:
  0    done
  1    flintd refused or failed; the message says why and what to do
  2    wrong usage
  125  run, exec: Flint failed before the program could end
  N    run, exec: the program's own exit code (128 + signal where a signal ended it)

Examples:
  flint run registry.example/busybox:1 -- echo hello
  flint run -it --rm registry.example/busybox:1 -- sh
  flint apply -f pod.yaml --wait && flint logs -f web
  flint timeline web";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one container in a pod of its own and take its exit code.
    Run(run::Run),
    /// Create or change pods from Kubernetes Pod manifests.
    Apply(apply::Apply),
    /// List pods.
    #[command(visible_alias = "ls")]
    Ps(pods::Ps),
    /// Print a container's log.
    Logs(logs::Logs),
    /// Run a program in a running container.
    Exec(exec::Exec),
    /// Have pods stand still.
    Pause(standstill::Pause),
    /// Have paused pods go on.
    Resume(standstill::Resume),
    /// Make new pods of one that runs, as it is now.
    Fork(fork::Fork),
    /// Save pods as they run; list, remove and move what was saved.
    #[command(visible_alias = "snapshot")]
    Snapshots(snapshots::Snapshots),
    /// Give the template of this host's pods to other hosts, or take theirs.
    Template(template::Template),
    /// End pods: TERM, the grace period, KILL.
    Stop(pods::Stop),
    /// Remove ended pods with their logs.
    Rm(pods::Rm),
    /// Show how a pod's start spent its time, stage by stage.
    Timeline(timeline::Timeline),
    /// List, import and remove images.
    Images(images::Images),
    /// Bring an image to this host.
    Pull(images::Pull),
    /// Show what the chunk store holds; look through it, and repair it.
    Store(store::Store),
    /// Say what this host can and cannot do for Flint, and what to do about each lack.
    Doctor(doctor::Doctor),
    /// Print the completion script for a shell: `source <(flint completion bash)`.
    Completion {
        /// The shell to complete for.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let flint = Flint::parse();
    let format = if flint.json { Format::Json } else { Format::Text };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::local("start the runtime", error).report(1),
    };
    let failed = if matches!(flint.command, Command::Run(_) | Command::Exec(_)) {
        125
    } else {
        1
    };
    let result = runtime.block_on(dispatch(flint, format));
    // A read of standard input may still be waiting in a thread; it must not hold the exit back.
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(failed),
    }
}

async fn dispatch(flint: Flint, format: Format) -> Result<u8, Failure> {
    let target = flint.target;
    let connect = || client::Client::connect(&target);
    match flint.command {
        Command::Run(run) => run.execute(connect().await?, format).await,
        Command::Apply(apply) => apply.execute(connect().await?, format).await,
        Command::Ps(ps) => ps.execute(connect().await?, format).await,
        Command::Logs(logs) => logs.execute(connect().await?, format).await,
        Command::Exec(exec) => exec.execute(connect().await?).await,
        Command::Pause(pause) => pause.execute(connect().await?, format).await,
        Command::Resume(resume) => resume.execute(connect().await?, format).await,
        Command::Fork(fork) => fork.execute(connect().await?, format).await,
        Command::Snapshots(snapshots) => snapshots.execute(connect().await?, format).await,
        Command::Template(template) => template.execute(connect().await?, format).await,
        Command::Stop(stop) => stop.execute(connect().await?).await,
        Command::Rm(rm) => rm.execute(connect().await?).await,
        Command::Timeline(timeline) => timeline.execute(connect().await?, format).await,
        Command::Images(images) => images.execute(connect().await?, format).await,
        Command::Pull(pull) => pull.execute(connect().await?, format).await,
        Command::Store(store) => store.execute(connect().await?, format).await,
        Command::Doctor(doctor) => doctor.execute(connect().await, format).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Flint::command(), "flint", &mut io::stdout());
            Ok(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Flint::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_program() {
        let flint = Flint::try_parse_from(["flint", "run", "busybox", "--", "ls", "--json"]).unwrap();

        assert!(!flint.json);
        let Command::Run(run) = flint.command else {
            panic!("not run")
        };
        assert_eq!(run.command, ["ls", "--json"]);
    }
}
