//! Authorization: nothing, basic, or a bearer token from where the registry says (distribution specification, "token").

use http_auth::ChallengeRef;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::endpoint::{Endpoint, url_is_loopback};
use super::source::read_limited;
use super::{Credentials, RegistryConfig, RegistryError, http};

/// What one pull shows one registry. Two pulls share nothing.
pub(crate) struct Authorizer {
    credentials: Option<Credentials>,
    /// What was accepted last. Held while a new one is fetched, so that layers in parallel fetch one token.
    current: Mutex<Option<HeaderValue>>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authorizer {
    pub(crate) fn new(credentials: Option<Credentials>) -> Self {
        Self {
            credentials,
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
        match &self.credentials {
            Some(Credentials { username, .. }) => RegistryError::WrongCredentials {
                registry,
                repository,
                username: username.clone(),
            },
            None => RegistryError::CredentialsNeeded { registry, repository },
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
        let text: Vec<_> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let text = text.join(", ");
        let malformed = |reason: String| RegistryError::Malformed {
            what: format!("the challenge of registry {endpoint}"),
            reason,
        };
        let challenges = http_auth::parse_challenges(&text).map_err(|error| malformed(error.to_string()))?;
        let of = |scheme: &str| {
            challenges
                .iter()
                .find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme))
        };
        let header = if let Some(challenge) = of("bearer") {
            let token = Exchange {
                client,
                config,
                endpoint,
                repository,
            }
            .token(self, challenge)
            .await?;
            format!("Bearer {token}")
        } else if of("basic").is_some() {
            let Some(credentials) = &self.credentials else {
                return Err(self.refused(endpoint, repository));
            };
            if shown.is_some() {
                return Err(self.refused(endpoint, repository));
            }
            basic(credentials)
        } else {
            return Err(malformed("it offers neither Basic nor Bearer".to_owned()));
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
    async fn token(&self, authorizer: &Authorizer, challenge: &ChallengeRef<'_>) -> Result<String, RegistryError> {
        let Self {
            client,
            config,
            endpoint,
            repository,
        } = self;
        let realm = self.realm(challenge)?;
        let plain = realm.scheme() == "http" && !url_is_loopback(&realm) && !endpoint.is_plain();
        let mut request = client.get(realm.clone());
        if let Some(credentials) = &authorizer.credentials {
            if plain {
                return Err(RegistryError::InsecureRealm {
                    registry: endpoint.to_string(),
                    realm: realm.to_string(),
                });
            }
            request = request.header(AUTHORIZATION, basic(credentials));
        }
        let response = send(request, &endpoint.to_string(), config).await?;
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

    fn realm(&self, challenge: &ChallengeRef<'_>) -> Result<Url, RegistryError> {
        let Self {
            endpoint, repository, ..
        } = self;
        let parameter = |name: &str| {
            challenge
                .params
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_unescaped())
        };
        let malformed = |reason: String| RegistryError::Malformed {
            what: format!("the challenge of registry {endpoint}"),
            reason,
        };
        let realm = parameter("realm").ok_or_else(|| malformed("it has no realm".to_owned()))?;
        let mut url = Url::parse(&realm).map_err(|error| malformed(format!("realm {realm:?}: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(malformed(format!("realm {realm:?} is no http address")));
        }
        let scope = parameter("scope").unwrap_or_else(|| format!("repository:{repository}:pull"));
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = parameter("service") {
            url.query_pairs_mut().append_pair("service", &service);
        }
        Ok(url)
    }
}

/// Sends a request and waits for the head of the answer, not for ever.
pub(crate) async fn send(
    request: RequestBuilder,
    registry: &str,
    config: &RegistryConfig,
) -> Result<reqwest::Response, RegistryError> {
    let after = config.timeouts.first_byte;
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
