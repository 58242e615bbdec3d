//! How large a pod's sandbox is, and whether it still fits on this host.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use flint_api::host::{self, Amounts};
use thiserror::Error;

/// vCPUs that a sandbox can have.
const MAX_VCPUS: u64 = 32;
/// Guest memory comes in pieces of this size.
const MEMORY_STEP: u64 = 2 << 20;

/// What the host decides about sizes.
#[derive(Clone, Debug)]
pub struct Sizing {
    /// Guest memory beyond what the containers may use: guest kernel, flint-init, page tables.
    pub overhead_bytes: u64,
    /// Memory for all containers of a pod that have neither limit nor request.
    pub default_memory_bytes: u64,
    /// Writable disk of a pod that does not say.
    pub default_scratch_bytes: u64,
    /// More vCPUs than the host has CPUs would only wait for one another.
    pub host_cpus: u64,
}

/// What a pod takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// vCPUs of the sandbox.
    pub vcpus: u32,
    /// Memory of the sandbox.
    pub memory_bytes: u64,
    /// Size of its writable disk.
    pub scratch_bytes: u64,
    /// What admission counts: the sum of requests, as a kubelet does.
    pub cpu_milli: u64,
}

impl Sizing {
    /// The size of a pod's sandbox.
    pub fn of(&self, spec: &host::PodSpec) -> Size {
        let (mut limit_milli, mut cpu_milli, mut memory, mut unbounded) = (0_u64, 0_u64, 0_u64, false);
        for container in &spec.containers {
            let resources = container.resources.unwrap_or_default();
            limit_milli = limit_milli.saturating_add(resources.cpu_limit_milli);
            cpu_milli = cpu_milli.saturating_add(first_set(resources.cpu_request_milli, resources.cpu_limit_milli));
            memory = memory.saturating_add(first_set(resources.memory_limit_bytes, resources.memory_request_bytes));
            unbounded |= resources.memory_limit_bytes == 0 && resources.memory_request_bytes == 0;
        }
        if unbounded {
            memory = memory.saturating_add(self.default_memory_bytes);
        }
        let memory = memory.saturating_add(self.overhead_bytes);
        let vcpus = limit_milli
            .div_ceil(1000)
            .clamp(1, MAX_VCPUS.min(self.host_cpus.max(1)));
        Size {
            vcpus: u32::try_from(vcpus).unwrap_or(1),
            memory_bytes: memory.checked_next_multiple_of(MEMORY_STEP).unwrap_or(u64::MAX),
            scratch_bytes: first_set(spec.scratch_bytes, self.default_scratch_bytes),
            cpu_milli,
        }
    }
}

fn first_set(first: u64, second: u64) -> u64 {
    if first == 0 { second } else { first }
}

/// The pod does not fit.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{reason}: the pod needs {needed} {unit}, {free} of {allocatable} are free on this host")]
pub struct Shortage {
    /// As a kubelet's admission says it: `OutOfcpu`, `OutOfmemory`, `OutOfpods`.
    pub reason: &'static str,
    unit: &'static str,
    needed: u64,
    free: u64,
    allocatable: u64,
}

/// Who has how much of the host.
#[derive(Debug)]
pub struct Ledger {
    allocatable: Amounts,
    taken: Mutex<HashMap<String, Size>>,
}

