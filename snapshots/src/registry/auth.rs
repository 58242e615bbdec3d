//! Authorization: nothing, basic, or a bearer token from where the registry says (distribution specification, "token").

use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::challenge::Challenge;
use super::credentials::Login;
use super::endpoint::{Endpoint, url_is_loopback};
use super::source::read_limited;
use super::{Credentials, RegistryConfig, RegistryError, http};

/// What one pull shows one registry. Two pulls share nothing.
pub(crate) struct Authorizer {
    login: Login,
    /// What was accepted last. Held while a new one is fetched, so that layers in parallel fetch one token.
    current: Mutex<Option<HeaderValue>>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authorizer {
    pub(crate) fn new(login: Login) -> Self {
        Self {
            login,
            current: Mutex::new(None),
        }
    }

    /// What to show now.
    pub(crate) async fn current(&self) -> Option<HeaderValue> {
        self.current.lock().await.clone()
    }

    /// The error for a request that was refused whatever was shown.
    pub(crate) fn refused(&self, endpoint: &Endpoint, repository: &str) -> RegistryError {
        let (registry, repository) = (endpoint.to_string(), repository.to_owned());
        match &self.login.credentials {
            Some(Credentials { username, .. }) => RegistryError::WrongCredentials {
                registry,
                repository,
                username: username.clone(),
            },
            None => RegistryError::CredentialsNeeded {
                registry,
                repository,
                elsewhere: self.login.elsewhere.clone(),
            },
        }
    }

    /// Answers the challenge in `headers`, which came when `shown` was shown.
    pub(crate) async fn answer(
        &self,
        client: &reqwest::Client,
        config: &RegistryConfig,
        endpoint: &Endpoint,
        repository: &str,
        headers: &HeaderMap,
        shown: Option<&HeaderValue>,
    ) -> Result<HeaderValue, RegistryError> {
        let mut current = self.current.lock().await;
        // Another request renewed it while this one was under way.
        if let Some(newer) = current.as_ref().filter(|newer| Some(*newer) != shown) {
            return Ok(newer.clone());
        }
        let offers: Vec<_> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let malformed = |reason: String| RegistryError::Malformed {
            what: format!("the challenge of registry {endpoint}"),
            reason,
        };
        let header = match Challenge::parse(&offers.join(", "), repository).map_err(malformed)? {
            Challenge::Bearer(url) => {
                let exchange = Exchange {
                    client,
                    config,
                    endpoint,
                    repository,
                };
                format!("Bearer {}", exchange.token(self, url).await?)
            }
            Challenge::Basic => match &self.login.credentials {
                Some(credentials) if shown.is_none() => basic(credentials),
                _ => return Err(self.refused(endpoint, repository)),
            },
        };
        let mut header = HeaderValue::from_str(&header).map_err(|_| malformed("the token is no text".to_owned()))?;
        header.set_sensitive(true);
        *current = Some(header.clone());
        Ok(header)
    }
}

fn basic(credentials: &Credentials) -> String {
    use base64::Engine as _;
    let plain = format!("{}:{}", credentials.username, credentials.password);
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(plain))
}

struct Exchange<'a> {
    client: &'a reqwest::Client,
    config: &'a RegistryConfig,
    endpoint: &'a Endpoint,
    repository: &'a str,
}

impl Exchange<'_> {
    async fn token(&self, authorizer: &Authorizer, url: Url) -> Result<String, RegistryError> {
        let Self {
            client,
            config,
            endpoint,
            repository,
        } = self;
        let plain = url.scheme() == "http" && !url_is_loopback(&url) && !endpoint.is_plain();
        let mut request = client.get(url.clone());
        if let Some(credentials) = &authorizer.login.credentials {
            if plain {
                return Err(RegistryError::InsecureRealm {
                    registry: endpoint.to_string(),
                    realm: url.to_string(),
                });
            }
            request = request.header(AUTHORIZATION, basic(credentials));
        }
        let response = send(request, &endpoint.to_string(), config.timeouts.first_byte).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(authorizer.refused(endpoint, repository));
            }
            _ => return Err(super::source::status_error(response, &endpoint.to_string(), "a token", config).await),
        }
        let what = format!("the token of registry {endpoint}");
        let body = read_limited(response, &what, &endpoint.to_string(), 64 << 10, config).await?;
        // What is wrong with it is not quoted: it may be a token.
        let malformed = |reason: &str| RegistryError::Malformed {
            what: what.clone(),
            reason: reason.to_owned(),
        };
        let answer: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| malformed("it is not the JSON it should be"))?;
        answer
            .token
            .or(answer.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| malformed("it has no token"))
    }
}

/// Sends a request and waits for the head of the answer, not for ever.
pub(crate) async fn send(
    request: RequestBuilder,
    registry: &str,
    after: Duration,
) -> Result<reqwest::Response, RegistryError> {
    match tokio::time::timeout(after, request.send()).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(http::failure(registry, &error)),
        Err(_) => Err(RegistryError::TimedOut {
            registry: registry.to_owned(),
            what: "waiting for an answer",
            after,
        }),
    }
}
