//! `flint.host.v1.Store`.

use flint_api::host::{self, store_server::Store};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, Api, WINDOW, streamed};

#[async_trait]
impl Store for Api {
    async fn get_usage(&self, _: Request<host::GetUsageRequest>) -> Result<Response<host::StoreUsage>, Status> {
        Ok(Response::new(self.pods.context().images.usage().await?))
    }

    type VerifyStream = Answers<host::VerifyProgress>;

    async fn verify(&self, request: Request<host::VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let repair = request.into_inner().repair;
        let images = self.pods.context().images.clone();
        let (progress, reports) = mpsc::channel(WINDOW);
        Ok(streamed(
            reports,
            async move { Ok(images.verify(repair, progress).await?) },
        ))
    }
}
