//! A pod moves from one flintd to another by way of a registry, with real Linux guests.

#![allow(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

mod host;

use std::{fs, process::Stdio};

use host::{COUNTS, Host, image};

#[test]
fn a_pod_goes_on_on_another_host_where_it_stood_and_a_killed_pull_is_tried_again() {
    let here = Host::start();
    here.start_pod("web", COUNTS, "  restartPolicy: Never\n");
    assert_eq!(here.next_numbers("web", 5), 1);
    here.ok(["exec", "web", "--", "sh", "-c", "echo on the disk > /note"]);
    here.ok(["snapshot", "create", "web", "warm"]);
    let reference = image("moved/web:1");
    let pushed = here.flint(["snapshot", "push", "warm", &reference]);
    assert_eq!(pushed.code, 0, "{pushed:?}");
    assert!(
        pushed.stderr.contains("in memory"),
        "it is told what it gives away: {pushed:?}"
    );
    let by_digest = pushed.stdout.trim();
    here.ok(["rm", "--force", "web"]);

    let mut there = Host::start_beside("flint-there");
    let mut pull = there.command(["snapshot", "pull", by_digest]);
    let mut pull = pull.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    there.wait_for_path(&there.path("state/snapshots/.new-warm"));
    there.kill_daemon();
    pull.wait().unwrap();
    there.start_daemon();
    let left = fs::read_dir(there.path("state/snapshots")).unwrap().count();
    assert_eq!(left, 0, "nothing half-made is left");
    assert_eq!(there.ok(["snapshot", "pull", by_digest]), "warm\n");
    let memory = fs::metadata(there.path("state/snapshots/warm/memory")).unwrap();
    assert_eq!(memory.len(), 0, "its memory is chunks in the store");
    let known = there.ok(["images"]);
    assert!(known.contains("busybox"), "the image came along: {known}");

    there.ok(["run", "--from-snapshot", "warm", "--name", "moved", "--detach"]);
    let first = there.next_numbers("moved", 4);
    assert!(first > 5, "it goes on after {first}");
    assert_eq!(there.ok(["exec", "moved", "--", "cat", "/note"]), "on the disk\n");
    println!("{}", there.ok(["timeline", "moved"]));
    there.ok(["snapshot", "push", "warm", &image("moved/back:1")]);

    here.ok(["run", "--from-snapshot", "warm", "--name", "again", "--detach"]);
    assert_eq!(here.next_numbers("again", 4), first, "both from one moment");
    // What the other host leaves behind is looked for on all of this machine.
    here.ok(["rm", "--force", "again"]);
    there.ok(["stop", "-t", "60", "moved"]);
    assert_eq!(
        there.pod("moved")["status"]["containers"][0]["terminated"]["exitCode"],
        7
    );
}
