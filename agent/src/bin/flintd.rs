//! flintd: the host agent. Flags and environment; the rest is the library's.

use std::{io::IsTerminal as _, process::ExitCode};

use clap::{Parser, ValueEnum};
use flintd::daemon::{self, Options};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Runs container pods in microVMs on this host, behind a gRPC API (flint.host.v1).
///
/// flintd keeps its state in one folder and may be stopped or killed at any moment: sandboxes go on running, and the next
/// flintd takes them over with nothing lost from their logs. One flintd runs for each state folder.
#[derive(Debug, Parser)]
#[command(
    name = "flintd",
    version,
    after_long_help = "SIGNALS
  TERM, INT   stop: answer calls that have begun, then leave. Sandboxes go on, unless --stop-pods is given.

FILES
  /var/lib/flint/state.redb     pods, revisions, lease
  /var/lib/flint/logs           containers' output, 5 files of 10 MiB for each run
  /var/lib/flint/images         image store
  /run/flint/flintd.sock        the API for local tools
  /run/flint/sandboxes/<id>     what belongs to a running sandbox; serial.log has the guest's console

OUTPUT
  One line on standard output, \"ready: SOCKET\", when calls are answered. The log goes to standard error.

EXIT STATUS
  0 after a stop by signal, 1 where flintd could not start or go on.

EXAMPLES
  flintd --reserve-memory 2048 --metrics 127.0.0.1:9464
  flintd --listen-tls 10.0.0.1:7443 --tls-cert host.pem --tls-key host.key --tls-client-ca clients.pem"
)]
struct Command {
    #[command(flatten)]
    options: Options,

    /// How the log is written, on standard error.
    #[arg(long, value_enum, env = "FLINT_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

fn main() -> ExitCode {
    let command = Command::parse();
    init_log(command.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("flintd")
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("flintd: starting threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(daemon::run(command.options)) {
        Ok(journal) => {
            // Pods' tasks end here, their sandboxes do not; what they said last is still written.
            drop(runtime);
            if journal.join().is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("flintd: {}", flintd::chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// FLINT_LOG sets levels, for example `debug` or `info,flintd::pods=trace`.
fn init_log(format: LogFormat) {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .with_env_var("FLINT_LOG")
        .from_env_lossy();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Json => subscriber.json().init(),
        LogFormat::Text => subscriber.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}
