//! Linux guests that do what `flint_test=` says, see hack/emulated/test-guest.

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use flint_api::vmm::request::Command;
use flint_api::vmm::{ExitReason, LoadKernel, Start};

use super::Vmm;

/// The file that an environment variable names.
pub fn named(name: &str) -> PathBuf {
    let path = env::var_os(name).unwrap_or_else(|| panic!("{name} must name a file: run hack/test system"));
    path.into()
}

/// Lets Linux begin on a machine.
pub fn start(vmm: &mut Vmm, action: &str) {
    let open = |name| File::open(named(name)).unwrap();
    let (kernel, initrd) = (open("FLINT_TEST_KERNEL"), open("FLINT_TEST_INITRD"));
    // Quiet: each byte of kernel log is an exit, which an emulated host pays dearly for.
    let cmdline = format!("console=ttyS0 quiet panic=-1 flint_test={action}");
    vmm.ok(
        Command::LoadKernel(LoadKernel {
            cmdline,
            has_initrd: true,
        }),
        &[kernel.as_fd(), initrd.as_fd()],
    );
    vmm.ok(Command::Start(Start {}), &[]);
}

/// Boots Linux on a machine with a serial line; returns what it printed and how it ended.
pub fn boot(mut vmm: Vmm, serial: UnixStream, action: &str) -> (Vec<String>, ExitReason) {
    start(&mut vmm, action);
    // Printed as it comes, so that a guest that hangs shows where.
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(serial).lines().map_while(Result::ok);
        lines.inspect(|line| println!("{line}")).collect::<Vec<_>>()
    });
    let reason = vmm.end().reason();
    (reader.join().unwrap(), reason)
}

/// What init printed as "flint-test: ... NAME=VALUE ...".
pub fn told<'a>(lines: &'a [String], name: &str) -> &'a str {
    lines
        .iter()
        .filter_map(|line| line.split_once("flint-test: "))
        .flat_map(|(_, facts)| facts.split_whitespace())
        .find_map(|fact| fact.split_once('=').filter(|(of, _)| *of == name))
        .unwrap_or_else(|| panic!("init did not tell {name}"))
        .1
}
