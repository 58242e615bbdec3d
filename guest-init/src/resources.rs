//! SetResources: vCPUs that were there but off, and memory that the VMM plugs.
//!
//! - vCPUs: all are in the ACPI tables, and `maxcpus=1` leaves all but the first where a processor is that was never started.
//!   Onlining one sends it its start signal.
//! - Memory: virtio-mem's driver plugs by itself what the VMM asks for, in the background; the kernel onlines each block as it
//!   comes and tells by a uevent. Of a last block that is to be plugged in part that part comes with the block.

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use flint_api::guest::{SetResourcesRequest, SetResourcesResponse};
use tonic::Status;

use crate::{error_chain::chain, stats, uevent::Uevents};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
const RESOURCES: &str = "/proc/iomem";
/// What virtio-mem's driver calls its memory there.
const PLUGGED: &str = "System RAM (virtio_mem)";
/// How long the next block of memory may take; an idle machine does hundreds in a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why the machine does not have what it was to have.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// More than the machine has.
    #[error("online_vcpus is {wanted}: this machine has {present}")]
    Vcpus { wanted: u32, present: u32 },
    /// A vCPU does not come or go.
    #[error("taking vCPU {vcpu} {direction}")]
    Online {
        vcpu: u32,
        direction: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel said nothing for too long.
    #[error("{online} of {wanted} bytes are plugged, and no more came for {} s", PATIENCE.as_secs())]
    Stuck { online: u64, wanted: u64 },
    /// The kernel does not say.
    #[error("reading {path}", path = .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The kernel does not say what it says.
    #[error("{path} does not read as expected: {text:?}", path = .path.display())]
    Format { path: PathBuf, text: String },
    /// Events.
    #[error("waiting for memory")]
    Events(#[source] io::Error),
}

impl From<ResourceError> for Status {
    fn from(error: ResourceError) -> Self {
        let text = format!("setting resources: {}", chain(&error));
        match error {
            ResourceError::Vcpus { .. } => Self::invalid_argument(text),
            ResourceError::Stuck { .. } => Self::deadline_exceeded(text),
            _ => Self::internal(text),
        }
    }
}

type Outcome<T> = Result<T, ResourceError>;

/// Does what is asked and says what the machine has then.
pub async fn set(request: &SetResourcesRequest) -> Outcome<SetResourcesResponse> {
    let cpus = Path::new(CPUS);
    if request.online_vcpus > 0 {
        set_vcpus(cpus, request.online_vcpus)?;
    }
    if request.plugged_memory_bytes > 0 {
        wait_for_memory(request.plugged_memory_bytes).await?;
    }
    let online = count(&listed(&cpus.join("online"))?);
    let memory_total_bytes = stats::memory_total();
    Ok(SetResourcesResponse {
        online_vcpus: online,
        memory_total_bytes,
    })
}

fn set_vcpus(cpus: &Path, wanted: u32) -> Outcome<()> {
    let present = listed(&cpus.join("present"))?;
    if wanted > count(&present) {
        let present = count(&present);
        return Err(ResourceError::Vcpus { wanted, present });
    }
    let online = listed(&cpus.join("online"))?;
    let is_online = |vcpu| online.iter().any(|range| range.contains(&vcpu));
    // vCPUs are numbered without gaps from 0, which cannot be taken offline.
    for vcpu in 1..count(&present) {
        let (value, direction) = if vcpu < wanted {
            ("1", "online")
        } else {
            ("0", "offline")
        };
        if is_online(vcpu) == (vcpu < wanted) {
            continue;
        }
        fs::write(cpus.join(format!("cpu{vcpu}/online")), value).map_err(|source| ResourceError::Online {
            vcpu,
            direction,
            source,
        })?;
    }
    Ok(())
}

async fn wait_for_memory(wanted: u64) -> Outcome<()> {
    let events = Uevents::listen().map_err(ResourceError::Events)?;
    let block = block_size(Path::new(MEMORY))?;
    loop {
        let online = plugged(Path::new(MEMORY), &read(Path::new(RESOURCES))?, block)?;
        if online >= wanted {
            return Ok(());
        }
        match tokio::time::timeout(PATIENCE, events.wait_for("SUBSYSTEM=memory")).await {
            Ok(event) => drop(event.map_err(ResourceError::Events)?),
            Err(_) => return Err(ResourceError::Stuck { online, wanted }),
        }
    }
}

/// Bytes of virtio-mem's memory that are online. `resources` is what /proc/iomem says.
fn plugged(memory: &Path, resources: &str, block: u64) -> Outcome<u64> {
    let mut online = 0;
    for Range { start, end } in resources.lines().filter_map(plugged_range) {
        for number in start / block..end / block {
            let state = memory.join(format!("memory{number}/state"));
            // A block that is just being added has no folder yet.
            if fs::read_to_string(state).is_ok_and(|state| state.trim_end() == "online") {
                online += block;
            }
        }
    }
    Ok(online)
}

/// "4000000000-400fffffff : System RAM (virtio_mem)", at any depth.
fn plugged_range(line: &str) -> Option<Range<u64>> {
    let (range, name) = line.trim_start().split_once(" : ")?;
    let (start, last) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    (name == PLUGGED).then_some(address(start)?..address(last)?.checked_add(1)?)
}

fn block_size(memory: &Path) -> Outcome<u64> {
    let path = memory.join("block_size_bytes");
    let text = read(&path)?;
    let size = u64::from_str_radix(text.trim_end(), 16).ok().filter(|size| *size > 0);
    size.ok_or(ResourceError::Format { path, text })
}

/// A list of CPUs, "0-3,7".
fn listed(path: &Path) -> Outcome<Vec<Range<u32>>> {
    let text = read(path)?;
    let parse = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..last.parse::<u32>().ok()?.checked_add(1)?)
    };
    let ranges = text.trim_end().split(',').map(parse).collect();
    Option::ok_or_else(ranges, || ResourceError::Format {
        path: path.to_owned(),
        text,
    })
}

