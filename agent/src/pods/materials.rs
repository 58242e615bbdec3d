//! ConfigMaps, secrets and tokens on their way from a client to the guest.
//!
//! They are in this process's memory for as long as the pod is, in case its sandbox has to be made again, and in the guest's,
//! which outlives this process. They are never in a record, a log or a file of the host. A flintd that finds a pod of an
//! earlier one has none of it, and needs none: the guest has them.

use std::sync::Arc;

use flint_api::{guest, host};
use tokio::sync::Mutex;
use tonic::Status;

use crate::backend::Sandbox;

/// Most of one object, as in Kubernetes.
pub(super) const MOST_OF_ONE: usize = 1 << 20;
/// Most of all, so that they fit into one request with a pod.
pub(super) const MOST: usize = 3 << 20;

/// A pod's.
#[derive(Debug, Default)]
pub(super) struct Materials(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    version: u64,
    /// None: an earlier flintd had them, or a fork's parent.
    objects: Option<guest::Materials>,
    /// The sandbox that has them, by address: one that is made anew has not.
    delivered: Option<usize>,
}

/// An update was not taken.
#[derive(Debug)]
pub(super) enum UpdateError {
    /// A newer one is known.
    Stale(u64),
    /// The guest did not answer.
    Guest(Status),
}

impl Materials {
    /// What came with the pod.
    pub(super) fn new(materials: host::PodMaterials) -> Self {
        let version = materials.version;
        let objects = Some(materials).filter(has_objects).map(objects);
        Self(Mutex::new(Known {
            version,
            objects,
            delivered: None,
        }))
    }

    /// Has a guest have them, and the pod's volumes as they are now.
    pub(super) async fn deliver(
        &self,
        sandbox: &Arc<dyn Sandbox>,
        volumes: Vec<guest::ProjectedVolume>,
    ) -> Result<(), Status> {
        let mut known = self.0.lock().await;
        let has = known.delivered == Some(address(sandbox));
        let objects = known.objects.clone().filter(|_| !has);
        if objects.is_none() && volumes.is_empty() {
            return Ok(());
        }
        let request = guest::SetMaterialsRequest {
            version: known.version,
            materials: objects,
            volumes,
        };
        let answer = sandbox.guest().set_materials(request).await?.into_inner();
        known.version = known.version.max(answer.version);
        known.delivered = Some(address(sandbox));
        Ok(())
    }

    /// Takes newer ones, and hands them to the guest if there is one; answers with their version.
    pub(super) async fn update(
        &self,
        materials: host::PodMaterials,
        sandbox: Option<&Arc<dyn Sandbox>>,
        volumes: Vec<guest::ProjectedVolume>,
    ) -> Result<u64, UpdateError> {
        let mut known = self.0.lock().await;
        let asked = materials.version;
        if asked != 0 && asked < known.version {
            return Err(UpdateError::Stale(known.version));
        }
        if asked != 0 && asked == known.version && known.objects.is_some() {
            return Ok(asked);
        }
        let new = objects(materials);
        let version = match sandbox {
            Some(sandbox) => {
                let request = guest::SetMaterialsRequest {
                    version: asked,
                    materials: Some(new.clone()),
                    volumes,
                };
                let answer = sandbox.guest().set_materials(request).await;
                let answer = answer.map_err(UpdateError::Guest)?.into_inner();
                if asked != 0 && answer.version > asked {
                    // Of an earlier flintd's.
                    known.version = answer.version;
                    return Err(UpdateError::Stale(answer.version));
                }
                known.delivered = Some(address(sandbox));
                answer.version
            }
            None if asked == 0 => known.version.saturating_add(1),
            None => asked,
        };
        known.version = version;
        known.objects = Some(new);
        Ok(version)
    }
}

/// Tells sandboxes apart while the actor holds the one that it means.
fn address(sandbox: &Arc<dyn Sandbox>) -> usize {
    Arc::as_ptr(sandbox).cast::<()>() as usize
}

/// Whether there is more than credentials.
pub(super) fn has_objects(materials: &host::PodMaterials) -> bool {
    !materials.config_maps.is_empty() || !materials.secrets.is_empty() || !materials.service_account_tokens.is_empty()
}

fn objects(materials: host::PodMaterials) -> guest::Materials {
    let config_map = |(name, map): (String, host::ConfigMap)| {
        let map = guest::ConfigMap {
            data: map.data,
            binary_data: map.binary_data,
        };
        (name, map)
    };
    let secret = |(name, secret): (String, host::Secret)| (name, guest::Secret { data: secret.data });
    guest::Materials {
        config_maps: materials.config_maps.into_iter().map(config_map).collect(),
        secrets: materials.secrets.into_iter().map(secret).collect(),
        tokens: materials.service_account_tokens,
    }
}
