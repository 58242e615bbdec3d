use std::os::fd::OwnedFd;

use super::*;

fn spec(id: &str) -> SandboxSpec {
    SandboxSpec {
        id: id.into(),
        vcpus: 1,
        memory_bytes: (64 << 20) + 1,
        disks: Vec::new(),
        net: None,
        identity: super::super::Identity::default(),
    }
}

#[test]
fn ids_that_would_leave_their_folder_are_refused() {
    for id in ["", ".", "..", "../up", "a/b", "-x", "a b", "ä", &"x".repeat(64)] {
        assert!(matches!(checked(spec(id)), Err(SandboxError::Spec { .. })), "{id:?}");
    }
    assert!(checked(spec("0123-pod_A.1")).is_ok());
}

#[test]
fn memory_is_rounded_up_to_what_a_machine_can_have() {
    assert_eq!(checked(spec("a")).unwrap().memory_bytes, 66 << 20);
    assert!(
        checked(SandboxSpec {
            memory_bytes: u64::MAX,
            ..spec("a")
        })
        .is_err()
    );
    assert!(
        checked(SandboxSpec {
            memory_bytes: 1 << 20,
            ..spec("a")
        })
        .is_err()
    );
}

#[test]
fn two_disks_with_one_serial_are_refused() {
    let scratch = || DiskSpec {
        serial: "scratch".into(),
        source: DiskSource::Scratch { bytes: 1 << 20 },
        read_only: false,
        rate_limit: None,
    };
    assert!(
        checked(SandboxSpec {
            disks: vec![scratch()],
            ..spec("a")
        })
        .is_ok()
    );
    assert!(
        checked(SandboxSpec {
            disks: vec![scratch(), scratch()],
            ..spec("a")
        })
        .is_err()
    );
}

#[test]
fn the_images_that_a_sandbox_reads_are_noted_by_name() {
    let null = || Arc::new(OwnedFd::from(fs::File::open("/dev/null").unwrap()));
    let disk = |serial: &str, source| DiskSpec {
        serial: serial.into(),
        source,
        read_only: true,
        rate_limit: None,
    };
    let image = DiskSource::Image {
        name: "sha256:1".into(),
        table: null(),
        packs: Vec::new(),
    };
    let spec = SandboxSpec {
        disks: vec![
            disk("image-0", image),
            disk("scratch", DiskSource::Scratch { bytes: 1 << 20 }),
        ],
        ..spec("a")
    };
    assert_eq!(image_names(&spec), ["sha256:1"]);
}
