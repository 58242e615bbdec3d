//! Pods that begin as others were: forked from one that runs, or made of a snapshot, with real Linux guests.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::{
    collections::HashSet,
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use host::{COUNTS, Host, busybox};

const NEVER: &str = "  restartPolicy: Never\n";
/// What must differ between any two machines, a line each.
const SELF: &str = "hostname; cat /etc/hostname /etc/machine-id /sys/class/net/eth0/address; \
    ip -4 -o addr show eth0 | awk '{print $4}'; grep -o \"[0-9.]*.$(hostname)\\$\" /etc/hosts; cat /proc/sys/kernel/random/uuid; \
    head -c 16 /dev/urandom | od -An -tx1";

/// The next numbers of a pod's log, which follow one another; the first of them.
fn counts(host: &Host, name: &str, lines: usize) -> u64 {
    host.next_numbers(name, lines)
}

/// A pod that counts and has come to a number.
fn counting(host: &Host, name: &str, line: &str, to: usize) {
    host.start_pod(name, line, NEVER);
    assert_eq!(counts(host, name, to), 1);
}

fn of_itself(host: &Host, name: &str) -> Vec<String> {
    let said = host.ok(["exec", name, "--", "sh", "-c", SELF]);
    said.lines().map(str::to_owned).collect()
}

fn entries(host: &Host, folder: &str) -> usize {
    fs::read_dir(host.path("state").join(folder)).map_or(0, Iterator::count)
}

#[test]
fn forks_go_on_where_their_parent_stood_and_are_machines_of_their_own() {
    let host = Host::start();
    counting(&host, "web", COUNTS, 5);

    let names = host.ok(["fork", "web", "--count", "3"]);

    let names: Vec<_> = names.lines().collect();
    assert_eq!(names, ["web-1", "web-2", "web-3"]);
    println!("{}", host.ok(["timeline", "web-1"]));
    let firsts: HashSet<_> = names.iter().map(|name| counts(&host, name, 4)).collect();
    assert_eq!(firsts.len(), 1, "all go on from one moment: {firsts:?}");
    assert!(
        firsts.iter().all(|first| *first > 5),
        "after what the parent's log has: {firsts:?}"
    );
    counts(
        &host,
        "web",
        usize::try_from(firsts.into_iter().max().unwrap()).unwrap() + 4,
    );

    let machines: Vec<_> = names
        .iter()
        .chain(&["web"])
        .map(|name| of_itself(&host, name))
        .collect();
    for line in 0..machines[0].len() {
        let values: HashSet<_> = machines.iter().map(|lines| &lines[line]).collect();
        assert_eq!(
            (values.len(), machines[line % 4].len()),
            (4, 8),
            "{line}: {machines:#?}"
        );
    }
    let addresses = names
        .iter()
        .map(|name| host.pod(name)["status"]["podIps"][0].to_string());
    assert_eq!(addresses.collect::<HashSet<_>>().len(), 3);
    assert_eq!(machines[1][0], "web-2");

    host.ok(["stop", "-t", "60", "web-2"]);
    let ended = host.pod("web-2");
    assert_eq!(ended["status"]["containers"][0]["terminated"]["exitCode"], 7, "{ended}");
    assert_eq!(ended["status"]["containers"][0]["restartCount"], 0);
    assert!(host.ok(["logs", "web-2"]).ends_with("\nbye\n"));
    assert_eq!(entries(&host, "snapshots"), 0, "what they were made of is gone");
}

