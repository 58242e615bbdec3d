//! Figures of the guest, of flint-init and of the containers.

use std::fs;

use flint_api::guest::{ContainerStats, StatsResponse};

use crate::container::{Container, Containers};

/// All figures now; 0 where the kernel gives none.
pub fn collect(containers: &Containers) -> StatsResponse {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    StatsResponse {
        init_rss_bytes: kibibytes(&status, "VmRSS:"),
        memory_total_bytes: kibibytes(&memory, "MemTotal:"),
        memory_available_bytes: kibibytes(&memory, "MemAvailable:"),
        containers: containers.all().iter().map(|container| of(container)).collect(),
    }
}

/// The guest's memory in bytes.
pub fn memory_total() -> u64 {
    kibibytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal:")
}

/// Bytes of files in memory that the kernel would reclaim first.
pub fn inactive_files() -> u64 {
    kibibytes(
        &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        "Inactive(file):",
    )
}

fn of(container: &Container) -> ContainerStats {
    let number = |file| container.cgroup.number(file).unwrap_or(0);
    ContainerStats {
        container_id: container.id.to_string(),
        cpu_usage_us: container.cgroup.keyed("cpu.stat", "usage_usec").unwrap_or(0),
        memory_current_bytes: number("memory.current"),
        memory_peak_bytes: number("memory.peak"),
        pids_current: number("pids.current"),
    }
}

/// proc(5)'s "Name:   123 kB" lines.
fn kibibytes(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let number = value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    number.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_their_whole_name() {
        let text = "MemTotal:         204800 kB\nMemAvailable:     1024 kB\nVmRSS:\t    7 kB\nHugePages_Total:  0\n";
        assert_eq!(kibibytes(text, "MemTotal:"), 204_800 * 1024);
        assert_eq!(kibibytes(text, "VmRSS:"), 7 * 1024);
        assert_eq!(kibibytes(text, "HugePages_Total:"), 0);
        assert_eq!(kibibytes("VmRSS: 99999999999999999999 kB", "VmRSS:"), 0);
    }

    #[test]
    fn this_process_has_memory() {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        assert!(kibibytes(&status, "VmRSS:") > 0);
    }
}
