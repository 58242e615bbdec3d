//! A Linux guest that is saved and goes on in another VMM. Needs what `system_linux` needs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use common::saved::{Saved, claim};
use common::{Vmm, linux, machine};
use flint_api::vmm::request::Command;
use flint_api::vmm::{Claim, CreateMachine, Pause};

fn shape() -> CreateMachine {
    CreateMachine {
        rng: true,
        ..machine(2, 192 << 20)
    }
}

/// The next tick that init tells, and the seconds that the guest has been up by then.
fn tick(serial: &mut impl BufRead) -> (u32, f64) {
    let mut line = String::new();
    while !line.contains("tick=") {
        line.clear();
        assert_ne!(serial.read_line(&mut line).unwrap(), 0, "the guest has ended");
        print!("{line}");
    }
    let field = |name| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix(name)).unwrap().to_owned()
    };
    (field("tick=").parse().unwrap(), field("uptime=").parse().unwrap())
}

#[test]
fn linux_goes_on_in_a_clone_as_if_no_time_had_passed() {
    let (mut vmm, serial): (_, UnixStream) = Vmm::with_machine(shape());
    linux::start(&mut vmm, "ticks");
    let mut serial = BufReader::new(serial);
    assert_eq!(tick(&mut serial).0, 0);
    let (mut last, mut uptime) = tick(&mut serial);
    let told = Instant::now();
    vmm.ok(Command::Pause(Pause {}), &[]);
    let before = told.elapsed();
    let saved = Saved::of(&mut vmm);
    drop(vmm);
    // What it said before it stood still.
    serial.get_ref().set_nonblocking(false).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut serial, &mut rest).unwrap();
    let mut rest = rest.as_bytes();
    while rest.windows(5).any(|word| word == b"tick=") {
        (last, uptime) = tick(&mut rest);
    }

    let mut clone = saved.parked(shape());
    println!("saved and parked in {:?}", told.elapsed() - before);
    let claimed = Instant::now();
    let mut serial = BufReader::new(claim(&mut clone, Claim::default(), &[]));
    let first = uptime;
    for next in last + 1..last + 4 {
        let (tick, later) = tick(&mut serial);
        assert_eq!(tick, next);
        // However slowly it runs: only the time in which it ran has passed for it.
        let most = (before + claimed.elapsed()).as_secs_f64() + 0.5;
        println!(
            "{:.2} s passed for the guest, at most {most:.2} s while it ran",
            later - first
        );
        assert!(
            (uptime..first + most).contains(&later),
            "{first} s, {uptime} s, then {later} s"
        );
        uptime = later;
    }
}
