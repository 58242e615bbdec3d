//! `snapshots`: `create`, `ls`, `rm`, `push`, `pull`.

use clap::{Args, Subcommand};
use flint_api::host::{
    CreateSnapshotRequest, ListSnapshotsRequest, PullSnapshotRequest, PushSnapshotRequest, RemoveSnapshotRequest,
    Snapshot, SnapshotProgress,
};
use tonic::Streaming;

use crate::client::Client;
use crate::failure::Failure;
use crate::images::{clear_progress, credentials, show_progress};
use crate::output::{self, Format};
use crate::pods::uid;

/// Save pods as they run; list, remove and move what was saved.
///
/// A snapshot has a pod's memory, machine state and writable disk, all of one moment. It is kept in flintd's state folder, readable only by
/// the user that flintd runs as: it holds whatever the pod's programs had in memory, secrets too. The images that it needs cannot be
/// removed as long as it is there. Pushed to a registry, it can be pulled by another host, and its pod goes on there.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  flint snapshot create web\n  flint snapshot create web before-upgrade\n  flint snapshots\n  \
                        flint snapshot push before-upgrade registry.example/web:saved\n  \
                        flint snapshot pull registry.example/web:saved && flint run --from-snapshot before-upgrade\n  \
                        flint snapshot rm before-upgrade"
)]
pub struct Snapshots {
    #[command(subcommand)]
    command: Option<SnapshotsCommand>,
}