impl Ledger {
    /// Nothing is taken yet.
    pub fn new(allocatable: Amounts) -> Self {
        Self {
            allocatable,
            taken: Mutex::default(),
        }
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<String, Size>> {
        // Every change under the lock is one infallible step.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What pods may use.
    pub fn allocatable(&self) -> Amounts {
        self.allocatable
    }

    /// What they use.
    pub fn allocated(&self) -> Amounts {
        sum(&self.taken())
    }

    /// Takes room for a pod, or says what is short.
    pub fn take(&self, uid: &str, size: Size) -> Result<(), Shortage> {
        let mut taken = self.taken();
        let used = sum(&taken);
        let checks = [
            (
                "OutOfpods",
                "pods",
                1,
                u64::from(used.pods),
                u64::from(self.allocatable.pods),
            ),
            (
                "OutOfcpu",
                "thousandths of a CPU",
                size.cpu_milli,
                used.cpu_milli,
                self.allocatable.cpu_milli,
            ),
            (
                "OutOfmemory",
                "bytes of memory",
                size.memory_bytes,
                used.memory_bytes,
                self.allocatable.memory_bytes,
            ),
        ];
        for (reason, unit, needed, used, allocatable) in checks {
            let free = allocatable.saturating_sub(used);
            if needed > free {
                return Err(Shortage {
                    reason,
                    unit,
                    needed,
                    free,
                    allocatable,
                });
            }
        }
        taken.insert(uid.to_owned(), size);
        Ok(())
    }

    /// Takes room for a pod that runs already.
    pub fn retake(&self, uid: &str, size: Size) {
        self.taken().insert(uid.to_owned(), size);
    }

    /// Gives a pod's room back.
    pub fn release(&self, uid: &str) {
        self.taken().remove(uid);
    }
}

fn sum(taken: &HashMap<String, Size>) -> Amounts {
    taken.values().fold(Amounts::default(), |sum, size| Amounts {
        cpu_milli: sum.cpu_milli.saturating_add(size.cpu_milli),
        memory_bytes: sum.memory_bytes.saturating_add(size.memory_bytes),
        scratch_bytes: sum.scratch_bytes.saturating_add(size.scratch_bytes),
        pods: sum.pods.saturating_add(1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sizing() -> Sizing {
        Sizing {
            overhead_bytes: 64 * MIB,
            default_memory_bytes: 256 * MIB,
            default_scratch_bytes: 1024 * MIB,
            host_cpus: 8,
        }
    }

    fn spec(resources: &[host::Resources]) -> host::PodSpec {
        let container = |resources: &host::Resources| host::Container {
            resources: Some(*resources),
            ..Default::default()
        };
        host::PodSpec {
            containers: resources.iter().map(container).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_one_vcpu_and_the_default_memory() {
        let size = sizing().of(&spec(&[host::Resources::default(), host::Resources::default()]));
        let expected = Size {
            vcpus: 1,
            memory_bytes: 320 * MIB,
            scratch_bytes: 1024 * MIB,
            cpu_milli: 0,
        };
        assert_eq!(size, expected);
    }

    #[test]
    fn limits_make_the_sandbox_and_requests_are_what_is_counted() {
        let limits = host::Resources {
            cpu_request_milli: 500,
            cpu_limit_milli: 1500,
            memory_request_bytes: 10 * MIB,
            memory_limit_bytes: 100 * MIB + 1,
        };
        let size = sizing().of(&spec(&[limits, limits]));
        assert_eq!((size.vcpus, size.cpu_milli, size.memory_bytes), (3, 1000, 266 * MIB));
        let huge = host::Resources {
            cpu_limit_milli: u64::MAX,
            memory_limit_bytes: u64::MAX,
            ..Default::default()
        };
        let size = sizing().of(&spec(&[huge, huge]));
        assert_eq!((size.vcpus, size.memory_bytes), (8, u64::MAX));
    }

    #[test]
    fn a_pod_that_does_not_fit_is_told_what_is_short_and_takes_nothing() {
        let ledger = Ledger::new(Amounts {
            cpu_milli: 1000,
            memory_bytes: 1000 * MIB,
            scratch_bytes: 0,
            pods: 3,
        });
        let size = Size {
            vcpus: 1,
            memory_bytes: 600 * MIB,
            scratch_bytes: 0,
            cpu_milli: 400,
        };
        ledger.take("a", size).unwrap();
        assert_eq!(ledger.take("b", size).unwrap_err().reason, "OutOfmemory");
        assert_eq!(
            ledger.take("b", Size { cpu_milli: 601, ..size }).unwrap_err().reason,
            "OutOfcpu"
        );
        assert_eq!(ledger.allocated().memory_bytes, 600 * MIB);
        ledger.release("a");
        ledger.take("b", size).unwrap();
        for uid in ["c", "d"] {
            ledger
                .take(
                    uid,
                    Size {
                        memory_bytes: 0,
                        cpu_milli: 0,
                        ..size
                    },
                )
                .unwrap();
        }
        assert_eq!(
            ledger
                .take(
                    "e",
                    Size {
                        memory_bytes: 0,
                        cpu_milli: 0,
                        ..size
                    }
                )
                .unwrap_err()
                .reason,
            "OutOfpods"
        );
    }
}
