//! `flint.host.v1.Pods`.

use std::time::Duration;

use flint_api::host::{self, pods_server::Pods};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, async_trait};

use super::{
    Answers, Api,
    fault::{bad_field, fault},
};
use crate::pods::duration;

/// Between bookmarks, where nothing happens: a client learns how far it is, and that the connection lives.
const BOOKMARKS: Duration = Duration::from_secs(10);
/// Events on their way to one client.
const WINDOW: usize = 64;

#[async_trait]
impl Pods for Api {
    async fn apply_pod(
        &self,
        request: Request<host::ApplyPodRequest>,
    ) -> Result<Response<host::ApplyPodResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let meta = request.meta.ok_or_else(|| bad_field("meta", "must be set"))?;
        let draining = self.control.draining();
        let pod = if request.from_snapshot.is_empty() {
            let spec = request.spec.ok_or_else(|| bad_field("spec", "must be set"))?;
            let materials = request.materials.unwrap_or_default();
            self.pods.apply(meta, spec, materials, draining).await?
        } else {
            let from = &request.from_snapshot;
            self.pods.apply_from(from, meta, request.spec, draining).await?
        };
        Ok(Response::new(host::ApplyPodResponse { pod: Some(pod) }))
    }

    async fn terminate_pod(
        &self,
        request: Request<host::TerminatePodRequest>,
    ) -> Result<Response<host::TerminatePodResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        if request
            .grace_period
            .is_some_and(|period| period.seconds < 0 || period.nanos < 0)
        {
            return Err(bad_field("grace_period", "must not be negative"));
        }
        self.pods
            .terminate(&request.uid, request.grace_period.map(duration))
            .await?;
        Ok(Response::new(host::TerminatePodResponse {}))
    }

    async fn pause_pod(
        &self,
        request: Request<host::PausePodRequest>,
    ) -> Result<Response<host::PausePodResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let pod = Some(self.pods.pause(&request.uid).await?);
        Ok(Response::new(host::PausePodResponse { pod }))
    }

    async fn resume_pod(
        &self,
        request: Request<host::ResumePodRequest>,
    ) -> Result<Response<host::ResumePodResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let pod = Some(self.pods.resume(&request.uid).await?);
        Ok(Response::new(host::ResumePodResponse { pod }))
    }

    async fn fork_pod(
        &self,
        request: Request<host::ForkPodRequest>,
    ) -> Result<Response<host::ForkPodResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let (pods, draining) = (self.pods.clone(), self.control.draining());
        // A client that hangs up does not leave it half done.
        let forked = tokio::spawn(async move { pods.fork(&request.uid, request.forks, draining).await }).await;
        let pods = forked.map_err(|error| fault(Code::Internal, "FORK", error.to_string()))??;
        Ok(Response::new(host::ForkPodResponse { pods }))
    }

    async fn update_materials(
        &self,
        request: Request<host::UpdateMaterialsRequest>,
    ) -> Result<Response<host::UpdateMaterialsResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let materials = request.materials.ok_or_else(|| bad_field("materials", "must be set"))?;
        let version = self.pods.update_materials(&request.uid, materials).await?;
        Ok(Response::new(host::UpdateMaterialsResponse { version }))
    }

    async fn forget_pod(
        &self,
        request: Request<host::ForgetPodRequest>,
    ) -> Result<Response<host::ForgetPodResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        self.pods.forget(&request.uid).await?;
        Ok(Response::new(host::ForgetPodResponse {}))
    }

    async fn get_pod(&self, request: Request<host::GetPodRequest>) -> Result<Response<host::Pod>, Status> {
        Ok(Response::new(self.pods.get(&request.into_inner().uid)?))
    }

    async fn list_pods(&self, _: Request<host::ListPodsRequest>) -> Result<Response<host::ListPodsResponse>, Status> {
        let (pods, revision) = self.pods.context().journal.list();
        let pods = pods.iter().map(|pod| (**pod).clone()).collect();
        Ok(Response::new(host::ListPodsResponse { pods, revision }))
    }

    type WatchPodsStream = Answers<host::PodEvent>;

    async fn watch_pods(
        &self,
        request: Request<host::WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        let mut watcher = self.pods.context().journal.watch(request.into_inner().from_revision)?;
        let (out, answers) = tokio::sync::mpsc::channel(WINDOW);
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    next = tokio::time::timeout(BOOKMARKS, watcher.next()) => next,
                    () = out.closed() => return,
                };
                let events = match next {
                    Ok(Ok(events)) => events.iter().map(|event| (**event).clone()).collect(),
                    Ok(Err(range)) => {
                        // Whoever has hung up does not need to know.
                        let _ = out.send(Err(range.into())).await;
                        return;
                    }
                    Err(_elapsed) => vec![host::PodEvent {
                        r#type: host::pod_event::Type::Bookmark.into(),
                        pod: None,
                        revision: watcher.at(),
                    }],
                };
                for event in events {
                    if out.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}
