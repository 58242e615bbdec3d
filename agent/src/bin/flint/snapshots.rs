//! `snapshots`: `create`, `ls`, `rm`.

use clap::{Args, Subcommand};
use flint_api::host::{CreateSnapshotRequest, ListSnapshotsRequest, RemoveSnapshotRequest, Snapshot};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::pods::uid;

/// Save pods as they run; list and remove what was saved.
///
/// A snapshot has a pod's memory, machine state and writable disk, all of one moment. It is kept in flintd's state folder, readable only by
/// the user that flintd runs as: it holds whatever the pod's programs had in memory, secrets too. The images that it needs cannot be
/// removed as long as it is there.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  flint snapshot create web\n  flint snapshot create web before-upgrade\n  flint snapshots\n  \
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
