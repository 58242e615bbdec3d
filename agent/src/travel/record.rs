//! What travels of a snapshot beside its files: what a pod needs that is made of it, and how to get its images.
//!
//! It comes from a registry, so from anybody: [`TravelRecord::check`] believes nothing that this host would act on before a VMM
//! has looked at the machine.

use std::collections::{BTreeSet, HashSet};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use flint_api::host;
use flint_snapshots::machines::Notes;
use prost::Message;

use crate::{
    pods::{PodRecord, validate},
    saved::SavedRecord,
};

const VERSION: u32 = 1;
/// The note that has the record; the others are for people.
const RECORD: &str = "flint.pod";

/// A snapshot's record on its way.
#[derive(Clone, PartialEq, Message)]
pub(super) struct TravelRecord {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(message, optional, tag = "2")]
    saved: Option<SavedRecord>,
    /// Each that a disk reads, once.
    #[prost(message, repeated, tag = "3")]
    images: Vec<TravelImage>,
}

/// An image that a saved pod reads.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct TravelImage {
    #[prost(string, tag = "1")]
    pub(super) digest: String,
    /// What the pod calls it.
    #[prost(string, tag = "2")]
    pub(super) reference: String,
    /// The name of the bytes that its device has (`Images::device_name`).
    #[prost(string, tag = "3")]
    pub(super) device: String,
}

/// A record that this host can do nothing with.
#[derive(Debug)]
pub(super) enum Unusable {
    /// It is none, or of another version.
    Unknown(String),
    /// It makes no sense; why.
    Senseless(String),
}

fn senseless(what: impl Into<String>) -> Unusable {
    Unusable::Senseless(what.into())
}

impl TravelRecord {
    /// Of a snapshot of this host.
    pub(super) fn new(saved: SavedRecord, images: Vec<TravelImage>) -> Self {
        Self {
            version: VERSION,
            saved: Some(without_what_nobody_needs(saved)),
            images,
        }
    }

    pub(super) fn images(&self) -> &[TravelImage] {
        &self.images
    }

    /// The snapshot's record; a checked one has it.
    pub(super) fn into_saved(self) -> SavedRecord {
        self.saved.unwrap_or_default()
    }

    pub(super) fn snapshot(&self) -> host::Snapshot {
        let saved = self.saved.as_ref();
        saved.and_then(|saved| saved.snapshot.clone()).unwrap_or_default()
    }

    /// Names of the variables that its containers have in their environment.
    pub(super) fn environment(&self) -> Vec<String> {
        let containers = self.spec().into_iter().flat_map(|spec| &spec.containers);
        let names: BTreeSet<_> = containers
            .flat_map(|container| &container.env)
            .map(|env| env.name.clone())
            .collect();
        names.into_iter().collect()
    }

    fn spec(&self) -> Option<&host::PodSpec> {
        self.saved.as_ref()?.pod.as_ref()?.pod.as_ref()?.spec.as_ref()
    }

    /// As notes of a machine: itself, and a few words for people who look into a registry.
    pub(super) fn into_notes(self) -> Notes {
        let meta = self.snapshot().pod.unwrap_or_default();
        let images: Vec<_> = self.images.iter().map(|image| image.reference.as_str()).collect();
        Notes::from([
            (RECORD.to_owned(), STANDARD.encode(self.encode_to_vec())),
            ("pod".to_owned(), format!("{}/{}", meta.namespace, meta.name)),
            ("images".to_owned(), images.join(" ")),
        ])
    }

    /// What notes have, checked.
    pub(super) fn of(notes: &Notes) -> Result<Self, Unusable> {
        let unknown = |what: &str| Unusable::Unknown(what.to_owned());
        let record = notes.get(RECORD).ok_or_else(|| unknown("it is no pod's"))?;
        let bytes = STANDARD.decode(record).map_err(|error| senseless(error.to_string()))?;
        let record = Self::decode(bytes.as_slice()).map_err(|error| senseless(error.to_string()))?;
        if record.version != VERSION {
            let version = record.version;
            return Err(Unusable::Unknown(format!(
                "it has version {version}, this flintd reads version {VERSION}"
            )));
        }
        record.check().map_err(senseless)?;
        Ok(record)
    }

