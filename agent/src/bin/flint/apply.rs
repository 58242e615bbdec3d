//! `apply`: native Pod manifests.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use flint_api::host::{
    ApplyPodRequest, ListPodsRequest, Pod, PodMaterials, PodMeta, PodSpec, UpdateMaterialsRequest, pod_status::Phase,
};
use flint_api::kubernetes::{self, Documents};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::pods;

/// Many times what a pod of 4 MiB, the longest that flintd takes, needs.
const LONGEST: u64 = 16 << 20;

/// Create or change pods from Kubernetes Pod manifests.
///
/// Every field is used, or refused by its path: nothing is dropped. A pod of the same namespace and name that still runs is
/// changed; one that has ended must be removed first.
///
/// ConfigMap and Secret documents of the same manifests are given to the pods that refer to them. Applied again with others, they
/// change in the volumes of pods that run, within seconds; environments stay as they are. The host keeps them in memory only. A pod
/// whose configMap or secret is not there waits for it, unless it is optional.
#[derive(Debug, Args)]
pub struct Apply {
    /// Manifest, YAML or JSON, of one or several documents; - reads standard input. May be repeated.
    #[arg(short = 'f', long = "filename", required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Return when the pods run, or have ended.
    #[arg(long)]
    wait: bool,
}

impl Apply {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let mut all = Documents::default();
        for file in &self.files {
            let documents = read(file)?;
            all.pods.extend(documents.pods);
            all.objects.extend(documents.objects);
        }
        if all.pods.is_empty() {
            let hint = "apply the pods that use them in the same command: -f may be repeated";
            return Err(Failure::new("the manifests hold configMaps or secrets, and no pod").hint(hint));
        }
        let mut applied = Vec::with_capacity(all.pods.len());
        for manifest in all.pods {
            for note in &manifest.notes {
                eprintln!("flint: note: {}: {}", note.path, note.message);
            }
            let materials = all.objects.materials_of(&manifest.meta.namespace, &manifest.spec);
            applied.push(apply_with(&client, manifest.meta, manifest.spec, materials).await?);
        }
        // All have begun before the first one is waited for.
        for mut pod in applied {
            if self.wait {
                pod = pods::until(&client, &pod, is_under_way).await?;
            }
            print(&pod, format)?;
        }
        Ok(0)
    }
}

fn is_under_way(pod: &Pod) -> bool {
    pods::is_over(pod)
        || pod
            .status
            .as_ref()
            .is_some_and(|status| status.phase() == Phase::Running)
}

fn print(pod: &Pod, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::print_json("Pod", pod);
    }
    let meta = pod.meta.clone().unwrap_or_default();
    output::print_line(&format!(
        "pod {}/{}: {}",
        meta.namespace,
        meta.name,
        pods::condition(pod)
    ))
}

fn read(file: &Path) -> Result<Documents, Failure> {
    let text = if file.as_os_str() == "-" {
        text_of(io::stdin()).map_err(|error| Failure::local("read standard input", error))?
    } else {
        let text = File::open(file).and_then(text_of);
        text.map_err(|error| Failure::local(&format!("read {}", file.display()), error))?
    };
    kubernetes::documents_from_yaml(&text).map_err(|error| Failure::new(format!("{}: {error}", file.display())))
}

/// All of it, unless it is longer than a manifest can be.
fn text_of(source: impl Read) -> io::Result<String> {
    let mut text = String::new();
    if source.take(LONGEST + 1).read_to_string(&mut text)? as u64 > LONGEST {
        let message = format!(
            "it is longer than {} MiB; give each pod a file of its own",
            LONGEST >> 20
        );
        return Err(io::Error::other(message));
    }
    Ok(text)
}

/// Applies a pod under the uid that its name has on this host, or a new one.
pub async fn apply(client: &Client, meta: PodMeta, spec: PodSpec) -> Result<Pod, Failure> {
    apply_with(client, meta, spec, PodMaterials::default()).await
}

/// The same, with what it refers to; a pod that is known gets it as an update.
async fn apply_with(
    client: &Client,
    mut meta: PodMeta,
    spec: PodSpec,
    materials: PodMaterials,
) -> Result<Pod, Failure> {
    let pods = client.pods().list_pods(ListPodsRequest {}).await?.into_inner().pods;
    let same_name = |pod: &&Pod| {
        pod.meta
            .as_ref()
            .is_some_and(|known| known.namespace == meta.namespace && known.name == meta.name)
    };
    let known = pods.iter().find(same_name);
    match known {
        Some(known) if pods::is_over(known) => {
            let name = format!("{}/{}", meta.namespace, meta.name);
            return Err(Failure::new(format!("the pod {name} has ended")).hint(format!("`flint rm {name}` first")));
        }
        Some(known) => {
            let generation = known.meta.as_ref().map_or(0, |known| known.generation);
            let changed = known.spec.as_ref() != Some(&spec);
            meta.uid = pods::uid(known);
            meta.generation = meta.generation.max(generation + u64::from(changed));
        }
        None => {
            if meta.uid.is_empty() {
                meta.uid = new_uid()?;
            }
            meta.generation = meta.generation.max(1);
        }
    }
    let update = known.is_some() && materials != PodMaterials::default();
    let request = ApplyPodRequest {
        meta: Some(meta),
        spec: Some(spec),
        lease_epoch: 0,
        materials: Some(materials.clone()).filter(|_| !update),
        from_snapshot: String::new(),
    };
    let response = client.pods().apply_pod(request).await?.into_inner();
    let pod = response
        .pod
        .ok_or_else(|| Failure::new("flintd's answer holds no pod"))?;
    if update {
        let request = UpdateMaterialsRequest {
            uid: pods::uid(&pod),
            materials: Some(materials),
            lease_epoch: 0,
        };
        client.pods().update_materials(request).await?;
    }
    Ok(pod)
}

/// A random UUID, from the kernel.
pub fn new_uid() -> Result<String, Failure> {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|uuid| uuid.trim().to_owned())
        .map_err(|error| Failure::local("get a random uid", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_without_end_is_refused_and_not_read_to_it() {
        let error = text_of(io::repeat(b'#')).unwrap_err();
        assert!(error.to_string().contains("16 MiB"), "{error}");
        assert!(text_of(&b"\xff\xfe"[..]).is_err(), "no text at all");
        assert_eq!(text_of(&b"a: b"[..]).unwrap(), "a: b");
    }
}