#[derive(Debug, Subcommand)]
enum SnapshotsCommand {
    /// List snapshots (the default).
    #[command(visible_alias = "list")]
    Ls,
    /// Save a running or paused pod, which stands still meanwhile and then goes on as before.
    Create {
        /// The pod.
        #[arg(value_name = "POD")]
        pod: String,
        /// What to call it: 1 to 63 of a-z 0-9 - [default: the pod's name and a number].
        #[arg(value_name = "NAME", default_value = "", hide_default_value = true)]
        name: String,
    },
    /// Push a snapshot to a registry, for `pull` on other hosts.
    ///
    /// Whoever may read it there gets what the pod's programs had in memory, and the values of their environment variables. Of images,
    /// only names and digests go along. What the repository has already is not sent.
    Push {
        /// The snapshot.
        #[arg(value_name = "NAME")]
        name: String,
        /// Where to, as in registry.example/web:saved.
        #[arg(value_name = "REFERENCE")]
        reference: String,
        /// User name for the registry; the password comes from standard input or FLINT_REGISTRY_PASSWORD.
        #[arg(short, long)]
        username: Option<String>,
    },
    /// Pull a snapshot that was pushed, with the images that it needs.
    ///
    /// What is here already is not fetched, nor is what came of a pull that broke off: just try again.
    Pull {
        /// Where from, as in registry.example/web:saved or web@sha256:...
        #[arg(value_name = "REFERENCE")]
        reference: String,
        /// What to call it here [default: as it was called where it was saved].
        #[arg(value_name = "NAME", default_value = "", hide_default_value = true)]
        name: String,
        /// User name for the registry; the password comes from standard input or FLINT_REGISTRY_PASSWORD.
        #[arg(short, long)]
        username: Option<String>,
    },
    /// Remove snapshots.
    Rm {
        /// Their names.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

impl Snapshots {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        match self.command.unwrap_or(SnapshotsCommand::Ls) {
            SnapshotsCommand::Ls => list(&client, format).await?,
            SnapshotsCommand::Create { pod, name } => {
                let request = CreateSnapshotRequest {
                    uid: uid(&client.pod(&pod).await?),
                    name,
                    lease_epoch: 0,
                };
                let created = client.snapshots().create(request).await?.into_inner();
                let snapshot = created.snapshot.unwrap_or_default();
                match format {
                    Format::Json => output::print_json("Snapshot", &snapshot)?,
                    Format::Text => output::print_line(&snapshot.name)?,
                }
            }
            SnapshotsCommand::Push {
                name,
                reference,
                username,
            } => {
                let credentials = username
                    .map(|name| credentials(name, "snapshots push -u USER NAME"))
                    .transpose()?;
                let request = PushSnapshotRequest {
                    name,
                    reference,
                    credentials,
                };
                let done = follow(client.snapshots().push(request).await?.into_inner()).await?;
                warn_of_content(&done);
                match format {
                    Format::Json => output::print_json("SnapshotProgress", &done)?,
                    Format::Text => output::print_line(&done.pushed)?,
                }
            }
            SnapshotsCommand::Pull {
                reference,
                name,
                username,
            } => {
                let credentials = username
                    .map(|name| credentials(name, "snapshots pull -u USER"))
                    .transpose()?;
                let request = PullSnapshotRequest {
                    reference,
                    name,
                    credentials,
                    lease_epoch: 0,
                };
                let done = follow(client.snapshots().pull(request).await?.into_inner()).await?;
                let snapshot = done.snapshot.unwrap_or_default();
                match format {
                    Format::Json => output::print_json("Snapshot", &snapshot)?,
                    Format::Text => output::print_line(&snapshot.name)?,
                }
            }
            SnapshotsCommand::Rm { names } => {
                for name in names {
                    let request = RemoveSnapshotRequest {
                        name: name.clone(),
                        lease_epoch: 0,
                    };
                    let freed = client.snapshots().remove(request).await?.into_inner().freed_bytes;
                    output::print_line(&format!("{name}: {} freed", output::bytes(freed)))?;
                }
            }
        }
        Ok(0)
    }
}

/// Shows progress until the end, which says that it is one.
pub async fn follow(mut progress: Streaming<SnapshotProgress>) -> Result<SnapshotProgress, Failure> {
    let mut last = None;
    while let Some(step) = progress.message().await.inspect_err(|_| clear_progress())? {
        show_progress(&describe(&step));
        last = Some(step);
    }
    clear_progress();
    last.filter(|step| step.stage == "done")
        .ok_or_else(|| Failure::new("flintd ended it without a result: is it being stopped? Try again"))
}

fn describe(step: &SnapshotProgress) -> String {
    let bytes = match step.bytes_total {
        0 => String::new(),
        total => format!(
            ": {} of {} ({}%), {} of them new",
            output::bytes(step.bytes_done),
            output::bytes(total),
            step.bytes_done.saturating_mul(100) / total,
            output::bytes(step.bytes_sent)
        ),
    };
    match step.image.as_str() {
        "" => format!("{}{bytes}", step.stage),
        image => format!("{} {image}{bytes}", step.stage),
    }
}

/// Nobody should publish secrets without having been told.
fn warn_of_content(done: &SnapshotProgress) {
    let environment = match done.environment.join(", ") {
        none if none.is_empty() => String::new(),
        names => format!(", and the environment variables {names}"),
    };
    eprintln!(
        "flint: whoever may read {} gets what the pod's programs had in memory{environment}",
        done.pushed
    );
}

async fn list(client: &Client, format: Format) -> Result<(), Failure> {
    let response = client.snapshots().list(ListSnapshotsRequest {}).await?.into_inner();
    if format == Format::Json {
        return output::print_json("ListSnapshotsResponse", &response);
    }
    let rows: Vec<_> = response.snapshots.iter().map(row).collect();
    output::print_table(&["NAME", "POD", "VCPUS", "MEMORY", "STORED", "AGE"], &rows)
}

fn row(snapshot: &Snapshot) -> Vec<String> {
    let pod = snapshot.pod.clone().unwrap_or_default();
    vec![
        snapshot.name.clone(),
        format!("{}/{}", pod.namespace, pod.name),
        snapshot.vcpus.to_string(),
        output::bytes(snapshot.memory_bytes),
        output::bytes(snapshot.stored_bytes),
        output::age(snapshot.created_at.as_ref()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_what_is_known() {
        let step = SnapshotProgress {
            stage: "resolve".into(),
            ..SnapshotProgress::default()
        };
        assert_eq!(describe(&step), "resolve");

        let step = SnapshotProgress {
            stage: "images".into(),
            image: "busybox:1".into(),
            bytes_done: 512,
            bytes_total: 1024,
            bytes_sent: 256,
            ..step
        };
        assert_eq!(
            describe(&step),
            "images busybox:1: 512 B of 1.0 KiB (50%), 256 B of them new"
        );
    }
}
