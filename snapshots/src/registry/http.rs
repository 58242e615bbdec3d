//! The HTTP client all pulls share, and what its errors mean.

use std::error::Error as _;
use std::sync::Arc;

use reqwest::redirect::{Attempt, Policy};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::{RegistryConfig, RegistryError};

/// A client for `config`. HTTP/1.1 only: several connections carry several layers better than one.
pub(crate) fn client(config: &RegistryConfig) -> Result<reqwest::Client, RegistryError> {
    let tls = tls(config)?;
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .http1_only()
        .connect_timeout(config.timeouts.connect)
        .redirect(Policy::custom(redirect))
        .user_agent(concat!("flint/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| RegistryError::Tls(chain(&error)))
}

/// Follows a registry to its storage, but not out of TLS. reqwest drops the authorization when the host changes.
fn redirect(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let leaves_tls =
        attempt.url().scheme() != "https" && attempt.previous().last().is_some_and(|url| url.scheme() == "https");
    if leaves_tls {
        attempt.error("it redirects from https to an unencrypted address")
    } else if attempt.previous().len() > 5 {
        attempt.error("it redirects more than five times")
    } else {
        attempt.follow()
    }
}

/// The system's roots and the extra ones. A system without roots can still use the extra ones, and plain HTTP.
fn tls(config: &RegistryConfig) -> Result<rustls::ClientConfig, RegistryError> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if let Some(path) = &config.extra_ca {
        let wrong = |reason: String| RegistryError::Tls(format!("extra CA file {}: {reason}", path.display()));
        let certificates = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
        let before = roots.len();
        for certificate in certificates {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        if roots.len() == before {
            return Err(wrong("it has no certificate in PEM form".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| RegistryError::Tls(error.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// What an error of the HTTP client means for a pull from `registry`.
pub(crate) fn failure(registry: &str, error: &reqwest::Error) -> RegistryError {
    let registry = registry.to_owned();
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(tls) = tls_error(inner) {
            return RegistryError::Certificate {
                registry,
                reason: tls.to_string(),
            };
        }
        cause = inner.source();
    }
    if error.is_redirect() {
        return RegistryError::Redirect {
            registry,
            reason: chain(error),
        };
    }
    RegistryError::Unreachable {
        registry,
        reason: chain(error),
    }
}

/// rustls' errors travel inside `io::Error`s, even several, which do not give them as their source.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    error.downcast_ref().or_else(|| tls_error(wrapped?))
}

/// An error and its causes, without the URL, which may carry a signature.
fn chain(error: &reqwest::Error) -> String {
    let mut parts = Vec::new();
    let mut cause = error.source();
    while let Some(inner) = cause {
        parts.push(inner.to_string());
        cause = inner.source();
    }
    // The innermost says it best; the outer ones mostly repeat that something failed.
    parts.pop().unwrap_or_else(|| {
        if error.is_body() || error.is_decode() {
            "the answer broke off".into()
        } else {
            "the request failed".into()
        }
    })
}
