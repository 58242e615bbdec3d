//! How registries are reached.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the client needs to know beside a reference.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Peculiarities of registries, by host as it stands in references ("docker.io", "registry.example:5000").
    pub hosts: BTreeMap<String, HostConfig>,
    /// Certificates (PEM) to trust beside the system's.
    pub extra_ca: Option<PathBuf>,
    /// A docker `config.json` whose `auths` serve pulls that bring no credentials; absent: `~/.docker/config.json`.
    pub docker_config: Option<PathBuf>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// How often to try again.
    pub retries: Retries,
    /// How big things may be.
    pub limits: Limits,
    /// Layers of one image that are fetched at the same time.
    pub parallel_layers: usize,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            hosts: BTreeMap::new(),
            extra_ca: None,
            docker_config: None,
            timeouts: Timeouts::default(),
            retries: Retries::default(),
            limits: Limits::default(),
            parallel_layers: 4,
        }
    }
}

/// A registry's peculiarities.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// Whether to speak plain HTTP. Absent: only with this machine's loopback.
    pub plain_http: Option<bool>,
    /// Asked first, in this order: "mirror.example:5000" or `https://mirror.example/prefix`. What they deliver is checked
    /// like everything else. They get no credentials but those that the docker configuration has for them.
    pub mirrors: Vec<String>,
}

/// How long to wait for what.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// From sending a request to the head of its answer, connecting included.
    pub first_byte: Duration,
    /// Between two pieces of an answer.
    pub stall: Duration,
    /// For a whole pull; nothing lasts longer.
    pub deadline: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(20),
            stall: Duration::from_secs(15),
            deadline: Duration::from_secs(30 * 60),
        }
    }
}

/// How often to try again after a fault that may pass, and how long to wait in between: a random time up to the base,
/// doubled with each attempt, never beyond the maximum; longer if the server asks for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retries {
    /// Attempts without progress, the first included.
    pub attempts: u32,
    /// Before the second attempt.
    pub base: Duration,
    /// At most, also where a server asks for more.
    pub max: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            attempts: 5,
            base: Duration::from_millis(200),
            max: Duration::from_secs(10),
        }
    }
}

impl Retries {
    /// How long to wait after attempt number `failed` (from 1) failed.
    pub(crate) fn pause(&self, failed: u32, asked: Option<Duration>) -> Duration {
        let ceiling = self
            .base
            .saturating_mul(1 << failed.saturating_sub(1).min(16))
            .min(self.max);
        let jittered = ceiling.mul_f64(0.5 + fastrand::f64() / 2.0);
        asked.map_or(jittered, |asked| asked.max(jittered).min(self.max))
    }
}

/// How big things may be that others publish.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// A manifest, an index, a token answer. 4 MiB is what the distribution specification asks registries to accept.
    pub manifest_bytes: u64,
    /// An image configuration.
    pub config_bytes: u64,
    /// Layers of an image.
    pub layers: usize,
    /// A compressed layer.
    pub layer_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            layers: 512,
            layer_bytes: 64 << 30,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_maximum_and_a_server_may_ask_for_that_much() {
        let retries = Retries::default();
        for _ in 0..100 {
            assert!(retries.pause(1, None) <= retries.base);
            assert!(retries.pause(1, None) >= retries.base / 2);
            assert!(retries.pause(30, None) <= retries.max);
            assert_eq!(retries.pause(1, Some(Duration::from_secs(3))), Duration::from_secs(3));
            assert_eq!(retries.pause(1, Some(Duration::from_secs(3600))), retries.max);
        }
    }
}
