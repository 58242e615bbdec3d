//! Virtio devices of a whole, jailed VMM, driven by guests of a few instructions on the real /dev/kvm.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use common::driver::*;
use common::{Vmm, file, guest, machine, net};
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recv, send, setsockopt,
    socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;

// ---- registers

#[test]
fn every_device_shows_itself_and_is_reset_by_its_registers() {
    /// Queues and features below bit 32 that each must have, by device id (virtio 1.3, section 5).
    const EXPECTED: [(u32, u32, u32); 6] = [
        (2, 128, 1 << 9),                     // block: FLUSH
        (1, 256, 1 << 5 | 1 << 15 | 1 << 16), // net: MAC, MRG_RXBUF, STATUS
        (19, 128, 0),                         // vsock
        (4, 16, 0),                           // entropy
        (24, 128, 1 << 1),                    // memory: UNPLUGGED_INACCESSIBLE
        (5, 128, 1 << 2 | 1 << 5),            // balloon: DEFLATE_ON_OOM, REPORTING
    ];
    const INDIRECT_AND_EVENT_IDX: u32 = 1 << 28 | 1 << 29;
    let mut code = vec![];
    for device in 0..6 {
        let base = WINDOW + device * WINDOW_BYTES;
        let print = |register| print_word(base + register);
        let store = |register, value| guest::store(base + register, value);
        for part in [
            print(MAGIC),
            print(VERSION),
            print(DEVICE_ID),
            store(DEVICE_FEATURES_SEL, 0),
            print(DEVICE_FEATURES),
            store(DEVICE_FEATURES_SEL, 1),
            print(DEVICE_FEATURES),
            store(QUEUE_SEL, 0),
            print(QUEUE_SIZE_MAX),
            store(STATUS, 1),
            store(STATUS, 3),
            print(STATUS),
            store(STATUS, 0),
            print(STATUS),
        ] {
            code.extend(part);
        }
    }
    code.extend(poweroff());
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        disks: vec![disk_slot()],
        nets: vec![net_slot()],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        hotplug_bytes: 1 << 30,
        balloon: true,
        ..machine(1, 16 << 20)
    });
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    for (device_id, queue_size, features) in EXPECTED {
        let [magic, version, id, low, high, size, driver, reset] = words(&mut serial);
        assert_eq!((magic, version, id), (0x7472_6976, 2, device_id));
        assert_eq!(low & features, features, "device {id}: {low:#x}");
        assert_eq!(
            low & INDIRECT_AND_EVENT_IDX,
            INDIRECT_AND_EVENT_IDX,
            "device {id}: {low:#x}"
        );
        assert_eq!(high & 1, 1, "device {id} lacks VERSION_1");
        assert_eq!((size, driver, reset), (queue_size, 3, 0), "device {id}");
    }
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

// ---- block

#[test]
fn a_block_is_read_through_the_ring_and_announced_by_an_interrupt() {
    let code = [drive(1), interrupts_and_notify(1)].concat();
    let handler = [
        print_word(WINDOW + INTERRUPT_STATUS),
        guest::store(WINDOW + INTERRUPT_ACK, 1),
        guest::store(END_OF_INTERRUPT, 0),
        print_word(WINDOW + INTERRUPT_STATUS),
        print_word(RINGS[0] + 0x2000),
        print_word(RINGS[0] + 0x2004),
        print_word(RINGS[0] + 0x2008),
        print_word(BLOCK_STATUS),
        print_word(IN + 508),
        poweroff(),
    ];
    let mut image = Image::new(&code, &handler.concat());
    // struct virtio_blk_req: IN, sector 1 (virtio 1.3, 5.2.6).
    image.put(OUT + 8, &1u64.to_le_bytes());
    image.put(BLOCK_STATUS, &[0xff; 4]);
    image.ring(
        0,
        &[(OUT, 16, NEXT), (IN, 512, NEXT | WRITE), (BLOCK_STATUS, 1, WRITE)],
        &[0],
    );
    let mut disk = vec![0x11; 1024];
    disk[1020..].copy_from_slice(b"last");

    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        disks: vec![disk_slot()],
        ..machine(1, 16 << 20)
    });
    let bind = BindDisk {
        slot: 0,
        source: Some(bind_disk::Source::RawFile(RawFile { direct: false })),
        rate_limit: None,
    };
    vmm.ok(Command::BindDisk(bind), &[file(&disk).as_fd()]);
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    let [interrupt, acknowledged, used, head, len, status, data] = words(&mut serial);
    assert_eq!((interrupt, acknowledged), (1, 0));
    assert_eq!((used >> 16, head, len), (1, 0, 513));
    assert_eq!((status, data.to_le_bytes()), (0xffff_ff00, *b"last"));
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

