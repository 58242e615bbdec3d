//! `flint.host.v1.Templates`.

use flint_api::host::{self, templates_server::Templates};
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, Api, fault::bad_field, snapshots::stream};

#[async_trait]
impl Templates for Api {
    type PushStream = Answers<host::SnapshotProgress>;

    async fn push(&self, request: Request<host::PushTemplateRequest>) -> Result<Response<Self::PushStream>, Status> {
        let host::PushTemplateRequest { reference, credentials } = request.into_inner();
        if reference.is_empty() {
            return Err(bad_field("reference", "must be set"));
        }
        let mover = self.templates.clone();
        Ok(stream(|progress| async move {
            let pushed = mover.push(&reference, credentials, &progress).await?;
            Ok(host::SnapshotProgress {
                pushed,
                ..host::SnapshotProgress::default()
            })
        }))
    }

    type PullStream = Answers<host::SnapshotProgress>;

    async fn pull(&self, request: Request<host::PullTemplateRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        if request.reference.is_empty() {
            return Err(bad_field("reference", "must be set"));
        }
        let mover = self.templates.clone();
        Ok(stream(|progress| async move {
            mover.pull(&request.reference, request.credentials, &progress).await?;
            Ok(host::SnapshotProgress::default())
        }))
    }
}
