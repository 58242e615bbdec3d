//! What a running pod costs beside its guest's memory, and how large the binaries are.

use std::fs;
use std::path::{Path, PathBuf};

use flint_api::guest::guest_client::GuestClient;
use flint_api::guest::{PORT, StatsRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use crate::host::Host;
use crate::report::Report;
use crate::{Error, Footprint};

pub async fn measure(host: &Host, wanted: &Footprint, report: &mut Report) -> Result<(), Error> {
    for binary in &wanted.binary {
        let name = binary
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        report.amount(format!("size of {name}"), fs::metadata(binary)?.len());
    }
    host.pull(&wanted.image).await?;
    let uid = host
        .start_and_keep(&wanted.image, &["sleep".into(), "1000".into()])
        .await?;
    let measured = of_running(&wanted.run_dir, report).await;
    host.kill(&uid).await?;
    measured
}

async fn of_running(run_dir: &Path, report: &mut Report) -> Result<(), Error> {
    // Links in /proc name whole paths.
    let sandbox = only_sandbox(&fs::canonicalize(run_dir)?)?;
    let pid = vmm_of(&sandbox)?;
    let memory = VmmMemory::read(&fs::read_to_string(format!("/proc/{pid}/smaps"))?)?;
    report.amount("flint-vmm: private memory beside the guest's", memory.own_private);
    report.amount("flint-vmm: share of memory (PSS) beside the guest's", memory.own_share);
    report.amount("guest's memory that is resident", memory.guest_resident);
    report.amount(
        "flint-init: resident in the guest",
        init_resident(&sandbox.join("vsock.sock")).await?,
    );
    Ok(())
}

fn only_sandbox(run_dir: &Path) -> Result<PathBuf, Error> {
    let mut sandboxes = fs::read_dir(run_dir.join("sandboxes"))?.map(|entry| entry.map(|entry| entry.path()));
    match (sandboxes.next().transpose()?, sandboxes.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err("no sandbox is running".into()),
        _ => Err("other pods are running; measure on a host without any".into()),
    }
}

/// The process whose stderr is the sandbox's log.
fn vmm_of(sandbox: &Path) -> Result<i32, Error> {
    let log = sandbox.join("vmm.log");
    let is_vmm = |pid: &i32| fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|file| file == log);
    let pids = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let found = pids.filter(is_vmm).last();
    found.ok_or_else(|| format!("no process has {} as its stderr", log.display()).into())
}

/// A VMM's memory, by whose it is: the guest's is the largest mapping.
#[derive(Debug, PartialEq, Eq)]
pub struct VmmMemory {
    pub own_private: u64,
    pub own_share: u64,
    pub guest_private: u64,
    pub guest_share: u64,
    pub guest_resident: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Mapping {
    size: u64,
    rss: u64,
    pss: u64,
    private: u64,
}

impl VmmMemory {
    /// From `/proc/PID/smaps` (proc(5)).
    pub fn read(smaps: &str) -> Result<Self, Error> {
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), value) = (words.next(), words.next()) else {
                continue;
            };
            if !key.ends_with(':') {
                mappings.push(Mapping::default());
                continue;
            }
            let bytes = value.and_then(|value| value.parse::<u64>().ok()).unwrap_or_default() * 1024;
            let Some(mapping) = mappings.last_mut() else { continue };
            match key {
                "Size:" => mapping.size = bytes,
                "Rss:" => mapping.rss = bytes,
                "Pss:" => mapping.pss = bytes,
                "Private_Dirty:" | "Private_Clean:" => mapping.private += bytes,
                _ => {}
            }
        }
        let guest = *mappings
            .iter()
            .max_by_key(|mapping| mapping.size)
            .ok_or("the VMM has no memory")?;
        let sum = |of: fn(&Mapping) -> u64| mappings.iter().map(of).sum::<u64>() - of(&guest);
        Ok(Self {
            own_private: sum(|m| m.private),
            own_share: sum(|m| m.pss),
            guest_private: guest.private,
            guest_share: guest.pss,
            guest_resident: guest.rss,
        })
    }
}

/// Asks flint-init itself.
async fn init_resident(socket: &Path) -> Result<u64, Error> {
    let mut stream = BufReader::new(UnixStream::connect(socket).await?);
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_line(&mut answer).await?;
    if !answer.starts_with("OK ") {
        return Err(format!("the guest refused the connection: {answer:?}").into());
    }
    // Nothing was read ahead: the guest's server speaks only after its client.
    let mut stream = Some(stream.into_inner());
    let connector = tower::service_fn(move |_: Uri| {
        let stream = stream.take();
        async move {
            stream
                .map(TokioIo::new)
                .ok_or_else(|| std::io::Error::other("connected once"))
        }
    });
    let channel = Endpoint::from_static("http://flint-init")
        .connect_with_connector(connector)
        .await?;
    Ok(GuestClient::new(channel)
        .stats(StatsRequest {})
        .await?
        .into_inner()
        .init_rss_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_not_counted_as_the_vmms() {
        let smaps = "\
5600-5700 r-xp 00000000 fe:00 1 /usr/bin/flint-vmm
Size:                100 kB
Rss:                  80 kB
Pss:                  40 kB
Private_Clean:         8 kB
Private_Dirty:         0 kB
7f00-8f00 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               50000 kB
Pss:               50000 kB
Private_Clean:         0 kB
Private_Dirty:     50000 kB
9000-9100 rw-p 00000000 00:00 0 [heap]
Size:                200 kB
Rss:                 120 kB
Pss:                 120 kB
Private_Clean:         0 kB
Private_Dirty:       120 kB
";
        let memory = VmmMemory::read(smaps).unwrap();

        let expected = VmmMemory {
            own_private: 128 << 10,
            own_share: 160 << 10,
            guest_private: 50_000 << 10,
            guest_share: 50_000 << 10,
            guest_resident: 50_000 << 10,
        };
        assert_eq!(memory, expected);
        assert!(VmmMemory::read("").is_err());
    }
}