/// Two requests, of which the second has to wait for the limit's timer: under the filter of the disk's thread.
#[test]
fn a_disk_behind_a_rate_limit_answers_when_the_limit_allows_it() {
    let code = [drive(1), interrupts_and_notify(1)].concat();
    let handler = [acknowledge_until_used(2), print_word(BLOCK_STATUS), poweroff()];
    let mut image = Image::new(&code, &handler.concat());
    image.put(BLOCK_STATUS, &[0xff; 4]);
    let request = |status| [(OUT, 16, NEXT), (IN, 512, NEXT | WRITE), (status, 1, WRITE)];
    let descriptors = [request(BLOCK_STATUS), request(BLOCK_STATUS + 1)].concat();
    image.ring(0, &descriptors, &[0, 3]);
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        disks: vec![disk_slot()],
        ..machine(1, 16 << 20)
    });
    let bind = BindDisk {
        slot: 0,
        source: Some(bind_disk::Source::RawFile(RawFile { direct: false })),
        rate_limit: Some(RateLimit {
            operations_per_second: 10,
            burst_operations: 1,
            ..Default::default()
        }),
    };
    vmm.ok(Command::BindDisk(bind), &[file(&[0; 1024]).as_fd()]);
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(words(&mut serial), [0xffff_0000]);
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

// ---- memory and balloon

const HOTPLUG_START: u64 = 1 << 38;
const MEM_BLOCK: u64 = 2 << 20;

fn memory_of(vmm: &mut Vmm) -> MemoryState {
    let state = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap();
    state.memory.expect("there is a machine")
}

/// Two requests: one block, which is within what was asked for, then two, which are not.
#[test]
fn a_guest_plugs_memory_up_to_what_was_asked_for() {
    let code = [drive(1), interrupts_and_notify(1)].concat();
    let handler = [
        acknowledge_until_used(2),
        print_word(IN),
        print_word(IN + 0x100),
        guest::halt(),
    ];
    let mut image = Image::new(&code, &handler.concat());
    for (request, first, blocks) in [(OUT, 0, 1u16), (OUT + 0x100, 1, 2)] {
        image.put(request + 8, &(HOTPLUG_START + first * MEM_BLOCK).to_le_bytes());
        image.put(request + 16, &blocks.to_le_bytes());
    }
    image.put(IN, &[0xff; 4]);
    let descriptors = [
        (OUT, 24, NEXT),
        (IN, 10, WRITE),
        (OUT + 0x100, 24, NEXT),
        (IN + 0x100, 10, WRITE),
    ];
    image.ring(0, &descriptors, &[0, 2]);

    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        hotplug_bytes: 128 << 20,
        ..machine(1, 16 << 20)
    });
    for plugged_bytes in [MEM_BLOCK + 4096, (128 << 20) + MEM_BLOCK] {
        let (code, message) = vmm.refused(Command::SetMemory(SetMemory { plugged_bytes }), &[]);
        assert_eq!(code, error::Code::Invalid, "{message}");
    }
    let two = SetMemory {
        plugged_bytes: 2 * MEM_BLOCK,
    };
    vmm.ok(Command::SetMemory(two), &[]);
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    // ACK, NACK (virtio 1.3, 5.15.6).
    assert_eq!(words(&mut serial), [0, 1]);
    let memory = memory_of(&mut vmm);
    assert_eq!(
        (memory.requested_bytes, memory.plugged_bytes),
        (2 * MEM_BLOCK, MEM_BLOCK)
    );
}

/// The guest reports a page as free in which there is something, and finds nothing in it afterwards.
#[test]
fn what_a_guest_reports_as_free_is_taken_and_its_target_is_shown() {
    // The first queue of `drive` inflates: page numbers in OUT.
    let code = [drive(1), interrupts_and_notify(1)].concat();
    let handler = [
        acknowledge_until_used(1),
        print_word(IN),
        print_word(WINDOW + CONFIG),
        guest::store(WINDOW + CONFIG + 4, 1),
        // Not the driver's to write.
        guest::store(WINDOW + CONFIG, 77),
        print_word(WINDOW + CONFIG),
        guest::halt(),
    ];
    let mut image = Image::new(&code, &handler.concat());
    image.put(OUT, &(IN >> 12).to_le_bytes());
    image.put(OUT + 4, &u32::MAX.to_le_bytes());
    image.put(IN, b"gone");
    image.ring(0, &[(OUT, 8, 0)], &[0]);
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        balloon: true,
        ..machine(1, 16 << 20)
    });
    let target = |target_bytes| Command::SetBalloon(SetBalloon { target_bytes });
    assert_eq!(vmm.refused(target(100), &[]).0, error::Code::Invalid);
    vmm.ok(target(3 << 12), &[]);
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(words(&mut serial), [0, 3, 3]);
    let memory = memory_of(&mut vmm);
    assert_eq!((memory.balloon_target_bytes, memory.balloon_bytes), (3 << 12, 1 << 12));
    let state = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap();
    assert_eq!(
        (state.counters["balloon.bad_page"], state.counters["balloon.bad_access"]),
        (1, 1)
    );
}

// ---- net

