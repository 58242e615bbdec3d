//! `flint.host.v1.Host`.

use std::time::{Duration, SystemTime};

use flint_api::host::{self, host_server::Host};
use tokio_stream::{StreamExt as _, wrappers::WatchStream};
use tonic::{Code, Request, Response, Status, async_trait};

use super::{
    Answers, Api,
    fault::{bad_field, fault, fault_retry},
};
use crate::{backend::Ready, host::LeaseError, pods::duration};

impl From<LeaseError> for Status {
    fn from(error: LeaseError) -> Self {
        let message = error.to_string();
        match error {
            LeaseError::Held { remaining, .. } => {
                fault_retry(Code::FailedPrecondition, "LEASE_HELD", message, remaining)
            }
            LeaseError::Lost { .. } => fault(Code::FailedPrecondition, "LEASE_LOST", message),
            LeaseError::Store(_) => fault_retry(Code::Unavailable, "STORE", message, Duration::from_secs(5)),
        }
    }
}

impl Api {
    /// The host now.
    async fn host_info(&self) -> host::HostInfo {
        let context = self.pods.context();
        let (kvm, not_ready) = match self.pods.ready().await {
            Ok(kind) => (kind.word().into(), String::new()),
            Err(error) => ("none".into(), error),
        };
        let Ready { size, parked } = context.sandboxes.pool();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let pool = host::Pool {
            size: count(size),
            parked: count(*parked.borrow()),
        };
        host::HostInfo {
            kvm,
            not_ready,
            pool: Some(pool),
            allocated: Some(context.ledger.allocated()),
            draining: self.control.draining(),
            ..(*self.info).clone()
        }
    }
}

#[async_trait]
impl Host for Api {
    async fn get_host(&self, _: Request<host::GetHostRequest>) -> Result<Response<host::HostInfo>, Status> {
        Ok(Response::new(self.host_info().await))
    }

    type WatchHostStream = Answers<host::HostInfo>;

    async fn watch_host(&self, _: Request<host::WatchHostRequest>) -> Result<Response<Self::WatchHostStream>, Status> {
        // The channels hold the last state only: a slow client misses states in between, never the last one.
        let context = self.pods.context();
        let pods = WatchStream::new(context.host_changed.subscribe()).map(|_| ());
        // The first state comes with the other stream's.
        let pool = WatchStream::from_changes(context.sandboxes.pool().parked).map(|_| ());
        let (changes, api) = (pods.merge(pool), self.clone());
        Ok(Response::new(Box::pin(changes.then(move |_| {
            let api = api.clone();
            async move { Ok(api.host_info().await) }
        }))))
    }

    async fn acquire_lease(
        &self,
        request: Request<host::AcquireLeaseRequest>,
    ) -> Result<Response<host::Lease>, Status> {
        let request = request.into_inner();
        if request.holder.is_empty() || request.holder.len() > 253 {
            return Err(bad_field("holder", "must have 1 to 253 characters"));
        }
        let lasting = request
            .duration
            .ok_or_else(|| bad_field("duration", "must be set, 1 s to 1 h"))?;
        let lease = self
            .control
            .acquire(&request.holder, duration(lasting), SystemTime::now())
            .await;
        Ok(Response::new(lease?))
    }

    async fn drain(&self, request: Request<host::DrainRequest>) -> Result<Response<host::DrainResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        self.control.drain(!request.resume).await?;
        self.pods.context().changed();
        if request.terminate_pods && !request.resume {
            self.pods.terminate_all(false).await;
        }
        Ok(Response::new(host::DrainResponse {}))
    }
}
