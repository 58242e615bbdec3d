//! `flint.host.v1.Images`.

use std::path::PathBuf;

use flint_api::host::{self, images_server::Images};
use tokio::sync::mpsc;
use tonic::{Code, Request, Response, Status, async_trait};

use super::{
    Answers, Api, WINDOW,
    fault::{bad_field, fault},
    streamed,
};
use crate::backend::{ImageError, ImageInfo, PullOrder};

#[async_trait]
impl Images for Api {
    type PullStream = Answers<host::PullProgress>;

    async fn pull(&self, request: Request<host::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let host::PullRequest {
            reference,
            credentials,
            if_not_present,
        } = request.into_inner();
        if reference.is_empty() {
            return Err(bad_field("reference", "must be set"));
        }
        let images = self.pods.context().images.clone();
        let order = PullOrder {
            reference,
            credentials,
            if_not_present,
        };
        Ok(self.stream(|progress| async move { images.pull(order, progress).await }))
    }

    type ImportStream = Answers<host::PullProgress>;

    async fn import(&self, request: Request<host::ImportRequest>) -> Result<Response<Self::ImportStream>, Status> {
        let host::ImportRequest { path, reference } = request.into_inner();
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(bad_field("path", "must be an absolute path on the host"));
        }
        let images = self.pods.context().images.clone();
        let reference = Some(reference).filter(|reference| !reference.is_empty());
        Ok(self.stream(|progress| async move { images.import(path, reference, progress).await }))
    }

    async fn list(&self, _: Request<host::ListImagesRequest>) -> Result<Response<host::ListImagesResponse>, Status> {
        let used = self.pods.images_in_use();
        let mut images = self.pods.context().images.list().await?;
        for image in &mut images {
            image.in_use = used.contains(&image.digest);
        }
        Ok(Response::new(host::ListImagesResponse { images }))
    }

    async fn remove(
        &self,
        request: Request<host::RemoveImageRequest>,
    ) -> Result<Response<host::RemoveImageResponse>, Status> {
        let name = request.into_inner().image;
        let images = &self.pods.context().images;
        let found = images.get(&name).await?;
        let found = found.ok_or_else(|| ImageError::NotFound(format!("no image {name} on this host")))?;
        if self.pods.images_in_use().contains(&found.image.digest) {
            let message = format!(
                "image {name} is in use by a pod or a snapshot: terminate the pod, or remove the snapshot, first"
            );
            return Err(fault(Code::FailedPrecondition, "IMAGE_IN_USE", message));
        }
        // A reference among several loses its name only; the store decides.
        let freed_bytes = images.remove(&name).await?;
        Ok(Response::new(host::RemoveImageResponse { freed_bytes }))
    }
}

impl Api {
    /// Runs a pull or import and streams its progress; the last message has the image. A client that hangs up does not
    /// wait any more: the store goes on only for others who do.
    fn stream<F>(
        &self,
        begin: impl FnOnce(mpsc::Sender<host::PullProgress>) -> F,
    ) -> Response<Answers<host::PullProgress>>
    where
        F: Future<Output = Result<ImageInfo, ImageError>> + Send + 'static,
    {
        let (progress, reports) = mpsc::channel(WINDOW);
        let work = begin(progress);
        let pods = self.pods.clone();
        let result = async move {
            let found = work.await?;
            let in_use = pods.images_in_use().contains(&found.image.digest);
            Ok(host::PullProgress {
                stage: "done".into(),
                image: Some(host::Image { in_use, ..found.image }),
                ..host::PullProgress::default()
            })
        };
        streamed(reports, result)
    }
}
