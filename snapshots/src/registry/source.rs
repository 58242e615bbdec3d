//! One place that serves a repository: a registry or a mirror of it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{ACCEPT, AUTHORIZATION, RANGE, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use super::auth::{Authorizer, send};
use super::endpoint::Endpoint;
use super::{Digest, RegistryConfig, RegistryError, http};

/// A registry or mirror, as one pull sees it.
pub(crate) struct Source {
    pub(crate) endpoint: Endpoint,
    pub(crate) authorizer: Authorizer,
    pub(crate) repository: String,
    pub(crate) client: reqwest::Client,
    pub(crate) config: Arc<RegistryConfig>,
}

impl Source {
    /// A manifest or an index with its bytes; `key` is a tag or a digest.
    pub(crate) async fn manifest(&self, key: &str) -> Result<Vec<u8>, RegistryError> {
        let what = format!("manifest {key} of {}", self.repository);
        let limit = self.config.limits.manifest_bytes;
        self.document(
            &format!("{}/manifests/{key}", self.repository),
            Some(super::manifest::ACCEPT),
            &what,
            limit,
        )
        .await
    }

    /// A small blob, whole and verified.
    pub(crate) async fn small_blob(&self, digest: Digest, what: &str) -> Result<Vec<u8>, RegistryError> {
        let path = format!("{}/blobs/{digest}", self.repository);
        let bytes = self
            .document(&path, None, what, self.config.limits.config_bytes)
            .await?;
        self.verify(bytes, digest, what)
    }

    pub(crate) fn verify(&self, bytes: Vec<u8>, expected: Digest, what: &str) -> Result<Vec<u8>, RegistryError> {
        match Digest::of(&bytes) {
            found if found == expected => Ok(bytes),
            found => Err(RegistryError::Altered {
                registry: self.endpoint.to_string(),
                what: what.to_owned(),
                expected,
                found,
            }),
        }
    }

    async fn document(
        &self,
        path: &str,
        accept: Option<&str>,
        what: &str,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let mut attempt = 1;
        loop {
            let result = async {
                let response = self.open(path, accept, None, what).await?;
                read_limited(response, what, &self.endpoint.to_string(), limit, &self.config).await
            };
            match result.await {
                Err(error) => self.pause(&mut attempt, error).await?,
                done => return done,
            }
        }
    }

    /// Waits before the next attempt, or gives the error back if there is none to be.
    pub(crate) async fn pause(&self, attempt: &mut u32, error: RegistryError) -> Result<(), RegistryError> {
        let retries = &self.config.retries;
        if !error.is_transient() || *attempt >= retries.attempts {
            return Err(error);
        }
        let pause = retries.pause(*attempt, error.retry_after());
        tracing::debug!(%error, attempt, ?pause, "trying again");
        tokio::time::sleep(pause).await;
        *attempt += 1;
        Ok(())
    }

    /// One attempt: asks for `path`, or a range of its bytes, and returns the head of a successful answer.
    pub(crate) async fn open(
        &self,
        path: &str,
        accept: Option<&str>,
        range: Option<String>,
        what: &str,
    ) -> Result<Response, RegistryError> {
        let make = || {
            let mut request = self.client.get(self.endpoint.url(path));
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some(range) = &range {
                request = request.header(RANGE, range);
            }
            request
        };
        let response = self.exchange(make, self.config.timeouts.first_byte).await?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            _ => Err(self.refusal(response, what).await),
        }
    }

    /// Has a request answered that `make` makes; once more, if the registry wants to be shown something else with it.
    pub(crate) async fn exchange(
        &self,
        make: impl Fn() -> RequestBuilder,
        patience: Duration,
    ) -> Result<Response, RegistryError> {
        let Self {
            client,
            config,
            endpoint,
            repository,
            authorizer,
        } = self;
        let registry = endpoint.to_string();
        let shown = authorizer.current().await;
        let request = match &shown {
            Some(header) => make().header(AUTHORIZATION, header),
            None => make(),
        };
        let response = send(request, &registry, patience).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let header = authorizer
            .answer(client, config, endpoint, repository, response.headers(), shown.as_ref())
            .await?;
        send(make().header(AUTHORIZATION, header), &registry, patience).await
    }

    /// What an answer that is no success means.
    pub(crate) async fn refusal(&self, response: Response, what: &str) -> RegistryError {
        let registry = self.endpoint.to_string();
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                self.authorizer.refused(&self.endpoint, &self.repository)
            }
            StatusCode::NOT_FOUND => RegistryError::NotFound {
                registry,
                what: what.to_owned(),
            },
            _ => status_error(response, &registry, what, &self.config).await,
        }
    }
}