    fn check(&self) -> Result<(), String> {
        let missing = |what: &str| format!("it has no {what}");
        let saved = self.saved.as_ref().ok_or_else(|| missing("snapshot"))?;
        let record = saved.pod.as_ref().ok_or_else(|| missing("pod"))?;
        let pod = record.pod.as_ref().ok_or_else(|| missing("pod"))?;
        let meta = pod.meta.as_ref().ok_or_else(|| missing("name"))?;
        let spec = pod.spec.as_ref().ok_or_else(|| missing("spec"))?;
        if let Some(violation) = validate::pod(meta, spec).first() {
            return Err(format!("{} {}", violation.field, violation.description));
        }
        check_containers(saved, record, spec)?;
        let machine = saved.machine.as_ref().ok_or_else(|| missing("machine"))?;
        let snapshot = saved.snapshot.as_ref().ok_or_else(|| missing("snapshot"))?;
        if (snapshot.vcpus, snapshot.memory_bytes) != (machine.vcpus, machine.memory_bytes) {
            return Err("its machine has another size than it says".into());
        }
        let read: HashSet<_> = saved.disks.iter().collect();
        let named: HashSet<_> = self.images.iter().map(|image| &image.digest).collect();
        if read != named || snapshot.images != saved.disks {
            return Err("the images that it names are not those that its disks read".into());
        }
        Ok(())
    }
}

/// Names of containers become names of files, here as in the spec that was checked.
fn check_containers(saved: &SavedRecord, record: &PodRecord, spec: &host::PodSpec) -> Result<(), String> {
    let names: Vec<_> = spec.containers.iter().map(|container| &container.name).collect();
    let statuses = record.pod.iter().filter_map(|pod| pod.status.as_ref());
    let shown: Vec<_> = statuses
        .flat_map(|status| &status.containers)
        .map(|status| &status.name)
        .collect();
    if shown != names || record.containers.len() != names.len() {
        return Err("its containers are not those of its spec".into());
    }
    match saved.outputs.iter().find(|output| !names.contains(&&output.container)) {
        Some(output) => Err(format!("it has the log of a container {:?}", output.container)),
        None => Ok(()),
    }
}

/// A pod of a snapshot has its own name, labels, addresses and history, and gets its credentials with every request.
fn without_what_nobody_needs(saved: SavedRecord) -> SavedRecord {
    let record = saved.pod.unwrap_or_default();
    let pod = record.pod.unwrap_or_default();
    let meta = pod.meta.map(|meta| host::PodMeta {
        uid: meta.uid,
        namespace: meta.namespace,
        name: meta.name,
        generation: meta.generation,
        ..host::PodMeta::default()
    });
    let containers = pod.status.unwrap_or_default().containers;
    let containers = containers.into_iter().map(|container| host::ContainerStatus {
        last_termination: None,
        ..container
    });
    let pod = host::Pod {
        meta: meta.clone(),
        spec: pod.spec,
        status: Some(host::PodStatus {
            containers: containers.collect(),
            ..host::PodStatus::default()
        }),
        revision: 0,
    };
    SavedRecord {
        snapshot: saved.snapshot.map(|snapshot| host::Snapshot { pod: meta, ..snapshot }),
        pod: Some(PodRecord {
            pod: Some(pod),
            containers: record.containers,
            ..PodRecord::default()
        }),
        ..saved
    }
}

#[cfg(test)]
mod tests {
    use flint_api::vmm;

    use super::*;
    use crate::{pods::ContainerRecord, saved::SavedOutput};

