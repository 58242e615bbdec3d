//! One run of a container in the guest: create, start, carry its output, wait for its end.

use std::{collections::HashMap, sync::Arc};

use flint_api::{guest, host};
use tonic::{Code, Status};
use tracing::warn;

use super::{
    Context,
    attached::Attached,
    environment::{Downward, fs_group},
    machine::StepError,
    materials::Materials,
    output::Pump,
    process,
    retry::Retry,
};
use crate::{backend::Sandbox, timeline::Timeline};

/// Tries until a guest that does not answer is given up: about 6 s of pauses.
const TRIES: u32 = 6;

/// A run.
pub(super) struct Run {
    pub(super) context: Arc<Context>,
    pub(super) sandbox: Arc<dyn Sandbox>,
    pub(super) timeline: Timeline,
    pub(super) uid: String,
    pub(super) meta: Arc<host::PodMeta>,
    pub(super) spec: Arc<host::PodSpec>,
    pub(super) materials: Arc<Materials>,
    /// Index of the container.
    pub(super) index: usize,
    pub(super) run: u32,
    pub(super) digest: String,
    /// The images in the order of their disks.
    pub(super) disks: Vec<String>,
    pub(super) attached: Attached,
}

/// What the guest calls a run of a container.
pub(super) fn guest_id(container: &str, run: u32) -> String {
    format!("{container}-{run}")
}

impl Run {
    fn container(&self) -> &host::Container {
        // The index is the machine's own, which has as many containers as the spec.
        &self.spec.containers[self.index]
    }

    /// Creates the container.
    pub(super) async fn create(&self) -> Result<(), StepError> {
        let container = self.container();
        let failed = |message: String| StepError::new("CreateContainerError", message);
        let image = self
            .context
            .images
            .get(&self.digest)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let image = image.ok_or_else(|| failed(format!("image {} is not on this host any more", self.digest)))?;
        let process = process::process(&self.spec, container, &image.config)?;
        let position = self
            .disks
            .iter()
            .position(|digest| *digest == self.digest)
            .unwrap_or_default();
        let stage = self.timeline.begin(format!("container.{}.create", container.name));
        let mut guest = self.sandbox.guest();
        if let Some(earlier) = self.run.checked_sub(1) {
            let container_id = guest_id(&container.name, earlier);
            match guest
                .delete_container(guest::DeleteContainerRequest { container_id })
                .await
            {
                // Made in an earlier sandbox, or never.
                Err(status) if status.code() != Code::NotFound => {
                    warn!(uid = self.uid, %status, "removing a run failed");
                }
                _ => {}
            }
        }
        let addresses = self.sandbox.addresses();
        let downward = Downward {
            meta: &self.meta,
            spec: &self.spec,
            addresses: &addresses,
            size: self.context.sizing.of(&self.spec),
        };
        let delivered = self.materials.deliver(&self.sandbox, downward.volumes()).await;
        delivered.map_err(|status| failed(format!("handing its materials over: {}", status.message())))?;
        let environment = downward.environment(container, process::image_args(container, &image.config));
        let request = guest::CreateContainerRequest {
            environment: Some(environment),
            ..self.request(process, format!("image-{position}"))
        };
        let created = guest.create_container(request).await;
        let created = created
            .map_err(|status| failed(status.message().to_owned()))?
            .into_inner();
        if !created.config_error.is_empty() {
            return Err(StepError::missing(created.config_error));
        }
        stage.end();
        Ok(())
    }

    fn request(&self, process: guest::Process, image_id: String) -> guest::CreateContainerRequest {
        let container = self.container();
        let security = container.security_context.clone().unwrap_or_default();
        let resources = container.resources.unwrap_or_default();
        let cpu = if resources.cpu_request_milli == 0 {
            resources.cpu_limit_milli
        } else {
            resources.cpu_request_milli
        };
        guest::CreateContainerRequest {
            container_id: guest_id(&container.name, self.run),
            image_id,
            process: Some(process),
            scratch_serial: "scratch".into(),
            read_only_root: security.read_only_root_filesystem,
            mounts: mounts(&self.spec, container),
            resources: Some(guest::ContainerResources {
                cpu_limit_milli: resources.cpu_limit_milli,
                cpu_weight: process::cpu_weight(cpu),
                memory_limit_bytes: resources.memory_limit_bytes,
                pids_limit: 0,
            }),
            share_pid_namespace: self.spec.share_process_namespace,
            privileged: security.privileged,
            stdin: container.stdin,
            environment: None,
            fs_group: fs_group(&self.spec),
        }
    }