#[test]
fn a_snapshot_is_run_when_its_pod_is_gone_and_refused_when_it_is_damaged() {
    let mut host = Host::start();
    let ends = "echo on the disk > /note; n=0; while [ $n -lt 60 ]; do n=$((n+1)); echo $n; sleep 0.2; done; exit 5";
    counting(&host, "web", ends, 3);
    host.ok(["snapshot", "create", "web", "first"]);
    host.ok(["rm", "--force", "web"]);

    let again = host.flint(["run", "--from-snapshot", "first", "--name", "again"]);
    assert_eq!(again.code, 5, "{again:?}");
    let numbers: Vec<u64> = again.stdout.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers, (numbers[0]..=60).collect::<Vec<_>>());
    assert!(numbers[0] > 3, "{numbers:?}");

    host.ok(["run", "--from-snapshot", "first", "--name", "third", "--detach"]);
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(
        counts(&host, "third", 5),
        numbers[0],
        "each of them from the same moment"
    );
    assert_eq!(host.ok(["exec", "third", "--", "cat", "/note"]), "on the disk\n");
    assert_eq!(host.ok(["snapshots"]).lines().count(), 2, "it stays");

    let state = File::options()
        .write(true)
        .open(host.path("state/snapshots/first/state"))
        .unwrap();
    state.write_all_at(b"damaged", 600).unwrap();
    let refused = host.flint(["run", "--from-snapshot", "first", "--rm"]);
    assert_eq!(refused.code, 125, "{refused:?}");
    assert!(refused.stderr.contains("SnapshotRefused"), "{refused:?}");
    let missing = host.flint(["run", "--from-snapshot", "second"]);
    assert!(missing.stderr.contains("flint snapshots"), "{missing:?}");
}

#[test]
fn a_paused_pod_is_forked_and_stays_paused_and_a_killed_flintd_goes_on_with_the_forks() {
    let mut host = Host::start();
    counting(&host, "web", COUNTS, 3);
    host.ok(["pause", "web"]);

    let names = host.ok(["fork", "web", "--count", "2", "--name", "fork", "--detach"]);
    host.kill_daemon();
    host.start_daemon();

    for name in names.lines() {
        counts(&host, name, 4);
        host.ok(["exec", name, "--", "true"]);
    }
    assert!(host.pod("web")["status"]["pausedAt"].is_string());
    let taken = host.flint(["fork", "web", "--name", "fork-1"]);
    assert_eq!(taken.code, 1, "{taken:?}");
    assert!(taken.stderr.contains("fork-1"), "{taken:?}");
    let many = host.flint(["fork", "web", "--count", "64"]);
    assert!(many.stderr.contains("OutOf"), "no room for all of them: {many:?}");
    assert_eq!(host.json(["ps"])["pods"].as_array().unwrap().len(), 3, "all or none");
    assert_eq!(entries(&host, "snapshots"), 0);
}

#[test]
fn a_pod_puts_itself_in_order_before_it_is_saved_and_behind_the_fence_where_it_goes_on() {
    let host = Host::start();
    // Its gateway answers, unless nothing leaves the sandbox yet.
    let after = "ping -c 1 -W 1 $(ip route | awk '/default/ {print $3}') >/dev/null && echo open >> /note || echo fenced >> /note";
    host.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: warm\n  annotations:\n    flint.dev/before-snapshot: '[\"main\", \"sh\", \"-c\", \"echo saved >> \
         /note\"]'\n    flint.dev/after-restore: {}\nspec:\n  containers:\n  - name: main\n    image: {}\n    command: [sh, -c, {}]\n",
        serde_json::to_string(&serde_json::to_string(&["main", "sh", "-c", after]).unwrap()).unwrap(),
        busybox(),
        serde_json::to_string(COUNTS).unwrap(),
    ));

    host.ok(["snapshot", "create", "warm", "w"]);
    host.ok(["run", "--from-snapshot", "w", "--name", "clone", "--detach"]);
    counts(&host, "clone", 1);
    host.ok(["fork", "clone", "--name", "fork"]);

    let note = |name| host.ok(["exec", name, "--", "cat", "/note"]);
    println!("{}", host.ok(["timeline", "clone"]));
    assert_eq!(note("warm"), "saved\n");
    assert_eq!(note("clone"), "saved\nfenced\nsaved\n");
    assert_eq!(note("fork"), "saved\nfenced\nsaved\nfenced\n");
    let open = host.flint([
        "exec",
        "clone",
        "--",
        "sh",
        "-c",
        "ping -c 1 -W 5 $(ip route | awk '/default/ {print $3}')",
    ]);
    assert_eq!(open.code, 0, "{open:?}");
}