    fn saved() -> SavedRecord {
        let meta = host::PodMeta {
            uid: "a".into(),
            namespace: "default".into(),
            name: "web".into(),
            annotations: [("token".to_owned(), "hidden".to_owned())].into(),
            ..Default::default()
        };
        let env = host::EnvVar {
            name: "DB_PASSWORD".into(),
            value: "secret".into(),
            ..Default::default()
        };
        let container = host::Container {
            name: "main".into(),
            image: "busybox".into(),
            env: vec![env],
            ..Default::default()
        };
        let status = host::ContainerStatus {
            name: "main".into(),
            image_digest: "sha256:b".into(),
            ..Default::default()
        };
        let pod = host::Pod {
            meta: Some(meta.clone()),
            spec: Some(host::PodSpec {
                containers: vec![container],
                ..Default::default()
            }),
            status: Some(host::PodStatus {
                containers: vec![status],
                pod_ips: vec!["10.88.0.9".into()],
                ..Default::default()
            }),
            revision: 7,
        };
        SavedRecord {
            snapshot: Some(host::Snapshot {
                name: "web-1".into(),
                pod: Some(meta),
                images: vec!["sha256:b".into()],
                vcpus: 1,
                memory_bytes: 64 << 20,
                ..Default::default()
            }),
            pod: Some(PodRecord {
                pod: Some(pod),
                sandbox_id: "s".into(),
                containers: vec![ContainerRecord::default()],
                ..Default::default()
            }),
            machine: Some(vmm::CreateMachine {
                vcpus: 1,
                memory_bytes: 64 << 20,
                ..Default::default()
            }),
            disks: vec!["sha256:b".into()],
            outputs: vec![SavedOutput {
                container: "main".into(),
                run: 0,
                offset: 5,
            }],
            ..Default::default()
        }
    }

    fn travelling(saved: SavedRecord) -> TravelRecord {
        let image = TravelImage {
            digest: "sha256:b".into(),
            reference: "busybox".into(),
            device: "blake3:b".into(),
        };
        TravelRecord::new(saved, vec![image])
    }

    #[test]
    fn what_a_pod_needs_arrives_and_what_nobody_needs_stays() {
        let sent = travelling(saved());
        assert_eq!(sent.environment(), ["DB_PASSWORD"]);
        let notes = sent.clone().into_notes();
        assert_eq!(notes["pod"], "default/web");

        let arrived = TravelRecord::of(&notes).unwrap();

        assert_eq!(arrived, sent);
        let text = format!("{arrived:?}");
        for gone in ["hidden", "10.88.0.9", "sandbox_id: \"s\""] {
            assert!(!text.contains(gone), "{gone}: {text}");
        }
        let saved = arrived.into_saved();
        assert_eq!((saved.outputs[0].offset, saved.disks.len()), (5, 1));
    }

    #[test]
    fn a_record_of_somebody_who_deceives_is_refused() {
        type Spoil = fn(&mut TravelRecord);
        let spoils: [(&str, Spoil); 8] = [
            ("version", |record| record.version = 2),
            ("no snapshot", |record| record.saved = None),
            ("spec.containers[0].name", |record| {
                spec(record).containers[0].name = "../x".into();
            }),
            ("containers are not those", |record| {
                let saved = record.saved.as_mut().unwrap();
                saved.pod.as_mut().unwrap().containers.clear();
            }),
            ("log of a container", |record| {
                record.saved.as_mut().unwrap().outputs[0].container = "../../etc".into();
            }),
            ("no machine", |record| record.saved.as_mut().unwrap().machine = None),
            ("another size", |record| {
                record.saved.as_mut().unwrap().snapshot.as_mut().unwrap().memory_bytes = 1;
            }),
            ("not those that its disks read", |record| record.images.clear()),
        ];
        fn spec(record: &mut TravelRecord) -> &mut host::PodSpec {
            let pod = record
                .saved
                .as_mut()
                .unwrap()
                .pod
                .as_mut()
                .unwrap()
                .pod
                .as_mut()
                .unwrap();
            pod.spec.as_mut().unwrap()
        }
        for (said, spoil) in spoils {
            let mut record = travelling(saved());
            spoil(&mut record);
            let refused = format!("{:?}", TravelRecord::of(&record.into_notes()).unwrap_err());
            assert!(refused.contains(said), "{said}: {refused}");
        }
        for nonsense in ["%", "/////w=="] {
            let notes = Notes::from([(RECORD.to_owned(), nonsense.to_owned())]);
            assert!(
                matches!(TravelRecord::of(&notes), Err(Unusable::Senseless(_))),
                "{nonsense}"
            );
        }
        assert!(matches!(TravelRecord::of(&Notes::new()), Err(Unusable::Unknown(_))));
    }
}
