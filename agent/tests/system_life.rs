//! The life of a running pod beside start and end: it is paused, goes on, and is saved.

mod host;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use host::{Host, LIMIT, busybox};

/// Prints numbers, some each second.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done";

/// The word for a pod's state in the table of pods.
fn status(host: &Host, name: &str) -> Option<String> {
    let table = host.ok(["ps", "-a"]);
    let line = table.lines().find(|line| line.contains(name))?;
    line.split_whitespace().nth(3).map(str::to_owned)
}

#[test]
fn a_paused_pod_stands_still_over_a_restart_of_flintd_and_goes_on_where_it_stood() {
    let mut host = Host::start();
    host.start_pod("counts", COUNTS, "");
    let (mut follower, lines) = host.follow("counts");
    lines.recv_timeout(LIMIT).expect("it counts");

    host.ok(["pause", "counts"]);

    assert_eq!(status(&host, "counts").as_deref(), Some("Paused"));
    let refused = host.flint(["exec", "counts", "--", "true"]);
    assert!(
        refused.code == 125 && refused.stderr.contains("resume it first"),
        "{refused:?}"
    );
    host.kill_daemon();
    follower.wait().expect("it ends with flintd");
    host.start_daemon();
    assert_eq!(status(&host, "counts").as_deref(), Some("Paused"));
    let before = host.ok(["logs", "counts"]);
    host.ok(["pause", "counts"]);
    assert_eq!(host.ok(["logs", "counts"]), before, "it does not count in the pause");

    host.ok(["resume", "counts"]);

    assert_eq!(status(&host, "counts").as_deref(), Some("Running"));
    let (mut follower, lines) = host.follow("counts");
    let more = before.lines().count() + 3;
    let all: Vec<_> = (0..more)
        .map(|_| lines.recv_timeout(LIMIT).expect("it goes on"))
        .collect();
    let counted: Vec<_> = (1..=more).map(|number| number.to_string()).collect();
    assert_eq!(all, counted, "each number once, over the pause and the restart");
    follower.kill().expect("kill");
    follower.wait().expect("wait");
}

#[test]
fn the_clock_of_a_resumed_pod_is_right() {
    let mut host = Host::start();
    host.start_pod("clock", "sleep 1000", "");
    host.ok(["pause", "clock"]);
    // Takes a while.
    host.kill_daemon();
    host.start_daemon();
    host.ok(["resume", "clock"]);

    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970")
            .as_secs()
    };
    let earliest = now();
    let shown: u64 = host
        .ok(["exec", "clock", "--", "date", "+%s"])
        .trim()
        .parse()
        .expect("seconds");
    assert!(
        (earliest - 1..=now() + 1).contains(&shown),
        "{earliest} {shown} {}",
        now()
    );
}

#[test]
fn a_paused_pod_can_be_stopped_and_killed() {
    let host = Host::start();
    let traps = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    for name in ["stopped", "killed"] {
        host.start_pod(name, traps, "");
        let (mut follower, lines) = host.follow(name);
        assert_eq!(lines.recv_timeout(LIMIT).as_deref(), Ok("ready"));
        host.ok(["pause", name]);
        follower.kill().expect("kill");
        follower.wait().expect("wait");
    }

    host.ok(["stop", "-t", "60", "stopped"]);
    host.ok(["stop", "-t", "0", "killed"]);

    assert_eq!(host.ok(["logs", "stopped"]), "ready\nbye\n");
    assert_eq!(host.ok(["logs", "killed"]), "ready\n");
    let code = |name| host.pod(name)["status"]["containers"][0]["terminated"]["exitCode"].clone();
    assert_eq!((code("stopped"), code("killed")), (5.into(), 137.into()));
}

#[test]
fn a_pod_that_has_not_changed_since_flintd_was_started_anew_is_removed_and_waited_for() {
    let mut host = Host::start();
    host.start_pod("idle", "sleep 1000", "");
    host.ok(["pause", "idle"]);
    // What flintd remembers begins with the last change before its start, which is this one's.
    host.start_pod("later", "sleep 1000", "");
    host.kill_daemon();
    host.start_daemon();
    host.ok(["rm", "--force", "idle"]);
    assert_eq!(host.json(["ps", "--all"])["pods"].as_array().map(Vec::len), Some(1));
}

