//! Pods whose machines are clones of a template, with real Linux guests: what a user sees is what a booted pod shows, sooner, and
//! no two of them are the same.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::{
    collections::HashSet,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use host::{Done, Host, busybox};
use serde_json::Value;

/// What must differ between any two machines, a line each; then the time.
const SELF: &str = "hostname; cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 | awk '{print $4}'; \
    cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; date +%s";
const OWN_LINES: usize = 6;

fn stages(host: &Host, pod: &str) -> Vec<(String, f64)> {
    let timeline = host.json(["timeline", pod]);
    println!("{pod}: {}", host.ok(["timeline", pod]));
    let seconds = |stage: &Value| {
        stage["duration"]
            .as_str()
            .unwrap_or("0s")
            .trim_end_matches('s')
            .parse()
            .unwrap()
    };
    let stages = timeline["timeline"].as_array().unwrap().iter();
    stages
        .map(|stage| (stage["name"].as_str().unwrap().to_owned(), seconds(stage)))
        .collect()
}

fn is_clone(host: &Host, pod: &str) -> bool {
    let stages = stages(host, pod);
    let has = |name: &str| stages.iter().any(|(stage, _)| stage == name);
    assert!(has("pool.claim") != has("vmm.boot"), "one way or the other: {stages:?}");
    has("pool.claim")
}

/// Runs a pod that tells of itself.
fn run(host: &Host, name: &str) -> Done {
    host.flint(["run", "--name", name, &busybox(), "--", "sh", "-c", SELF])
}

/// What it told, if it told all; its clock must be right.
fn told(done: &Done) -> Vec<String> {
    let mut lines: Vec<_> = done.stdout.lines().map(String::from).collect();
    assert_eq!((done.code, lines.len()), (0, OWN_LINES + 1), "{done:?}");
    let time = Duration::from_secs(lines.pop().unwrap().parse().unwrap());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    // It printed that some time before it ended, and flint some time after that.
    assert!(now.abs_diff(time) < Duration::from_secs(20), "{time:?} {now:?}");
    lines
}

fn assert_all_differ(machines: &[Vec<String>]) {
    for line in 0..OWN_LINES {
        let values: HashSet<_> = machines.iter().map(|lines| &lines[line]).collect();
        assert_eq!(values.len(), machines.len(), "{line}: {machines:#?}");
    }
}

#[test]
fn pods_are_clones_that_differ_in_all_that_must_differ() {
    let host = Host::with_pool(2);
    let mut machines = Vec::new();
    for number in 0..12 {
        let name = format!("p{number}");
        machines.push(told(&run(&host, &name)));
        assert!(is_clone(&host, &name), "{}", host.daemon_log());
        host.ok(["rm", &name]);
        host.wait_pool_full(number + 2);
    }
    assert_all_differ(&machines);
}

#[test]
fn pods_at_once_are_clones_each() {
    let host = Host::with_pool(4);
    // Its image is here by then.
    told(&run(&host, "first"));
    host.wait_pool_full(2);
    let names = ["a", "b", "c", "d"];
    let done = thread::scope(|scope| {
        let runs = names.map(|name| scope.spawn(|| run(&host, name)));
        runs.map(|run| run.join().unwrap())
    });
    assert_all_differ(&done.iter().map(told).collect::<Vec<_>>());
    for name in names {
        assert!(is_clone(&host, name), "{}", host.daemon_log());
    }
}

#[test]
fn a_clone_is_exec_ed_into_logs_is_stopped_and_reached_as_a_booted_pod_is() {
    let host = Host::with_pool(2);
    host.start_pod(
        "server",
        "mkdir /www; echo served > /www/index.html; echo up; trap 'echo bye; exit 4' TERM; httpd -p 80 -h /www; while :; do usleep 50000; done",
        "  restartPolicy: Never\n",
    );
    assert!(is_clone(&host, "server"));
    let exec = host.flint(["exec", "server", "--", "sh", "-c", "echo inside; exit 3"]);
    assert_eq!((exec.code, exec.stdout.as_str()), (3, "inside\n"), "{exec:?}");

    let address = host.pod("server")["status"]["podIps"][0].as_str().unwrap().to_owned();
    host.wait_pool_full(2);
    let line = format!(
        "for i in 1 2 3 4 5 6 7 8 9 10; do wget -q -O - http://{address}/ && exit; usleep 200000; done; exit 1"
    );
    let client = host.flint(["run", "--name", "client", &busybox(), "--", "sh", "-c", &line]);
    assert_eq!((client.code, client.stdout.as_str()), (0, "served\n"), "{client:?}");
    assert!(is_clone(&host, "client"));

    host.ok(["stop", "-t", "20", "server"]);
    assert_eq!(host.ok(["logs", "server"]), "up\nbye\n");
    let pod = host.pod("server");
    assert_eq!(pod["status"]["containers"][0]["terminated"]["exitCode"], 4, "{pod}");
}

#[test]
fn a_killed_flintd_finds_its_clones_again_and_takes_the_template_as_it_is() {
    let mut host = Host::with_pool(2);
    host.start_pod(
        "long",
        "i=0; while :; do echo $i; i=$((i + 1)); usleep 100000; done",
        "",
    );
    assert!(is_clone(&host, "long"));
    let uuid = |host: &Host| host.ok(["exec", "long", "--", "cat", "/proc/sys/kernel/random/boot_id"]);
    let before = uuid(&host);

    host.kill_daemon();
    host.start_daemon();
    assert_eq!(before, uuid(&host), "it is the same machine");
    host.assert_counts("long", 40);
    assert_eq!(host.pod("long")["status"]["containers"][0]["restartCount"], 0);
    host.wait_pool_full(2);
    assert_eq!(
        host.daemon_log().matches("made a template").count(),
        1,
        "{}",
        host.daemon_log()
    );
}