/// The next piece of an answer, or that it is over, or that nothing came.
pub(crate) async fn next_piece(
    response: &mut Response,
    registry: &str,
    config: &RegistryConfig,
) -> Result<Option<impl AsRef<[u8]> + Send + 'static + use<>>, RegistryError> {
    let after = config.timeouts.stall;
    match tokio::time::timeout(after, response.chunk()).await {
        Ok(Ok(piece)) => Ok(piece),
        Ok(Err(error)) => Err(http::failure(registry, &error)),
        Err(_) => Err(RegistryError::TimedOut {
            registry: registry.to_owned(),
            what: "in the middle of an answer",
            after,
        }),
    }
}

/// An answer's body, if it has no more than `limit` bytes.
pub(crate) async fn read_limited(
    mut response: Response,
    what: &str,
    registry: &str,
    limit: u64,
    config: &RegistryConfig,
) -> Result<Vec<u8>, RegistryError> {
    let too_large = || RegistryError::TooLarge {
        what: what.to_owned(),
        limit,
    };
    if response.content_length().is_some_and(|len| len > limit) {
        return Err(too_large());
    }
    let mut body = Vec::new();
    while let Some(piece) = next_piece(&mut response, registry, config).await? {
        let piece = piece.as_ref();
        if (body.len() + piece.len()) as u64 > limit {
            return Err(too_large());
        }
        body.extend_from_slice(piece);
    }
    Ok(body)
}

#[derive(Deserialize)]
struct ErrorAnswer {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// A number of seconds, or a date (RFC 9110, 10.2.3); one that has passed means at once.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// What an unsuccessful answer says. Its text is the registry's: shortened and printed on one line.
pub(crate) async fn status_error(
    response: Response,
    registry: &str,
    what: &str,
    config: &RegistryConfig,
) -> RegistryError {
    let status = response.status().as_u16();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| retry_after(value.to_str().ok()?, SystemTime::now()));
    let body = read_limited(response, what, registry, 16 << 10, config)
        .await
        .unwrap_or_default();
    let said = serde_json::from_slice::<ErrorAnswer>(&body)
        .ok()
        .and_then(|answer| answer.errors.into_iter().next());
    let message = said
        .map(|ErrorEntry { code, message }| format!("{code}: {message}"))
        .or_else(|| {
            let text = String::from_utf8_lossy(&body);
            let line = text.lines().next().unwrap_or_default().trim().to_owned();
            (!line.is_empty() && !line.starts_with('<')).then_some(line)
        });
    let message = message.map(|text| text.chars().filter(|c| !c.is_control()).take(300).collect());
    RegistryError::Status {
        registry: registry.to_owned(),
        status,
        what: what.to_owned(),
        message,
        retry_after,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_may_say_when_to_come_back_in_seconds_or_as_a_date() {
        // 784111777 is the example of RFC 9110, 5.6.7.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777 - 90);
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:49:37 GMT", now),
            Some(Duration::from_secs(90))
        );
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now),
            Some(Duration::ZERO),
            "it has passed"
        );
        assert_eq!(retry_after("soon", now), None);
        assert_eq!(retry_after("-1", now), None);
    }
}
