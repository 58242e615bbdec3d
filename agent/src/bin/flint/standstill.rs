//! `pause`, `resume`.

use clap::Args;
use flint_api::host::{PausePodRequest, Pod, ResumePodRequest};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::pods::uid;

/// Have pods stand still: nothing in them runs until they are resumed.
///
/// A paused pod keeps its memory, disk and addresses, and its room on the host. Its logs can be read; exec is refused, and programs that
/// are being exec'd stand still with it. Stopping a paused pod resumes it first, so that it can end in good order; with
/// `--grace-period 0` it is killed where it stands. It stays paused when flintd is restarted.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  flint pause web\n  flint ps            # STATUS says Paused\n  flint resume web")]
pub struct Pause {
    /// Pods to pause; one that is paused stays so.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

impl Pause {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        for name in &self.pods {
            let request = PausePodRequest {
                uid: uid(&client.pod(name).await?),
                lease_epoch: 0,
            };
            let paused = client.pods().pause_pod(request).await?.into_inner();
            print(name, paused.pod, format)?;
        }
        Ok(0)
    }
}

/// Have paused pods go on where they stood.
///
/// The guest's clock shows the time that it is, not the time of the pause.
#[derive(Debug, Args)]
pub struct Resume {
    /// Pods to resume; one that runs goes on running.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

impl Resume {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        for name in &self.pods {
            let request = ResumePodRequest {
                uid: uid(&client.pod(name).await?),
                lease_epoch: 0,
            };
            let resumed = client.pods().resume_pod(request).await?.into_inner();
            print(name, resumed.pod, format)?;
        }
        Ok(0)
    }
}

fn print(name: &str, pod: Option<Pod>, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => output::print_json("Pod", &pod.unwrap_or_default()),
        Format::Text => output::print_line(name),
    }
}
