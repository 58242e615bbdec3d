//! The slow steps of a pod's start, without its state: an image is pulled, a sandbox launched.

use std::sync::Arc;

use flint_api::{guest, host};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Context,
    machine::{AFTER_RESTORE_FAILED, SNAPSHOT_REFUSED, StepError},
    run::guest_id,
};
use crate::{
    backend::{ImageError, Origin, PullOrder, RestoreError, Sandbox, SandboxPlan, SavedMachine},
    hook::Hook,
    saved::{SavedFiles, SavedRecord},
    timeline::Timeline,
};

/// The digest of a container's image, pulled if its policy says so.
pub(super) async fn pull(
    context: &Context,
    container: &host::Container,
    credentials: Option<host::RegistryCredentials>,
) -> Result<String, StepError> {
    let policy = pull_policy(container);
    let reference = container.image.clone();
    let result = if policy == host::ImagePullPolicy::PullNever {
        match context.images.get(&reference).await {
            Ok(Some(image)) => Ok(image),
            Ok(None) => {
                let message = format!("Container image \"{reference}\" is not present with pull policy of Never");
                return Err(StepError::new("ErrImageNeverPull", message));
            }
            Err(error) => Err(error),
        }
    } else {
        let if_not_present = policy == host::ImagePullPolicy::PullIfNotPresent;
        // Nobody looks at a pod's pull progress; a closed channel is what the store expects then.
        let (progress, _) = mpsc::channel(1);
        context
            .images
            .pull(
                PullOrder {
                    reference,
                    credentials,
                    if_not_present,
                },
                progress,
            )
            .await
    };
    context.metrics.pulled(result.is_ok());
    result.map(|image| image.image.digest).map_err(|error| {
        let reason = match error {
            ImageError::Invalid(_) => "InvalidImageName",
            _ => "ErrImagePull",
        };
        StepError::new(reason, error.to_string())
    })
}

/// As Kubernetes defaults it: always for `latest` or no tag, else if not present.
fn pull_policy(container: &host::Container) -> host::ImagePullPolicy {
    match container.image_pull_policy() {
        host::ImagePullPolicy::Unspecified => {
            let name = container.image.rsplit('/').next().unwrap_or_default();
            let floating = !container.image.contains('@') && (!name.contains(':') || name.ends_with(":latest"));
            if floating {
                host::ImagePullPolicy::PullAlways
            } else {
                host::ImagePullPolicy::PullIfNotPresent
            }
        }
        said => said,
    }
}

/// The registry's host in a reference.
pub(crate) fn registry(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => "docker.io",
    }
}

pub(super) async fn launch(
    context: &Context,
    plan: SandboxPlan,
    abandoned: &CancellationToken,
    timeline: Timeline,
) -> Result<Arc<dyn Sandbox>, StepError> {
    let failed = |message: String| StepError::new("FailedCreatePodSandBox", message);
    let images = plan.images.len();
    let begun = std::time::Instant::now();
    let launched = abandoned
        .run_until_cancelled(context.sandboxes.launch(plan, timeline.clone()))
        .await
        .ok_or_else(terminated)?;
    let sandbox = launched.map_err(|error| failed(error.to_string()))?;
    let stage = timeline.begin("guest.images");
    if let Err(error) = mount_images(&sandbox, images).await {
        sandbox.kill().await;
        let exit = sandbox.exited().await;
        return Err(failed(format!("{error}; {exit}")));
    }
    stage.end();
    context.metrics.launched(begun.elapsed(), &timeline);
    Ok(sandbox)
}

/// Dropping what makes a sandbox leaves nothing of it behind.
fn terminated() -> StepError {
    StepError::new("Terminated", "it was terminated while its sandbox was being made")
}

/// A sandbox that goes on where a saved pod stood, with its containers; their logs begin where the saved pod's were.
pub(super) async fn restore(
    context: &Arc<Context>,
    uid: &str,
    plan: SandboxPlan,
    record: SavedRecord,
    files: SavedFiles,
    abandoned: &CancellationToken,
    timeline: Timeline,
) -> Result<(Arc<dyn Sandbox>, Vec<guest::ContainerStatus>), StepError> {
    let failed = |message: String| StepError::new("FailedCreatePodSandBox", message);
    let begun = std::time::Instant::now();
    let images = plan.images.len();
    let (logs, of) = (context.logs.clone(), uid.to_owned());
    let hook = after_restore(&record);
    let memory_in_store = Some(record.name().to_owned()).filter(|_| record.memory_in_store);
    let seeded = tokio::task::spawn_blocking(move || {
        let mut outputs = record.outputs.iter();
        outputs.try_for_each(|output| logs.begin_at(&of, &output.container, output.run, output.offset))
    });
    let seeded = seeded.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    seeded.map_err(|error| failed(format!("beginning its logs: {error}")))?;
    let origin = Origin {
        files: Arc::new(files),
        memory_in_store,
        machine: SavedMachine {
            machine: record.machine.unwrap_or_default(),
            mac: record.mac,
            plugged_bytes: record.plugged_bytes,
        },
        hook,
    };
    let restored = abandoned
        .run_until_cancelled(context.sandboxes.restore(plan, origin, timeline.clone()))
        .await
        .ok_or_else(terminated)?;
    let sandbox = restored.map_err(|error| match error {
        RestoreError::Refused(message) => StepError::new(SNAPSHOT_REFUSED, message),
        RestoreError::Hook(message) => StepError::new(AFTER_RESTORE_FAILED, message),
        RestoreError::Failed(message) => failed(message),
    })?;
    match survey(&sandbox, images).await {
        Ok(containers) => {
            context.metrics.launched(begun.elapsed(), &timeline);
            Ok((sandbox, containers))
        }
        Err(error) => {
            sandbox.kill().await;
            let exit = sandbox.exited().await;
            Err(failed(format!("{error}; {exit}")))
        }
    }
}

/// What a saved pod is to run where it goes on.
fn after_restore(saved: &SavedRecord) -> Option<Hook> {
    let spec = saved.pod.as_ref()?.pod.as_ref()?.spec.as_ref()?;
    let hook = spec.snapshot_hooks.as_ref()?.after_restore.as_ref()?;
    let output = saved.outputs.iter().find(|output| output.container == hook.container);
    let run = output.map_or(0, |output| output.run);
    Some(Hook::of(hook, guest_id(&hook.container, run)))
}

/// Has the guest mount the images of its disks; one that is mounted already stays so.
async fn mount_images(sandbox: &Arc<dyn Sandbox>, images: usize) -> Result<(), String> {
    for number in 0..images {
        let id = format!("image-{number}");
        let request = guest::MountImageRequest {
            image_id: id.clone(),
            disk_serial: id.clone(),
        };
        let mounted = sandbox.guest().mount_image(request).await;
        mounted.map_err(|status| format!("mounting {id} in the guest: {}", status.message()))?;
    }
    Ok(())
}

/// What an earlier flintd's guest has: its containers, and its images, which that flintd may not have come to mount.
pub(super) async fn survey(sandbox: &Arc<dyn Sandbox>, images: usize) -> Result<Vec<guest::ContainerStatus>, String> {
    let listed = sandbox.guest().list_containers(guest::ListContainersRequest {}).await;
    let listed = listed.map_err(|status| format!("listing its containers: {}", status.message()))?;
    mount_images(sandbox, images).await?;
    Ok(listed.into_inner().containers)
}
