//! The connection to flintd, and pods by the names that people use.

use flint_api::host::host_client::HostClient;
use flint_api::host::images_client::ImagesClient;
use flint_api::host::pods_client::PodsClient;
use flint_api::host::snapshots_client::SnapshotsClient;
use flint_api::host::store_client::StoreClient;
use flint_api::host::streams_client::StreamsClient;
use flint_api::host::templates_client::TemplatesClient;
use flint_api::host::{ListPodsRequest, Pod, PodMeta};
use tonic::transport::Channel;

use crate::failure::Failure;
use crate::target::Target;

/// Largest message taken from flintd: a list of thousands of pods fits.
const MAX_MESSAGE: usize = 64 << 20;

/// One connection, shared by the services.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    pub async fn connect(target: &Target) -> Result<Self, Failure> {
        Ok(Self {
            channel: target.connect().await?,
        })
    }

    pub fn host(&self) -> HostClient<Channel> {
        HostClient::new(self.channel.clone())
    }

    pub fn pods(&self) -> PodsClient<Channel> {
        PodsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub fn streams(&self) -> StreamsClient<Channel> {
        StreamsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub fn templates(&self) -> TemplatesClient<Channel> {
        TemplatesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub fn store(&self) -> StoreClient<Channel> {
        StoreClient::new(self.channel.clone())
    }

    /// The pod that `name` means.
    pub async fn pod(&self, name: &str) -> Result<Pod, Failure> {
        let pods = self.pods().list_pods(ListPodsRequest {}).await?.into_inner().pods;
        find(pods, name)
    }
}

/// Exact names go before the beginnings of uids; two that fit are an error, never a guess.
fn find(pods: Vec<Pod>, name: &str) -> Result<Pod, Failure> {
    let (namespace, short) = name
        .split_once('/')
        .map_or((None, name), |(namespace, short)| (Some(namespace), short));
    let named = |meta: &PodMeta| meta.name == short && namespace.is_none_or(|namespace| meta.namespace == namespace);
    let by_uid = |meta: &PodMeta| namespace.is_none() && !name.is_empty() && meta.uid.starts_with(name);
    let meta = |pod: &Pod| pod.meta.clone().unwrap_or_default();
    let (mut found, others): (Vec<Pod>, Vec<Pod>) = pods.into_iter().partition(|pod| named(&meta(pod)));
    if found.is_empty() {
        found = others.into_iter().filter(|pod| by_uid(&meta(pod))).collect();
    }
    if found.len() > 1 {
        let names: Vec<String> = found
            .iter()
            .map(|pod| {
                let meta = meta(pod);
                format!("{}/{} ({})", meta.namespace, meta.name, meta.uid)
            })
            .collect();
        return Err(Failure::new(format!("{name:?} could be any of: {}", names.join(", "))));
    }
    found
        .pop()
        .ok_or_else(|| Failure::new(format!("there is no pod {name:?}")).hint("`flint ps -a` lists them all"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, namespace: &str, name: &str) -> Pod {
        let meta = PodMeta {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            ..PodMeta::default()
        };
        Pod {
            meta: Some(meta),
            ..Pod::default()
        }
    }

    fn uid(name: &str) -> Option<String> {
        let pods = vec![
            pod("abc1", "default", "web"),
            pod("abd2", "default", "ab"),
            pod("xyz3", "test", "web"),
        ];
        find(pods, name).ok().and_then(|pod| pod.meta).map(|meta| meta.uid)
    }

    #[test]
    fn a_pod_is_found_by_name_by_namespace_and_by_the_beginning_of_its_uid() {
        assert_eq!(uid("test/web").as_deref(), Some("xyz3"));
        assert_eq!(uid("abc").as_deref(), Some("abc1"));
        assert_eq!(uid("ab").as_deref(), Some("abd2"), "an exact name goes before uids");
    }

    #[test]
    fn what_fits_two_pods_or_none_is_an_error() {
        assert_eq!(uid("web"), None);
        assert_eq!(uid("nope"), None);
        assert_eq!(uid(""), None);
    }
}