fn count(ranges: &[Range<u32>]) -> u32 {
    // Overlapping ranges are none that the kernel prints.
    ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum()
}

fn read(path: &Path) -> Outcome<String> {
    fs::read_to_string(path).map_err(|source| ResourceError::Read {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 128 << 20;

    /// A machine of four vCPUs of which the first two are online.
    fn four_vcpus() -> tempfile::TempDir {
        let cpus = tempfile::tempdir().unwrap();
        fs::write(cpus.path().join("present"), "0-3\n").unwrap();
        fs::write(cpus.path().join("online"), "0-1\n").unwrap();
        for vcpu in 1..4 {
            fs::create_dir(cpus.path().join(format!("cpu{vcpu}"))).unwrap();
            fs::write(cpus.path().join(format!("cpu{vcpu}/online")), "-").unwrap();
        }
        cpus
    }

    fn written(cpus: &tempfile::TempDir) -> String {
        (1..4)
            .map(|vcpu| fs::read_to_string(cpus.path().join(format!("cpu{vcpu}/online"))).unwrap())
            .collect()
    }

    #[test]
    fn only_vcpus_that_change_are_touched() {
        let cpus = four_vcpus();
        set_vcpus(cpus.path(), 3).unwrap();
        assert_eq!(written(&cpus), "-1-");
        let cpus = four_vcpus();
        set_vcpus(cpus.path(), 1).unwrap();
        assert_eq!(written(&cpus), "0--");
    }

    #[test]
    fn more_vcpus_than_there_are_is_an_error_that_says_how_many_there_are() {
        let cpus = four_vcpus();
        let error = set_vcpus(cpus.path(), 5).unwrap_err();
        assert_eq!(error.to_string(), "online_vcpus is 5: this machine has 4");
        assert_eq!(written(&cpus), "---");
        fs::write(cpus.path().join("present"), "nonsense\n").unwrap();
        assert!(matches!(set_vcpus(cpus.path(), 2), Err(ResourceError::Format { .. })));
    }

    #[test]
    fn only_online_blocks_of_virtio_mem_count() {
        let memory = tempfile::tempdir().unwrap();
        let first = (1u64 << 38) / BLOCK;
        for (number, state) in [
            (0, "online"),
            (first, "online"),
            (first + 1, "going-offline"),
            (first + 2, "online"),
        ] {
            fs::create_dir(memory.path().join(format!("memory{number}"))).unwrap();
            fs::write(
                memory.path().join(format!("memory{number}/state")),
                format!("{state}\n"),
            )
            .unwrap();
        }
        let resources = "00001000-0009ffff : System RAM\n\
            00100000-0fffffff : System RAM\n\
            4000000000-407fffffff : virtio5\n\
            \u{20} 4000000000-401fffffff : System RAM (virtio_mem)\n";
        assert_eq!(plugged(memory.path(), resources, BLOCK).unwrap(), 2 * BLOCK);
        assert_eq!(plugged(memory.path(), "", BLOCK).unwrap(), 0);
    }

    #[test]
    fn the_block_size_is_hexadecimal() {
        let memory = tempfile::tempdir().unwrap();
        let path = memory.path().join("block_size_bytes");
        fs::write(&path, "8000000\n").unwrap();
        assert_eq!(block_size(memory.path()).unwrap(), BLOCK);
        fs::write(&path, "0\n").unwrap();
        assert!(matches!(block_size(memory.path()), Err(ResourceError::Format { .. })));
    }
}