/// How many files a folder of flintd's state has.
fn entries(host: &Host, folder: &str) -> usize {
    fs::read_dir(host.path("state").join(folder)).map_or(0, Iterator::count)
}

#[test]
fn a_running_pod_is_saved_with_what_it_wrote_and_goes_on() {
    let mut host = Host::start();
    host.start_pod("web", &format!("echo on the disk > /note; {COUNTS}"), "");
    let (mut follower, lines) = host.follow("web");
    assert_eq!(lines.recv_timeout(LIMIT).as_deref(), Ok("1"));

    let snapshot = host.json(["snapshot", "create", "web", "first"]);

    for number in 2..6 {
        let line = lines.recv_timeout(LIMIT).expect("it goes on, and nobody is cut off");
        assert_eq!(line, number.to_string());
    }
    follower.kill().expect("kill");
    follower.wait().expect("wait");
    let folder = host.path("state/snapshots/first");
    // What the guest wrote and did not sync is in its memory, not on its disk: both are there, and the disk is sound.
    let check = Command::new("e2fsck")
        .arg("-fn")
        .arg(folder.join("scratch"))
        .output()
        .expect("e2fsck runs");
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let length = |name| fs::metadata(folder.join(name)).expect("it is there").len();
    assert!(length("memory") > 64 << 20 && length("state") > 0);
    let stored = snapshot["storedBytes"].as_u64().expect("a number");
    assert!(
        stored < length("memory") + length("scratch"),
        "holes cost nothing: {snapshot}"
    );

    let refused = host.flint(["images", "rm", &busybox()]);
    assert!(refused.stderr.contains("snapshot"), "{refused:?}");
    host.kill_daemon();
    host.start_daemon();
    assert!(host.ok(["snapshots"]).contains("default/web"));
    host.ok(["snapshot", "rm", "first"]);
    assert_eq!(entries(&host, "snapshots"), 0);
}

#[test]
fn a_flintd_or_a_vmm_that_is_killed_over_a_snapshot_leaves_nothing_of_it() {
    let mut host = Host::start();
    host.start_pod("web", COUNTS, "");
    let create = |host: &Host| {
        let mut command = host.command(["snapshot", "create", "web", "x"]);
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts")
    };
    let being_made = |host: &Host| {
        let deadline = Instant::now() + LIMIT;
        // The VMM writes the memory file: until then nothing tells that it has begun.
        while fs::metadata(host.path("state/snapshots/.new-x/memory")).map_or(0, |data| data.blocks()) == 0 {
            assert!(Instant::now() < deadline, "it is not being made");
            thread::yield_now();
        }
    };

    let mut client = create(&host);
    being_made(&host);
    host.kill_daemon();
    client.wait().expect("wait");
    host.start_daemon();
    assert_eq!(entries(&host, "snapshots"), 0);
    assert_eq!(status(&host, "web").as_deref(), Some("Running"));
    host.ok(["exec", "web", "--", "true"]);

    let mut client = create(&host);
    being_made(&host);
    host::kill(host.vmms()[0]);
    assert_eq!(client.wait().expect("wait").code(), Some(1));
    assert_eq!(entries(&host, "snapshots"), 0);
}

#[test]
fn a_full_disk_fails_a_snapshot_and_the_pod_goes_on() {
    let host = Host::start_on_disk(160 << 20);
    host.start_pod("web", "sleep 1000", "");
    // Leaves a fraction of what the guest has in memory.
    let mut filler = fs::File::create(host.path("state/filler")).expect("make a file");
    let full = io::copy(&mut io::repeat(1), &mut filler).expect_err("the disk gets full");
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    let length = filler.metadata().expect("it is there").len();
    filler.set_len(length - (4 << 20)).expect("make some room");

    let refused = host.flint(["snapshot", "create", "web"]);

    assert!(refused.code == 1 && refused.stderr.contains("no room"), "{refused:?}");
    assert_eq!(entries(&host, "snapshots"), 0);
    host.ok(["exec", "web", "--", "true"]);
}
