//! The host itself: what it is and holds, who may change it.

use std::{
    fs, io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use flint_api::host::{Amounts, HostInfo, Lease};
use thiserror::Error;

use crate::{
    pods::{journal::Journal, system_time, timestamp},
    store::{Change, HostState},
};

/// Shortest and longest time that a lease can be asked for.
const LEASE_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));

/// What is kept back from pods.
#[derive(Clone, Copy, Debug)]
pub struct Reserve {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// Most pods.
    pub pods: u32,
}

/// Describes this machine: what does not change while it runs. What KVM it has may change, and is not told here.
pub fn describe(state: &Path, reserve: Reserve) -> io::Result<HostInfo> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let cpus = std::thread::available_parallelism()?.get() as u64;
    let memory = mem_total(&read("/proc/meminfo")?);
    let scratch = nix::sys::statvfs::statvfs(state)?;
    let capacity = Amounts {
        cpu_milli: cpus * 1000,
        memory_bytes: memory,
        scratch_bytes: scratch.blocks().saturating_mul(scratch.fragment_size()),
        pods: reserve.pods,
    };
    let model = read("/proc/cpuinfo")?;
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(HostInfo {
        boot_id: read("/proc/sys/kernel/random/boot_id")?,
        hostname: read("/proc/sys/kernel/hostname")?,
        version: env!("CARGO_PKG_VERSION").into(),
        kernel_version: read("/proc/sys/kernel/osrelease")?,
        cpu_model: model.map_or_else(String::new, |(_, name)| name.to_owned()),
        allocatable: Some(Amounts {
            cpu_milli: capacity.cpu_milli.saturating_sub(reserve.cpu_milli),
            memory_bytes: capacity.memory_bytes.saturating_sub(reserve.memory_bytes),
            ..capacity
        }),
        capacity: Some(capacity),
        ..HostInfo::default()
    })
}

/// `MemTotal` of /proc/meminfo, which is in KiB.
fn mem_total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// A writer was refused.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// Somebody else holds the lease.
    #[error("the lease of this host is held by {holder:?} for another {} s", .remaining.as_secs())]
    Held {
        /// Who.
        holder: String,
        /// For how long.
        remaining: Duration,
    },
    /// The caller's epoch is not the present one.
    #[error("lease epoch {given} is not the present one, {present}: acquire the lease again")]
    Lost {
        /// The request's.
        given: u64,
        /// The host's.
        present: u64,
    },
    /// The store failed.
    #[error("{0}")]
    Store(String),
}

/// Lease and drain: the host's own state, durable before it counts.
#[derive(Debug)]
pub struct HostControl {
    journal: Journal,
    state: Mutex<HostState>,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

impl HostControl {
    /// As an earlier flintd left it.
    pub fn new(journal: Journal, state: HostState) -> Self {
        Self {
            journal,
            state: Mutex::new(state),
            turn: tokio::sync::Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, HostState> {
        // Replaced as a whole, so a panic elsewhere leaves it consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether new pods are refused.
    pub fn draining(&self) -> bool {
        self.state().draining
    }

    /// Refuses a writer whose epoch is not the present one. Until a lease was taken, every epoch is 0.
    pub fn check(&self, epoch: u64) -> Result<(), LeaseError> {
        let present = self.state().lease_epoch;
        if epoch == present {
            Ok(())
        } else {
            Err(LeaseError::Lost { given: epoch, present })
        }
    }

    /// Takes or renews the lease.
    pub async fn acquire(&self, holder: &str, lasting: Duration, now: SystemTime) -> Result<Lease, LeaseError> {
        let _turn = self.turn.lock().await;
        let mut state = self.state().clone();
        let lasting = lasting.clamp(LEASE_BOUNDS.0, LEASE_BOUNDS.1);
        let remaining = state
            .lease_until
            .and_then(|until| system_time(until).duration_since(now).ok())
            .unwrap_or_default();
        if state.lease_epoch == 0 || state.lease_holder != holder {
            if !remaining.is_zero() {
                return Err(LeaseError::Held {
                    holder: state.lease_holder,
                    remaining,
                });
            }
            state.lease_epoch += 1;
            state.lease_holder = holder.to_owned();
        }
        state.lease_until = Some(timestamp(now + lasting));
        self.keep(state.clone()).await?;
        Ok(Lease {
            holder: state.lease_holder,
            epoch: state.lease_epoch,
            remaining: prost_types::Duration::try_from(lasting).ok(),
        })
    }

    /// Stops or resumes taking pods.
    pub async fn drain(&self, draining: bool) -> Result<(), LeaseError> {
        let _turn = self.turn.lock().await;
        let state = HostState {
            draining,
            ..self.state().clone()
        };
        self.keep(state).await
    }

    async fn keep(&self, state: HostState) -> Result<(), LeaseError> {
        self.journal
            .commit(Change::Host(state.clone()))
            .await
            .map_err(LeaseError::Store)?;
        *self.state() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    fn control(folder: &tempfile::TempDir) -> (HostControl, std::thread::JoinHandle<()>) {
        let store = Store::open(&folder.path().join("state.redb")).unwrap();
        let loaded = store.load().unwrap();
        let (journal, thread) = Journal::start(store, &loaded).unwrap();
        (HostControl::new(journal, loaded.host), thread)
    }

    #[tokio::test]
    async fn a_lease_fences_older_writers_even_over_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let (host, thread) = control(&folder);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let (minute, second) = (Duration::from_secs(60), Duration::from_secs(1));
        host.check(0).unwrap();
        let first = host.acquire("a", minute, now).await.unwrap();
        assert_eq!(
            host.acquire("a", minute, now + second).await.unwrap().epoch,
            first.epoch
        );
        assert!(matches!(
            host.acquire("b", minute, now + second).await,
            Err(LeaseError::Held { .. })
        ));
        assert!(matches!(host.check(0), Err(LeaseError::Lost { given: 0, present: 1 })));
        let second = host.acquire("b", minute, now + minute * 2).await.unwrap();
        assert!(second.epoch > first.epoch);
        drop(host);
        thread.join().unwrap();
        let (host, _thread) = control(&folder);
        assert!(host.check(first.epoch).is_err());
        host.check(second.epoch).unwrap();
        assert!(host.check(second.epoch + 1).is_err());
    }

    #[test]
    fn this_machine_can_be_described() {
        let reserve = Reserve {
            cpu_milli: 100,
            memory_bytes: 1 << 20,
            pods: 7,
        };
        let info = describe(Path::new("/"), reserve).unwrap();
        let (capacity, allocatable) = (info.capacity.unwrap(), info.allocatable.unwrap());
        assert!(capacity.memory_bytes > 64 << 20);
        assert_eq!(capacity.cpu_milli - allocatable.cpu_milli, 100);
        assert_eq!(info.boot_id.len(), 36);
    }
}
