//! Where a registry's API is.

use std::fmt;
use std::net::IpAddr;

use reqwest::Url;

use super::{HostConfig, RegistryError};

/// The base of a registry's API, and how it is named to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    base: Url,
    /// The host as it stands in references and in docker's configuration.
    pub(crate) host: String,
}

impl Endpoint {
    /// Where the registry named `host` in references is.
    pub(crate) fn of_registry(host: &str, config: Option<&HostConfig>) -> Result<Self, RegistryError> {
        // Docker Hub's API is not where its name says.
        let address = if host == "docker.io" {
            "registry-1.docker.io"
        } else {
            host
        };
        let plain = config
            .and_then(|config| config.plain_http)
            .unwrap_or_else(|| is_loopback(address));
        Self::parse(&format!("{}://{address}", if plain { "http" } else { "https" }), host)
    }

    /// Where a mirror is: a host, or a URL whose scheme says how to speak to it.
    pub(crate) fn of_mirror(mirror: &str, config: Option<&HostConfig>) -> Result<Self, RegistryError> {
        match mirror.split_once("://") {
            Some((_, rest)) => Self::parse(mirror, rest.split('/').next().unwrap_or(rest)),
            None => Self::of_registry(mirror, config),
        }
    }

    fn parse(url: &str, host: &str) -> Result<Self, RegistryError> {
        let wrong = |reason: String| RegistryError::Address {
            address: url.to_owned(),
            reason,
        };
        let mut base = Url::parse(url).map_err(|error| wrong(error.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(wrong("it is no http or https address".to_owned()));
        }
        let path = format!("{}/v2/", base.path().trim_end_matches('/'));
        base.set_path(&path);
        Ok(Self {
            base,
            host: host.to_owned(),
        })
    }

    /// The URL of `path` below the API's root. Repository names and digests need no escaping.
    pub(crate) fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{path}", self.base.path()));
        url
    }

    /// Whether what is sent can be read on the way.
    pub(crate) fn is_plain(&self) -> bool {
        self.base.scheme() == "http"
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base.as_str().trim_end_matches("/v2/"))
    }
}

/// Whether `address` (a host with or without a port) is this machine.
fn is_loopback(address: &str) -> bool {
    Url::parse(&format!("http://{address}")).is_ok_and(|url| url_is_loopback(&url))
}

/// Whether `url` leads to this machine.
pub(crate) fn url_is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_and_who_is_named() {
        let of = |host: &str, config: Option<&HostConfig>| Endpoint::of_registry(host, config).unwrap().to_string();
        assert_eq!(of("127.0.0.1:5000", None), "http://127.0.0.1:5000");
        assert_eq!(of("localhost:5000", None), "http://localhost:5000");
        assert_eq!(of("registry.example:5000", None), "https://registry.example:5000");
        assert_eq!(of("127.0.0.1.example", None), "https://127.0.0.1.example");
        let plain = HostConfig {
            plain_http: Some(true),
            ..HostConfig::default()
        };
        assert_eq!(of("registry.example", Some(&plain)), "http://registry.example");
        let tls = HostConfig {
            plain_http: Some(false),
            ..HostConfig::default()
        };
        assert_eq!(of("127.0.0.1:5000", Some(&tls)), "https://127.0.0.1:5000");
    }

    #[test]
    fn docker_hub_is_where_it_is_and_mirrors_may_have_a_prefix() {
        let hub = Endpoint::of_registry("docker.io", None).unwrap();
        let url = hub.url("library/busybox/manifests/latest");
        assert_eq!(
            url.as_str(),
            "https://registry-1.docker.io/v2/library/busybox/manifests/latest"
        );
        let mirror = Endpoint::of_mirror("https://mirror.example/hub/", None).unwrap();
        assert_eq!(mirror.url("x").as_str(), "https://mirror.example/hub/v2/x");
        assert!(Endpoint::of_mirror("ftp://mirror.example", None).is_err());
    }
}
