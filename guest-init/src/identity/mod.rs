//! AdoptIdentity: everything that must differ between two machines that started from the same state.
//!
//! The randomness comes first: whatever is drawn later must already be this machine's own. Each step's error says which
//! step it was; a half adopted identity leaves the machine without containers, since none can be created before it succeeds.
//!
//! A clone adopts an identity again, over that of its template: what the former left behind goes.

mod clock;
mod connections;
mod files;
mod network;
mod sysctl;

use std::{fs::OpenOptions, io, os::fd::AsFd, path::Path, time::Duration};

use flint_api::guest::AdoptIdentityRequest;
use nix::errno::Errno;
use tonic::Status;

pub use network::bring_up_loopback;

use crate::{error_chain::chain, sys};

/// Least entropy that makes two clones of one machine differ for certain.
const MIN_ENTROPY: usize = 32;
/// More than the kernel's pool holds is of no use.
const MAX_ENTROPY: usize = 4096;

/// Which step of adopting an identity failed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The request itself is wrong.
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
    /// The kernel did not take the seed.
    #[error("reseeding the kernel's random number generator")]
    Random(#[source] io::Error),
    /// The clock could not be set.
    #[error("setting the clock")]
    Clock(#[source] Errno),
    /// The host name could not be set.
    #[error("setting the host name to {name:?}")]
    Hostname {
        name: String,
        #[source]
        source: Errno,
    },
    /// One of the files in /etc could not be written.
    #[error("writing {path}")]
    File {
        path: String,
        #[source]
        source: io::Error,
    },
    /// A network interface.
    #[error("network interface {interface}: {step}")]
    Network {
        interface: String,
        step: String,
        #[source]
        source: network::LinkError,
    },
    /// The former machine's connections.
    #[error("ending the connections of the machine that this one was cloned from")]
    Connections(#[source] io::Error),
    /// A kernel parameter.
    #[error("setting kernel parameter {name} to {value:?}")]
    Sysctl {
        name: String,
        value: String,
        #[source]
        source: io::Error,
    },
}

impl IdentityError {
    fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            problem: problem.into(),
        }
    }
}

impl From<IdentityError> for Status {
    fn from(error: IdentityError) -> Self {
        let text = format!("adopting the identity: {}", chain(&error));
        match error {
            IdentityError::Invalid { .. } => Self::invalid_argument(text),
            _ => Self::internal(text),
        }
    }
}

/// Makes this machine the one that `request` describes.
pub async fn adopt(request: &AdoptIdentityRequest) -> Result<(), IdentityError> {
    files::check(request)?;
    let interfaces = network::parse(&request.interfaces)?;
    let sysctls = sysctl::parse(&request.sysctls)?;
    reseed(&request.entropy)?;
    clock::set(Duration::from_nanos(request.realtime_ns)).map_err(IdentityError::Clock)?;
    nix::unistd::sethostname(&request.hostname).map_err(|source| IdentityError::Hostname {
        name: request.hostname.clone(),
        source,
    })?;
    let addresses: Vec<_> = interfaces.iter().flat_map(network::Plan::addresses).collect();
    files::write(request, &addresses)?;
    // Before the network, so that net.* holds for interfaces that come up; after it they would miss conf.default.
    sysctls.apply()?;
    let links = network::take_down(&interfaces).await?;
    if interfaces.iter().any(network::Plan::is_of_clone) {
        // While nothing that they send has a way out.
        connections::end_all().map_err(IdentityError::Connections)?;
    }
    network::configure(&links).await
}

fn reseed(entropy: &[u8]) -> Result<(), IdentityError> {
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy.len()) {
        let problem = format!("{} bytes; {MIN_ENTROPY} to {MAX_ENTROPY} are needed", entropy.len());
        return Err(IdentityError::invalid("entropy", problem));
    }
    let random = OpenOptions::new()
        .write(true)
        .open(Path::new("/dev/urandom"))
        .map_err(IdentityError::Random)?;
    sys::add_entropy(random.as_fd(), entropy).map_err(IdentityError::Random)
}

/// Which start of this machine an identity is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation([u8; 16]);

impl Generation {
    /// Checks what a request says; none is said by an empty one.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, IdentityError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let problem = || format!("{} bytes; a generation has 16", bytes.len());
        let id = bytes
            .try_into()
            .map_err(|_| IdentityError::invalid("generation", problem()))?;
        Ok(Some(Self(id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_has_16_bytes_or_none() {
        assert_eq!(Generation::parse(&[]).unwrap(), None);
        assert_eq!(Generation::parse(&[7; 16]).unwrap(), Some(Generation([7; 16])));
        let error = Generation::parse(&[7; 15]).unwrap_err();
        assert_eq!(error.to_string(), "generation: 15 bytes; a generation has 16");
    }

    #[test]
    fn too_little_entropy_is_refused_before_the_kernel_is_asked() {
        let error = reseed(&[0; 31]).unwrap_err();
        assert!(error.to_string().contains("31 bytes"), "{error}");
    }
}
