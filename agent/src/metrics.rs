//! Counters, gauges and histograms in Prometheus' text format, served on a listener of their own.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tracing::debug;

use crate::{sandbox::pool::PoolMetrics, timeline::Timeline};

/// Scrapers at a time; a further one waits.
const CONNECTIONS: usize = 16;
/// A scraper that is slower is hung up on.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabel {
    stage: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// flintd's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Pods taken in.
    pub pods_accepted: Counter,
    /// Containers started.
    pub container_starts: Counter,
    /// Bytes of container output.
    pub log_bytes: Counter,
    /// Pods that have not ended.
    pub pods: Gauge,
    /// Memory that pods take.
    pub memory_allocated: Gauge,
    /// CPU that pods ask for, in thousandths.
    pub cpu_allocated: Gauge,
    /// Parked clones.
    pub pool: PoolMetrics,
    pulls: Family<ResultLabel, Counter>,
    sandbox_start: Histogram,
    stages: Family<StageLabel, Histogram, fn() -> Histogram>,
}

/// 1 ms to 16 s, doubling.
fn buckets() -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(
        0.001, 2.0, 15,
    ))
}

impl Metrics {
    /// All metrics, at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("flint"),
            pods_accepted: Counter::default(),
            container_starts: Counter::default(),
            log_bytes: Counter::default(),
            pods: Gauge::default(),
            memory_allocated: Gauge::default(),
            cpu_allocated: Gauge::default(),
            pool: PoolMetrics::default(),
            pulls: Family::default(),
            sandbox_start: buckets(),
            stages: Family::new_with_constructor(buckets as fn() -> Histogram),
        };
        let registry = &mut metrics.registry;
        registry.register("pods_accepted", "Pods taken in", metrics.pods_accepted.clone());
        registry.register(
            "container_starts",
            "Containers started",
            metrics.container_starts.clone(),
        );
        registry.register("log_bytes", "Bytes of container output", metrics.log_bytes.clone());
        registry.register("image_pulls", "Image pulls for pods, by result", metrics.pulls.clone());
        registry.register("pods", "Pods that have not ended", metrics.pods.clone());
        registry.register_with_unit(
            "memory_allocated",
            "Memory that pods take",
            Unit::Bytes,
            metrics.memory_allocated.clone(),
        );
        registry.register(
            "cpu_allocated_milli",
            "CPU that pods ask for, in thousandths of a CPU",
            metrics.cpu_allocated.clone(),
        );
        registry.register_with_unit(
            "sandbox_start",
            "From the request for a sandbox to its images mounted",
            Unit::Seconds,
            metrics.sandbox_start.clone(),
        );
        registry.register_with_unit(
            "start_stage",
            "Stages of a pod's start",
            Unit::Seconds,
            metrics.stages.clone(),
        );
        metrics.pool.register(registry);
        metrics
    }

    /// A pull for a pod ended.
    pub fn pulled(&self, good: bool) {
        self.pulls
            .get_or_create(&ResultLabel {
                result: if good { "ok" } else { "error" },
            })
            .inc();
    }

    /// A sandbox was started. Stages of single containers are left out: their names would make the metric grow.
    pub fn launched(&self, took: Duration, timeline: &Timeline) {
        self.sandbox_start.observe(took.as_secs_f64());
        for stage in timeline
            .stages()
            .into_iter()
            .filter(|stage| !stage.name.starts_with("container."))
        {
            let duration = stage.duration.map(crate::pods::duration).unwrap_or_default();
            self.stages
                .get_or_create(&StageLabel { stage: stage.name })
                .observe(duration.as_secs_f64());
        }
    }

    /// What pods take now.
    pub fn allocated(&self, amounts: flint_api::host::Amounts) {
        let capped = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
        self.pods.set(i64::from(amounts.pods));
        self.memory_allocated.set(capped(amounts.memory_bytes));
        self.cpu_allocated.set(capped(amounts.cpu_milli));
    }

    /// The text that a scraper reads.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Serves the metrics until the process ends.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        // The semaphore is never closed.
        while let Ok(place) = room.clone().acquire_owned().await {
            let (stream, peer): (_, SocketAddr) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly, and nothing tells when there are some again: the next accept would fail at
                    // once, and every one after it.
                    debug!(%error, "accepting a scraper failed");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            let metrics = self.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let response = metrics.answer(&request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let serving = hyper::server::conn::http1::Builder::new()
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service);
                if let Ok(Err(error)) = tokio::time::timeout(PATIENCE, serving).await {
                    debug!(%peer, %error, "a scraper's connection failed");
                }
                drop(place);
            });
        }
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let (status, kind, body) = match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => (
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                self.text(),
            ),
            _ => (StatusCode::NOT_FOUND, "text/plain", "GET /metrics\n".to_owned()),
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        response.headers_mut().insert(
            hyper::header::CONTENT_TYPE,
            hyper::header::HeaderValue::from_static(kind),
        );
        response
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_scraper_reads_what_was_counted() {
        let metrics = Arc::new(Metrics::new());
        metrics.pods_accepted.inc();
        metrics.pulled(false);
        let timeline = Timeline::new();
        timeline.mark("vmm.boot");
        metrics.launched(Duration::from_millis(3), &timeline);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(metrics.serve(listener));
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        for line in [
            "flint_pods_accepted_total 1",
            "flint_image_pulls_total{result=\"error\"} 1",
            "flint_start_stage_seconds_count{stage=\"vmm.boot\"} 1",
        ] {
            assert!(text.contains(line), "{text}");
        }
        server.abort();
    }
}
