//! What can go wrong with a registry, told so that one knows what to do about it.

use std::path::PathBuf;
use std::time::Duration;

use super::Digest;

/// Why something could not be had from a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// An address makes no sense.
    #[error("{address:?} is not the address of a registry: {reason}")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Docker's configuration cannot be used.
    #[error("docker configuration {}: {reason}; mend it with docker login, or give credentials with the pull", path.display())]
    DockerConfig {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The HTTP client could not be made.
    #[error("preparing TLS: {0}")]
    Tls(String),
    /// No connection, or it broke.
    #[error(
        "registry {registry} cannot be reached: {reason}; check its address, that it runs, and the network between"
    )]
    Unreachable {
        /// Its address.
        registry: String,
        /// What the network said.
        reason: String,
    },
    /// TLS could not be agreed upon.
    #[error("registry {registry} is not trusted: {reason}; if that is its certificate, give its CA as extra CA file")]
    Certificate {
        /// Its address.
        registry: String,
        /// What TLS said.
        reason: String,
    },
    /// It took too long.
    #[error(
        "registry {registry} was silent for {after:?} ({what}); it is overloaded, or the network is: try again later"
    )]
    TimedOut {
        /// Its address.
        registry: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The registry does not have what was asked for.
    #[error("{what} is unknown to registry {registry}; check name and tag")]
    NotFound {
        /// Its address.
        registry: String,
        /// An image or a blob.
        what: String,
    },
    /// Credentials are needed, and none were given. Registries also say so of repositories that are not there.
    #[error(
        "registry {registry} wants credentials for {repository}: log in, or check the name (a repository that does not exist looks the same){}",
        elsewhere.as_ref().map(|place| format!("; docker's configuration leaves them to {place}, which is not asked here: put user name and password under its \"auths\", or give them with the pull")).unwrap_or_default()
    )]
    CredentialsNeeded {
        /// Its address.
        registry: String,
        /// Which repository.
        repository: String,
        /// Where docker's configuration says that they are.
        elsewhere: Option<String>,
    },
    /// The credentials are not accepted.
    #[error(
        "registry {registry} refused the credentials of user {username:?} for {repository}: check user name, password and rights"
    )]
    WrongCredentials {
        /// Its address.
        registry: String,
        /// Which repository.
        repository: String,
        /// Whose credentials.
        username: String,
    },
    /// Credentials would be sent where they can be read.
    #[error(
        "registry {registry} wants credentials sent to {realm} unencrypted; that is refused: have the registry serve its tokens by https"
    )]
    InsecureRealm {
        /// Its address.
        registry: String,
        /// Where its tokens come from.
        realm: String,
    },
    /// It sends elsewhere, again and again or out of TLS.
    #[error(
        "registry {registry} redirects to where it cannot be followed: {reason}; mend the registry's configuration"
    )]
    Redirect {
        /// Its address.
        registry: String,
        /// What is wrong with the redirection.
        reason: String,
    },
    /// An answer that is no success.
    #[error("registry {registry} answered {status} for {what}{}{}", message.as_ref().map(|text| format!(": {text}")).unwrap_or_default(), status_hint(*status))]
    Status {
        /// Its address.
        registry: String,
        /// The HTTP status.
        status: u16,
        /// What had been asked for.
        what: String,
        /// What the registry said.
        message: Option<String>,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Bigger than allowed.
    #[error(
        "{what} is larger than {limit} bytes, which is the limit; make the image smaller, or look what answers there"
    )]
    TooLarge {
        /// What.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// More bytes than the manifest says.
    #[error(
        "{what} from registry {registry} is longer than the {expected} bytes that its manifest says; push it again, or mend the registry's storage"
    )]
    TooLong {
        /// Its address.
        registry: String,
        /// Which blob.
        what: String,
        /// The manifest's length.
        expected: u64,
    },
    /// A document that makes no sense.
    #[error("{what} cannot be understood: {reason}; make the image again, or mend what serves it")]
    Malformed {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Other bytes than asked for.
    #[error(
        "{what} from registry {registry} is altered: expected {expected}, got {found}; push it again, or mend the registry's storage"
    )]
    Altered {
        /// Its address.
        registry: String,
        /// A manifest or a configuration.
        what: String,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// The image is not made for this kind of machine.
    #[error("{image} has no variant for linux/amd64, only for {available}; build one, or choose another tag")]
    NoPlatform {
        /// Which image.
        image: String,
        /// What there is.
        available: String,
    },
    /// Something that images may have and this client does not know.
    #[error("{what} is not supported{}", hint.map(|hint| format!("; {hint}")).unwrap_or_default())]
    Unsupported {
        /// What.
        what: String,
        /// What to do about it, where something can be done.
        hint: Option<&'static str>,
    },
}

/// What to do about an answer.
fn status_hint(status: u16) -> &'static str {
    match status {
        429 => "; it limits how often it may be asked: log in, use a mirror, or try again later",
        500..=599 => "; that is its own fault: try again later, or look into its log",
        _ => "",
    }
}

impl RegistryError {
    /// Whether trying again may help.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// How long the server asked to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
