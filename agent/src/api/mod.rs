//! Host API: `flint.host.v1`, with health and reflection, on a unix socket and over TLS.

mod fault;
mod host;
mod images;
pub mod listen;
mod pods;
mod snapshots;
mod streams;
#[cfg(test)]
mod tests;

use std::{pin::Pin, sync::Arc};

use flint_api::host::{
    DESCRIPTORS, host_server::HostServer, images_server::ImagesServer, pods_server::PodsServer,
    snapshots_server::SnapshotsServer, streams_server::StreamsServer,
};
use futures::Stream;
use tonic::{Status, service::Routes};
use tonic_reflection::server::Builder as Reflection;

pub use fault::DOMAIN;

use crate::{host::HostControl, pods::Pods};

/// Largest request; a pod is a few kilobytes, and what streams comes in small pieces.
const MAX_REQUEST: usize = 4 << 20;
/// Largest response: a list of all pods of a full host.
const MAX_RESPONSE: usize = 64 << 20;

/// What a streaming call answers with.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the services work on.
#[derive(Clone)]
pub struct Api {
    /// The pods.
    pub pods: Arc<Pods>,
    /// Lease and drain.
    pub control: Arc<HostControl>,
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
            .add_service(StreamsServer::new(self).max_decoding_message_size(MAX_REQUEST));
        Ok(routes.routes())
    }
}
