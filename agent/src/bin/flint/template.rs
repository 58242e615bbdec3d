//! `template`: `push`, `pull`.

use clap::{Args, Subcommand};
use flint_api::host::{PullTemplateRequest, PushTemplateRequest};

use crate::client::Client;
use crate::failure::Failure;
use crate::images::credentials;
use crate::output::{self, Format};
use crate::snapshots::follow;

/// Give the template of this host's pods to other hosts, or take theirs.
///
/// flintd boots one guest, saves it as the template, and makes pods' machines as clones of it. A host that pulls another's template makes
/// them of that: all hosts of a fleet clone the same machine, and chunks of it that are the same are stored and sent once. It holds no pod, and no
/// secret.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  flint template push registry.example/flint/template:1\n  flint template pull registry.example/flint/template:1"
)]
pub struct Template {
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Push this host's template to a registry, for `pull` on other hosts.
    Push(Way),
    /// Pull a template and make pods of it from now on, in place of the host's own.
    ///
    /// The hosts must have the same kernel and initrd for guests, and be alike in processor, kernel and settings of the pool: what
    /// differs is named, and the host's own template stays in use. A host that has changed since, its flint-vmm for example, makes its own
    /// again when flintd starts.
    Pull(Way),
}

#[derive(Debug, Args)]
struct Way {
    /// As in registry.example/flint/template:1.
    #[arg(value_name = "REFERENCE")]
    reference: String,
    /// User name for the registry; the password comes from standard input or FLINT_REGISTRY_PASSWORD.
    #[arg(short, long)]
    username: Option<String>,
}

impl Template {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let done = match self.command {
            TemplateCommand::Push(Way { reference, username }) => {
                let credentials = username
                    .map(|name| credentials(name, "template push -u USER"))
                    .transpose()?;
                let request = PushTemplateRequest { reference, credentials };
                follow(client.templates().push(request).await?.into_inner()).await?
            }
            TemplateCommand::Pull(Way { reference, username }) => {
                let credentials = username
                    .map(|name| credentials(name, "template pull -u USER"))
                    .transpose()?;
                let request = PullTemplateRequest {
                    reference,
                    credentials,
                    lease_epoch: 0,
                };
                follow(client.templates().pull(request).await?.into_inner()).await?
            }
        };
        match format {
            Format::Json => output::print_json("SnapshotProgress", &done)?,
            Format::Text if done.pushed.is_empty() => {}
            Format::Text => output::print_line(&done.pushed)?,
        }
        Ok(0)
    }
}