/// A tap, and a socket on the host's side of it.
fn tap() -> (OwnedFd, OwnedFd) {
    let tun = net::tap();
    let host = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::empty(),
        SockProtocol::EthAll,
    )
    .unwrap();
    // SAFETY: sockaddr_ll is plain numbers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = i32::try_from(if_nametoindex(net::TAP).unwrap()).unwrap();
    let len = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the address is valid and as long as said.
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(len)) };
    bind(host.as_raw_fd(), &address.unwrap()).unwrap();
    setsockopt(&host, ReceiveTimeout, &TimeVal::new(60, 0)).unwrap();
    (tun, host)
}

/// An Ethernet frame of 60 bytes of an experimental type.
fn frame(from: u8, to: u8, fill: u8) -> Vec<u8> {
    let mut frame = vec![fill; 60];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, to]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, from]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

#[test]
fn frames_go_out_by_the_tap_and_come_in_with_an_interrupt() {
    let handler = [
        acknowledge_until_used(1),
        print_word(RINGS[0] + 0x2008),
        print_word(IN + 8),
        print_word(IN + 12 + 14),
        poweroff(),
    ];
    let code = [drive(2), print_word(WINDOW + CONFIG + 4), interrupts_and_notify(2)].concat();
    let mut image = Image::new(&code, &handler.concat());
    image.ring(0, &[(IN, 2048, WRITE)], &[0]);
    // Too short for its header, then a good one.
    image.ring(1, &[(OUT, 4, 0), (OUT, 72, 0)], &[0, 1]);
    image.put(OUT + 12, &frame(1, 2, 0x77));

    let (tap, host) = tap();
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        nets: vec![net_slot()],
        ..machine(1, 16 << 20)
    });
    let (code_of_refusal, _) = vmm.refused(Command::BindNet(BindNet::default()), &[file(b"").as_fd()]);
    assert_eq!(code_of_refusal, error::Code::Resource);
    vmm.ok(Command::BindNet(BindNet::default()), &[tap.as_fd()]);
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    let [status] = words(&mut serial);
    assert_eq!(status.to_le_bytes(), [0, 1, 1, 0], "end of the address, link up");
    let mut sent = [0; 2048];
    let len = recv(host.as_raw_fd(), &mut sent, MsgFlags::empty()).unwrap();
    assert_eq!(sent[..len], frame(1, 2, 0x77));
    let counters = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap().counters;
    assert_eq!(counters.get("net0.bad_chain"), Some(&1));
    send(host.as_raw_fd(), &frame(2, 1, 0x99), MsgFlags::empty()).unwrap();
    let [len, header, data] = words(&mut serial);
    assert_eq!((len, header >> 16, data), (72, 1, 0x9999_9999));
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

// ---- vsock

#[test]
fn streams_of_a_jailed_vmm_go_both_ways() {
    const REQUEST: u16 = 1;
    const RESPONSE: u16 = 2;
    // Two packets, in one order or the other: an answer to the guest, and the wish of a host program.
    let second = IN + 0x800;
    let handler = [
        acknowledge_until_used(2),
        print_word(IN + 28),
        print_word(second + 28),
        poweroff(),
    ];
    let mut image = Image::new(&[drive(2), interrupts_and_notify(2)].concat(), &handler.concat());
    image.ring(0, &[(IN, 0x100, WRITE), (second, 0x100, WRITE)], &[0, 1]);
    image.ring(1, &[(OUT, 44, 0)], &[0]);
    // struct virtio_vsock_hdr (virtio 1.3, 5.10.6): CID 3, port 5000, asks for CID 2, port 1024.
    image.put(OUT, &3u64.to_le_bytes());
    image.put(OUT + 8, &2u64.to_le_bytes());
    image.put(OUT + 16, &5000u32.to_le_bytes());
    image.put(OUT + 20, &1024u32.to_le_bytes());
    image.put(OUT + 28, &1u16.to_le_bytes());
    image.put(OUT + 30, &REQUEST.to_le_bytes());
    image.put(OUT + 36, &65536u32.to_le_bytes());

    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        vsock: Some(VsockSlot { guest_cid: 3 }),
        ..machine(1, 16 << 20)
    });
    let (code, _) = vmm.refused(Command::BindVsock(BindVsock {}), &[file(b"").as_fd()]);
    assert_eq!(code, error::Code::Resource);
    let path = vmm.folder.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    vmm.ok(Command::BindVsock(BindVsock {}), &[listener.as_fd()]);
    let (again, _) = vmm.refused(Command::BindVsock(BindVsock {}), &[listener.as_fd()]);
    assert_eq!(again, error::Code::Invalid);
    // Before there is a driver: the caller waits for it.
    let mut caller = UnixStream::connect(&path).unwrap();
    caller.write_all(b"CONNECT 7\n").unwrap();
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    let Some(event::Event::Dial(dial)) = vmm.connection.event().event else {
        panic!("not a stream of the guest's")
    };
    assert_eq!(dial.port, 1024);
    let packets: [u32; 2] = words(&mut serial);
    // Type 1, a stream, and the operation.
    let mut operations = packets.map(|word| (word & 0xffff, word >> 16));
    operations.sort_unstable();
    assert_eq!(operations, [(1, REQUEST.into()), (1, RESPONSE.into())]);
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}
