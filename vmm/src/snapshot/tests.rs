use super::*;

/// A machine of two vCPUs with each kind of device, of which the first disk has a driver; saved by the first format.
const V1: &[u8] = include_bytes!("../../tests/golden/v1.state");

/// The same, cloned and saved again as the difference to that, by the second format.
const V2: &[u8] = include_bytes!("../../tests/golden/v2.state");

#[test]
fn the_first_format_is_read_and_written_as_it_was() {
    let snapshot = Snapshot::decode(V1).unwrap();
    assert_eq!(snapshot.vcpus.len(), 2);
    assert_eq!(snapshot.machine.shape.as_ref().unwrap().memory_bytes, 16 << 20);
    let names: Vec<_> = snapshot.devices.iter().map(|device| &device.name[..]).collect();
    assert_eq!(names, ["disk0", "net0", "vsock", "rng"]);
    assert_eq!(snapshot.passport.devices, names);
    let registers = snapshot.devices[0].registers.as_ref().unwrap();
    assert_eq!(registers.status, 15, "its driver was ready");
    // Long mode and paging (SDM volume 3, 2.2.1): the guest was where tiny guests run.
    assert_eq!(snapshot.vcpus[0].sregs.efer & 0x500, 0x500);
    // Not started: waits for its start signal (KVM_MP_STATE_UNINITIALIZED).
    assert_eq!(snapshot.vcpus[1].mp_state.mp_state, 1);
    assert!(snapshot.vcpus[0].time.tsc > 0 && snapshot.clock > 0);
    assert_eq!(snapshot.encode(), V1);
}

#[test]
fn the_second_format_names_its_bases() {
    let snapshot = Snapshot::decode(V2).unwrap();
    let ids = snapshot.machine.files(snapshot.id).unwrap();
    assert_eq!((ids.len(), ids[0]), (2, snapshot.id));
    assert_eq!(ids[1].to_vec(), snapshot.machine.bases[0]);
    assert_eq!((V1[8], V2[8]), (1, 2));
    assert_eq!(snapshot.encode(), V2);
}

#[test]
fn bases_that_cannot_be_are_refused() {
    let mut snapshot = Snapshot::decode(V2).unwrap();
    for bases in [vec![vec![1; 15]], vec![vec![1; 16]; MAX_BASES + 1]] {
        snapshot.machine.bases = bases;
        assert!(snapshot.machine.files(snapshot.id).is_err());
    }
}

#[test]
fn no_altered_byte_and_no_cut_is_taken() {
    for good in [V1, V2] {
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            assert!(Snapshot::decode(&bad).is_err(), "byte {at}");
            assert!(Snapshot::decode(&good[..at]).is_err(), "{at} bytes");
        }
    }
}

/// Somebody who makes checksums can write anything: it is an error or a snapshot, and never more than that.
#[test]
fn an_altered_section_with_the_right_checksum_ends_nothing() {
    let container = Container::parse(V1).unwrap();
    let sections = Section::ALL.map(|section| container.section(section).to_vec());
    let mut refused = 0;
    for (index, section) in sections.iter().enumerate() {
        // The structures of KVM are bytes without meaning here: all of the first of them, and then a sample.
        for at in (0..section.len()).filter(|at| *at < 1500 || at % 23 == 0) {
            for value in [0xff, section[at] ^ 0x80, section[at].wrapping_add(1)] {
                let mut bad = sections.clone();
                bad[index][at] = value;
                refused += usize::from(Snapshot::decode(&container::build(1, container.id, &bad)).is_err());
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn a_section_that_contradicts_itself_is_named() {
    let container = Container::parse(V1).unwrap();
    let mut sections = Section::ALL.map(|section| container.section(section).to_vec());
    sections[2] = vec![0xff; 16];
    let error = Snapshot::decode(&container::build(1, [0; 16], &sections)).unwrap_err();
    assert!(error.to_string().contains("vCPU section"), "{error}");
}

#[test]
fn a_file_of_any_length_is_refused_before_it_is_read() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MAX_BYTES + 1).unwrap();
    assert!(matches!(Snapshot::read(&file), Err(Error::TooLong(_))));
    let folder = File::open("/").unwrap();
    assert!(matches!(Snapshot::read(&folder), Err(Error::Kind)));
}
