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
fn what_cannot_be_used_is_named_together_with_the_next_step() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "no kernel, no program").unwrap();
    let missing = folder.path().join("missing");
    let kernel = [open_kernel(&missing), open_kernel(&file)].map(|result| result.unwrap_err().to_string());
    assert!(kernel.iter().all(|message| message.contains("--kernel")), "{kernel:?}");
    let vmm = [check_vmm(&missing), check_vmm(&file)].map(|result| result.unwrap_err().to_string());
    assert!(vmm.iter().all(|message| message.contains("--vmm")), "{vmm:?}");
    let kvm = [check_kvm(&missing), check_kvm(&file)].map(|result| result.unwrap_err().to_string());
    assert!(kvm[0].contains("kvm_intel") && kvm[1].contains("no device"), "{kvm:?}");
}
