//! Host API: `flint.host.v1`, with health and reflection, on a unix socket and over TLS.

mod fault;
mod host;
mod images;
pub mod listen;
mod pods;
mod snapshots;
mod store;
mod streams;
mod templates;
#[cfg(test)]
mod tests;

use std::{pin::Pin, sync::Arc};

use flint_api::host::{
    DESCRIPTORS, host_server::HostServer, images_server::ImagesServer, pods_server::PodsServer,
    snapshots_server::SnapshotsServer, store_server::StoreServer, streams_server::StreamsServer,
    templates_server::TemplatesServer,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, service::Routes};
use tonic_reflection::server::Builder as Reflection;

pub use fault::DOMAIN;

use crate::{
    host::HostControl,
    pods::Pods,
    travel::{Mover, TemplateMover},
};

/// Largest request; a pod is a few kilobytes, and what streams comes in small pieces.
const MAX_REQUEST: usize = 4 << 20;
/// Largest response: a list of all pods of a full host.
const MAX_RESPONSE: usize = 64 << 20;

/// What a streaming call answers with.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Progress on its way to one client; a slow client gets less of it.
const WINDOW: usize = 32;

/// Sends what work reports, and then its result. The work ends with a client that hangs up.
fn streamed<T: Send + 'static>(
    mut reports: mpsc::Receiver<T>,
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Response<Answers<T>> {
    let (out, answers) = mpsc::channel(WINDOW);
    tokio::spawn(async move {
        let forward = async {
            while let Some(report) = reports.recv().await {
                // Gone clients are not told; the reports are still taken.
                let _ = out.send(Ok(report)).await;
            }
        };
        tokio::select! {
            (result, ()) = futures::future::join(work, forward) => drop(out.send(result).await),
            () = out.closed() => {}
        }
    });
    Response::new(Box::pin(ReceiverStream::new(answers)))
}

/// What the services work on.
#[derive(Clone)]
pub struct Api {
    /// The pods.
    pub pods: Arc<Pods>,
    /// Lease and drain.
    pub control: Arc<HostControl>,
    /// Snapshots to and from registries.
    pub mover: Mover,
    /// The template to and from registries.
    pub templates: TemplateMover,
    /// What does not change while the machine runs.
    pub info: Arc<flint_api::host::HostInfo>,
}

impl Api {
    /// Refuses a writer with a stale lease.
    fn fence(&self, epoch: u64) -> Result<(), Status> {
        Ok(self.control.check(epoch)?)
    }

    /// All services.
    ///
    /// # Errors
    /// If the contract's own descriptors cannot be read, which a build would have to break.
    pub async fn routes(self) -> Result<Routes, tonic_reflection::server::Error> {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<PodsServer<Api>>().await;
        reporter.set_serving::<HostServer<Api>>().await;
        reporter.set_serving::<ImagesServer<Api>>().await;
        reporter.set_serving::<StreamsServer<Api>>().await;
        reporter.set_serving::<SnapshotsServer<Api>>().await;
        reporter.set_serving::<TemplatesServer<Api>>().await;
        reporter.set_serving::<StoreServer<Api>>().await;
        let reflection = || {
            Reflection::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let mut routes = Routes::builder();
        routes
            .add_service(health)
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .add_service(HostServer::new(self.clone()).max_decoding_message_size(MAX_REQUEST))
            .add_service(
                PodsServer::new(self.clone())
                    .max_decoding_message_size(MAX_REQUEST)
                    .max_encoding_message_size(MAX_RESPONSE),
            )
            .add_service(
                ImagesServer::new(self.clone())
                    .max_decoding_message_size(MAX_REQUEST)
                    .max_encoding_message_size(MAX_RESPONSE),
            )
            .add_service(SnapshotsServer::new(self.clone()).max_decoding_message_size(MAX_REQUEST))
            .add_service(TemplatesServer::new(self.clone()).max_decoding_message_size(MAX_REQUEST))
            .add_service(StoreServer::new(self.clone()).max_decoding_message_size(MAX_REQUEST))
            .add_service(StreamsServer::new(self).max_decoding_message_size(MAX_REQUEST));
        Ok(routes.routes())
    }
}
