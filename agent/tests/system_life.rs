//! The life of a running pod beside start and end: it is paused, and goes on.

mod host;

use std::time::{SystemTime, UNIX_EPOCH};

use host::{Host, LIMIT};

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