    /// Starts the container. An error is the program's: it is told as the run's end.
    pub(super) async fn start(&self) -> Result<(), guest::ContainerExit> {
        let stage = self
            .timeline
            .begin(format!("container.{}.start", self.container().name));
        let container_id = guest_id(&self.container().name, self.run);
        match self
            .sandbox
            .guest()
            .start_container(guest::StartContainerRequest { container_id })
            .await
        {
            Ok(_) => {
                stage.end();
                Ok(())
            }
            Err(status) => Err(guest::ContainerExit {
                exit_code: 128,
                start_error: status.message().to_owned(),
                ..guest::ContainerExit::default()
            }),
        }
    }

    /// Waits for the end of a container that was started, and of its output. `None`: the sandbox went first.
    pub(super) async fn finish(&self, first: impl FnOnce() + Send + 'static) -> Option<guest::ContainerExit> {
        let pump = Pump {
            sandbox: self.sandbox.clone(),
            logs: self.context.logs.clone(),
            metrics: self.context.metrics.clone(),
            uid: self.uid.clone(),
            container: self.container().name.clone(),
            run: self.run,
            guest_id: guest_id(&self.container().name, self.run),
            attached: self.attached.clone(),
        };
        let (exit, ()) = tokio::join!(self.wait(&pump.guest_id), pump.run(first));
        self.attached.end(self.run, exit.clone());
        exit
    }

    async fn wait(&self, container_id: &str) -> Option<guest::ContainerExit> {
        let mut retry = Retry::default();
        loop {
            let request = guest::WaitContainerRequest {
                container_id: container_id.to_owned(),
            };
            let status = match self.sandbox.guest().wait_container(request).await {
                Ok(exit) => return Some(exit.into_inner()),
                Err(status) => status,
            };
            if status.code() == Code::NotFound || retry.failures() == TRIES {
                warn!(uid = self.uid, container_id, %status, "the guest cannot be asked any more, ending the sandbox");
                self.sandbox.kill().await;
                self.sandbox.exited().await;
                return None;
            }
            if !retry.again(&*self.sandbox).await {
                return None;
            }
        }
    }
}

fn mounts(spec: &host::PodSpec, container: &host::Container) -> Vec<guest::Mount> {
    let volumes: HashMap<_, _> = spec
        .volumes
        .iter()
        .map(|volume| (volume.name.as_str(), volume))
        .collect();
    let of = |mount: &host::VolumeMount| {
        let source = match volumes.get(mount.name.as_str())?.source.as_ref()? {
            host::volume::Source::EmptyDir(empty) => guest::mount::Source::PodDirectory(guest::PodDirectory {
                name: mount.name.clone(),
                memory: empty.memory,
                size_bytes: empty.size_limit_bytes,
            }),
            host::volume::Source::Projected(_) => guest::mount::Source::ProjectedVolume(mount.name.clone()),
        };
        Some(guest::Mount {
            destination: mount.mount_path.clone(),
            read_only: mount.read_only,
            sub_path: mount.sub_path.clone(),
            expand_sub_path: mount.expand_sub_path,
            source: Some(source),
        })
    };
    container.volume_mounts.iter().filter_map(of).collect()
}

/// Sends a signal to a container; one that has ended needs none.
pub(super) async fn signal(sandbox: Arc<dyn Sandbox>, id: String, signal: u32, all_processes: bool) {
    let request = guest::SignalContainerRequest {
        container_id: id.clone(),
        signal,
        all_processes,
    };
    let result: Result<_, Status> = sandbox.guest().signal_container(request).await;
    if let Err(status) = result {
        warn!(container = id, signal, %status, "signalling a container failed");
    }
}
