//! What makes a Linux that runs a machine of its own and of another size: a generation id, vCPUs that were never started, memory;
//! and what it gives back. Needs what `system_linux` needs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashSet;
use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;

use common::linux::{self, told};
use common::saved::Saved;
use common::{Vmm, machine};
use flint_api::vmm::request::Command;
use flint_api::vmm::*;

const PLUGGED: u64 = 256 << 20;
const BALLOON: u64 = 32 << 20;
/// Linux reports free pages two seconds after they became free, and a host may be slow.
const MOST_TICKS: usize = 60;

/// Waits for words of the guest; returns the lines up to them.
fn words(serial: UnixStream) -> impl FnMut(&str) -> Vec<String> {
    let mut lines = BufReader::new(serial).lines().map(Result::unwrap);
    move |wanted| {
        let mut seen = Vec::new();
        for line in lines.by_ref() {
            println!("{line}");
            seen.push(line);
            if seen.last().is_some_and(|line| line.contains(wanted)) {
                return seen;
            }
        }
        panic!("the guest ended before it said {wanted}");
    }
}

/// How many clones are compared; each takes an emulated host half a second. `FLINT_TEST_CLONES` is another number.
const CLONES: usize = 32;

#[test]
fn no_two_clones_draw_the_same_random_numbers() {
    let clones = env::var("FLINT_TEST_CLONES").map_or(CLONES, |number| number.parse().unwrap());
    // No virtio-rng, which would hide a generator that was not reseeded.
    let shape = || machine(1, 128 << 20);
    let (mut vmm, serial) = Vmm::with_machine(shape());
    linux::start(&mut vmm, "draws");
    words(serial)("waiting=clone");
    vmm.ok(Command::Pause(Pause {}), &[]);
    let saved = Saved::of(&mut vmm);
    drop(vmm);

    let mut drawn = HashSet::new();
    for number in 1..=clones {
        let (_clone, serial) = saved.cloned(shape());
        let lines = words(serial)("drawn=");
        for name in ["drawn", "held", "uuid"] {
            let value = told(&lines, name).to_owned();
            assert!(value.len() >= 32, "{name}={value}");
            assert!(
                drawn.insert(value),
                "clone {number} has drawn what another one did: {lines:?}"
            );
        }
    }
    println!("{clones} clones: {} values, all different", drawn.len());
}

fn state(vmm: &mut Vmm) -> State {
    vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap()
}

#[test]
fn linux_takes_what_a_clone_is_given_and_gives_back_what_it_does_not_use() {
    let (mut vmm, serial) = Vmm::with_machine(CreateMachine {
        rng: true,
        hotplug_bytes: 2 << 30,
        balloon: true,
        ..machine(3, 256 << 20)
    });
    linux::start(&mut vmm, "clone maxcpus=1");
    let mut until = words(serial);

    let booted = until("waiting=memory");
    assert_eq!((told(&booted, "cpus"), told(&booted, "onlined")), ("1", "3"));
    let plugged_bytes = PLUGGED;
    vmm.ok(Command::SetMemory(SetMemory { plugged_bytes }), &[]);
    let grown = until("waiting=generation");
    assert_eq!(
        told(&grown, "grown"),
        "0",
        "MemTotal is as much more as was plugged, in KiB"
    );
    assert_eq!(state(&mut vmm).memory.unwrap().plugged_bytes, PLUGGED);

    vmm.ok(Command::Pause(Pause {}), &[]);
    vmm.ok(Command::RenewGeneration(RenewGeneration {}), &[]);
    vmm.ok(Command::Resume(Resume {}), &[]);
    assert_eq!(
        told(&until("generation="), "generation"),
        "1",
        "the kernel says that it reseeded"
    );

    vmm.ok(Command::SetBalloon(SetBalloon { target_bytes: BALLOON }), &[]);
    vmm.ok(Command::SetMemory(SetMemory { plugged_bytes: 0 }), &[]);
    let satisfied = (0..MOST_TICKS).any(|_| {
        until("tick");
        let state = state(&mut vmm);
        let memory = state.memory.unwrap();
        let reported = state.counters.get("balloon.reported_bytes").copied().unwrap_or(0);
        println!("{memory:?} reported {reported}");
        memory.balloon_bytes == BALLOON && memory.plugged_bytes < PLUGGED && reported > 0
    });
    assert!(satisfied, "{:?}", state(&mut vmm));
    let counters = state(&mut vmm).counters;
    let wrong = counters
        .iter()
        .filter(|(name, _)| name.contains("bad_") || name.contains("error"));
    assert_eq!(wrong.collect::<Vec<_>>(), []);
}
