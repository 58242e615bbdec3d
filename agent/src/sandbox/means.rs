//! What this host gives to every sandbox: names, user ids, cgroups, addresses and taps, scratch disks.

use std::{net::Ipv4Addr, os::fd::OwnedFd, path::PathBuf, sync::Arc};

use flint_api::guest::Interface;

use super::{
    Config, DiskSource, DiskSpec, SandboxError, SandboxSpec, blocking, file_error,
    intent::{Folder, Intent},
    manager::spec_error,
    pages::PageServers,
    shell::{DiskFds, ShellPlan},
    supervisor::Held,
    supplies::Supplies,
    uids::Uids,
};
use crate::{
    cgroup::{Cgroups, Limits},
    network::{self, Gate, Lease, Network},
    scratch::Scratch,
};

/// Everything that sandboxes are made with.
#[derive(Debug)]
pub(super) struct Means {
    pub config: Config,
    pub supplies: Supplies,
    pub sandboxes: PathBuf,
    pub cgroups: Cgroups,
    pub network: Arc<Network>,
    pub scratch: Arc<Scratch>,
    pub uids: Uids,
    pub pages: PageServers,
}

/// What one sandbox wants to hold.
pub(super) struct Wish<'a> {
    /// Name of folder and cgroup.
    pub id: &'a str,
    /// Whether it has an address.
    pub net: bool,
    pub limits: Limits,
    pub images: Vec<String>,
}

impl Means {
    /// Writes down what a sandbox will hold, then takes it.
    pub(super) fn hold(&self, wish: Wish<'_>) -> Result<(Held, ShellPlan), SandboxError> {
        let Wish {
            id,
            net,
            limits,
            images,
        } = wish;
        let uid = self
            .uids
            .take()
            .ok_or_else(|| spec_error(id, "all user ids for VMMs are in use"))?;
        let lease = net.then(|| self.network.lease()).transpose()?;
        let intent = Intent {
            id: id.to_owned(),
            uid: uid.get(),
            address: lease.as_ref().map(Lease::address),
            images,
            parked_as: None,
        };
        let folder = Folder::create(&self.sandboxes, &intent)?;
        let made = self.cgroups.create(id, limits).inspect_err(|_| {
            // Both may be repeated, and the error that is returned is the telling one.
            let _ = self.cgroups.of(id).destroy();
            let _ = folder.remove();
        });
        let held = Held {
            cgroup: made?,
            folder,
            lease,
            network: Arc::clone(&self.network),
            uid: Some(uid),
            pages: None,
        };
        let plan = ShellPlan {
            vmm: self.supplies.vmm().into(),
            id: intent.id,
            uid: intent.uid,
            folder: held.folder.clone(),
            cgroup: held.cgroup.clone(),
        };
        Ok((held, plan))
    }

    /// The tap of a sandbox that is booted.
    pub(super) async fn plug(&self, gate: Option<&Gate>) -> Result<Option<OwnedFd>, SandboxError> {
        match gate {
            Some(gate) => Ok(Some(self.network.plug(gate).await?)),
            None => Ok(None),
        }
    }

    /// A new scratch disk.
    pub(super) async fn make_scratch(&self, bytes: u64) -> Result<Arc<OwnedFd>, SandboxError> {
        let scratch = Arc::clone(&self.scratch);
        Ok(Arc::new(blocking(move || scratch.make(bytes)).await??.into()))
    }

    pub(super) async fn open_disks(&self, spec: &SandboxSpec) -> Result<Vec<DiskFds>, SandboxError> {
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            disks.push(match &disk.source {
                DiskSource::Scratch { bytes } => DiskFds::Raw(self.make_scratch(*bytes).await?),
                DiskSource::Raw { file } => DiskFds::Raw(Arc::clone(file)),
                DiskSource::Image { name, table, packs } => self.image(name, table, packs)?,
            });
        }
        Ok(disks)
    }

    /// The files of an image, with a connection to whoever brings what it lacks.
    pub(super) fn image(
        &self,
        name: &str,
        table: &Arc<OwnedFd>,
        packs: &[Arc<OwnedFd>],
    ) -> Result<DiskFds, SandboxError> {
        let line = self.config.chunks.as_ref().map(|server| server.line(name));
        let line = line.transpose().map_err(file_error("make a socket for", name))?;
        Ok(DiskFds::image(table, packs, line))
    }

    /// What the guest is told about its interface. `template_mac` is what a clone's driver believes.
    pub(super) fn interface(&self, address: Ipv4Addr, template_mac: &[u8]) -> Interface {
        let network = self.network.config();
        Interface {
            mac: network::addresses::mac_of(address).to_vec(),
            name: "eth0".into(),
            addresses: vec![format!("{address}/{}", network.range.prefix())],
            gateways: vec![self.network.gateway().to_string()],
            mtu: network.mtu,
            template_mac: template_mac.to_vec(),
        }
    }
}

/// The images that a sandbox reads.
pub(super) fn image_names(spec: &SandboxSpec) -> Vec<String> {
    let image = |disk: &DiskSpec| match &disk.source {
        DiskSource::Image { name, .. } => Some(name.clone()),
        DiskSource::Raw { .. } | DiskSource::Scratch { .. } => None,
    };
    spec.disks.iter().filter_map(image).collect()
}
