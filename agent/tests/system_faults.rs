//! What goes wrong in guests, images and daemons: each ends in a clear word, a live daemon, and nothing left behind
//! (the harness looks for that when a test ends).

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::{fs, io::Read};

use nix::sys::{
    inotify::{AddWatchFlags, InitFlags, Inotify},
    statvfs::statvfs,
};
use serde_json::Value;

use host::{Host, LIMIT, busybox, files, image, kill, peak};

const NEVER: &str = "  restartPolicy: Never\n";

fn reason(host: &Host, name: &str) -> String {
    let pod = host.pod(name);
    pod["status"]["containers"][0]["terminated"]["reason"]
        .as_str()
        .unwrap_or_else(|| panic!("{pod}"))
        .to_owned()
}

/// The daemon works on as if nothing had been.
fn still_works(host: &Host) {
    assert_eq!(host.sh("echo still here").stdout, "still here\n");
}

#[test]
fn an_unknown_image_is_named() {
    let host = Host::start();

    let done = host.flint(["run", "--rm", &image("no-such-image:1"), "--", "true"]);

    assert_eq!(done.code, 125, "{done:?}");
    assert!(done.stderr.contains("no-such-image"), "{done:?}");
    still_works(&host);
}

#[test]
fn a_registry_that_is_down_is_named() {
    let host = Host::start();

    // Nobody listens on the discard port of loopback.
    let done = host.flint(["run", "--rm", "127.0.0.1:9/busybox:1", "--", "true"]);

    assert_eq!(done.code, 125, "{done:?}");
    assert!(done.stderr.contains("127.0.0.1:9"), "{done:?}");
}

#[test]
fn a_disk_that_is_full_fails_the_pull_and_nothing_else() {
    let host = Host::start_on_disk(96 << 20);
    host.start_pod("neighbour", "sleep 1000", NEVER);
    let filler = host.path("state/filler");
    let free = statvfs(&host.path("state")).expect("a file system");
    let free = free.blocks_available() * free.fragment_size();
    fs::write(&filler, vec![0; usize::try_from(free).unwrap() - (4 << 20)]).expect("room for it");

    let done = host.flint(["pull", &image("python:3")]);

    assert_eq!(done.code, 1, "{done:?}");
    assert!(done.stderr.contains("no room in the image store"), "{done:?}");
    assert!(done.stderr.contains("enlarge the disk"), "{done:?}");
    assert_eq!(host.ok(["exec", "neighbour", "--", "echo", "alive"]), "alive\n");
    fs::remove_file(filler).expect("remove it");
    host.ok(["pull", &image("python:3")]);
    still_works(&host);
}

#[test]
fn a_pod_bigger_than_the_host_is_refused() {
    let host = Host::start();

    let done = host.flint(["run", "--rm", "-m", "100Ti", &busybox(), "--", "true"]);

    assert_eq!(done.code, 125, "{done:?}");
    assert!(done.stderr.contains("memory"), "{done:?}");
}

#[test]
fn a_killed_vmm_fails_its_pod_only() {
    let host = Host::start();
    host.start_pod("victim", "sleep 1000", NEVER);
    let victim = host.vmms();
    host.start_pod("neighbour", "sleep 1000", NEVER);
    assert_eq!((victim.len(), host.vmms().len()), (1, 2));

    kill(victim[0]);
    // Its log ends when the container has ended for good.
    host.flint(["logs", "-f", "victim"]);

    assert_eq!(reason(&host, "victim"), "SandboxKilled");
    assert_eq!(host.ok(["exec", "neighbour", "--", "echo", "alive"]), "alive\n");
}

#[test]
fn a_guest_that_panics_is_told_from_one_that_was_killed() {
    let host = Host::start();
    let privileged = format!("    securityContext: {{privileged: true}}\n{NEVER}");

    host.start_pod(
        "panics",
        "sleep 1; echo c > /proc/sysrq-trigger; sleep 1000",
        &privileged,
    );
    host.flint(["logs", "-f", "panics"]);

    let pod = host.pod("panics");
    assert_eq!(reason(&host, "panics"), "SandboxKilled", "{pod}");
    assert!(pod.to_string().to_lowercase().contains("panic"), "{pod}");
}

#[test]
fn a_container_over_its_memory_is_oom_killed() {
    let host = Host::start();
    let limit = format!("    resources: {{limits: {{memory: 32Mi}}}}\n{NEVER}");

    host.start_pod("hungry", "dd if=/dev/zero of=/dev/null bs=48M count=1", &limit);
    host.flint(["logs", "-f", "hungry"]);

    assert_eq!(reason(&host, "hungry"), "OOMKilled", "{}", host.pod("hungry"));
}

#[test]
fn forks_without_end_stay_in_their_guest() {
    let host = Host::start();
    host.start_pod("bomb", "f() { f | f & }; f; sleep 1000", NEVER);

    host.ok(["stop", "-t", "1", "bomb"]);

    still_works(&host);
}

#[test]
fn a_full_disk_is_the_guests_own() {
    let host = Host::start();

    let done = host
        .sh("dd if=/dev/zero of=/fill bs=1M 2>&1 | grep -o 'No space left'; rm /fill && echo x > /after && cat /after");

    assert_eq!(done.stdout, "No space left\nx\n", "{done:?}");
}

/// Follows a flood of `count` lines, each its number and so many bytes long: all come, in order, while flintd's memory and
/// what it keeps stay bounded.
fn follows_a_flood(program: &str, count: u32, length: usize) {
    let host = Host::start();
    host.start_pod("flood", program, NEVER);
    let before = host.daemon_peak();

    let (mut follower, lines) = host.follow("flood");
    for number in 1..=count {
        let line = lines
            .recv_timeout(LIMIT)
            .unwrap_or_else(|error| panic!("line {number}: {error}\n{}", host.pod("flood")));
        let found = line.split_whitespace().next().and_then(|found| found.parse().ok());
        assert_eq!((found, line.len() + 1), (Some(number), length), "{line}");
    }
    let rest: Vec<_> = lines.iter().collect();
    let mut said = String::new();
    follower.stderr.take().unwrap().read_to_string(&mut said).unwrap();

    assert_eq!(rest, ["the end"], "{}", host.pod("flood"));
    assert!(follower.wait().unwrap().success(), "{said}");
    let grown = host.daemon_peak() - before;
    assert!(grown < 32 * 1024, "flintd grew by {grown} KiB");
    assert_eq!(reason(&host, "flood"), "Completed");
    let mut du = std::process::Command::new("du");
    du.args(["-sk"]).arg(host.path("state").join("logs"));
    let kept: u64 = host::run(du).stdout.split_whitespace().next().unwrap().parse().unwrap();
    assert!(kept < 60 * 1024, "{kept} KiB are kept");
}

#[test]
fn a_flood_of_long_lines_comes_whole_and_in_order() {
    let line = r#"printf "%0199d\n", i"#;
    let program = format!("awk 'BEGIN {{ for (i = 1; i <= 160000; i++) {line} }}'; echo the end");
    follows_a_flood(&program, 160_000, 200);
}

#[test]
fn a_flood_of_short_lines_comes_whole_and_in_order() {
    let program = "seq -w 400000; echo the end";
    follows_a_flood(program, 400_000, 7);
}

/// Opens 1,500 streams to the host, some hundred at a time, on flint-init's own port, which is the host's to answer, and on others, and
/// says garbage on each.
const VSOCK_FLOOD: &str = r"
import _socket
AF_VSOCK, HOST = 40, 2
held, opened, refused = [], 0, 0
for number in range(1500):
    stream = _socket.socket(AF_VSOCK, 1)
    try:
        stream.connect((HOST, 1024 + number % 3))
        opened += 1
        stream.send(b'\xff\x00garbage' * 500)
    except OSError:
        refused += 1
    held = held[-400:] + [stream]
print('opened' if opened else 'none', 'done')
";

#[test]
fn a_guest_that_floods_its_vsock_hurts_itself_only() {
    let host = Host::start();
    host.start_pod("neighbour", "sleep 1000", NEVER);
    host.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: flooder}}\nspec:\n  terminationGracePeriodSeconds: 2\n  containers:\n  \
         - name: main\n    image: {}\n    command: [sleep, '1000']\n{NEVER}",
        image("python:3")
    ));
    let vmms = host.vmms();
    let before: Vec<_> = vmms.iter().map(|pid| (peak(*pid), files(*pid))).collect();
    let (memory, open) = (host.daemon_peak(), host.daemon_files());

    let flood = host.flint(["exec", "flooder", "--", "python3", "-c", VSOCK_FLOOD]);

    assert_eq!(flood.stdout, "opened done\n", "{flood:?}");
    // Both pods answer, over the very device that was flooded.
    let alive = ["exec", "flooder", "--", "python3", "-c", "print('alive')"];
    assert_eq!(host.ok(alive), "alive\n");
    assert_eq!(host.ok(["exec", "neighbour", "--", "echo", "alive"]), "alive\n");
    for (pid, (memory, open)) in vmms.iter().zip(before) {
        // Guest memory that was touched meanwhile counts as the VMM's.
        let (grown, more) = (peak(*pid).saturating_sub(memory), files(*pid).saturating_sub(open));
        assert!(grown < 128 * 1024 && more < 300, "{grown} KiB, {more} files more");
    }
    let (grown, more) = (
        host.daemon_peak().saturating_sub(memory),
        host.daemon_files().saturating_sub(open),
    );
    assert!(grown < 16 * 1024 && more < 20, "flintd: {grown} KiB, {more} files more");
}

fn ended(host: &Host, name: &str) -> (Value, Value) {
    host.flint(["logs", "-f", name]);
    let pod = host.pod(name);
    let end = &pod["status"]["containers"][0]["terminated"];
    (end["exitCode"].clone(), end["signal"].clone())
}

#[test]
fn a_first_process_that_a_signal_ends_is_told_with_the_signal() {
    let host = Host::start();

    // The first of a PID namespace is spared signals that it sends to itself, but not its own faults.
    let python = image("python:3");
    let fault = "import os; os.abort()";
    let done = host.flint(["run", "--name", "faults", &python, "--", "python3", "-c", fault]);
    host.start_pod(
        "shared",
        // In a manifest, `$$` is a `$`.
        "kill -TERM $$$$; sleep 1000",
        &format!("  shareProcessNamespace: true\n{NEVER}"),
    );

    // abort(3), whose signal is passed over, ends in a forbidden instruction.
    assert_eq!(done.code, 139, "{done:?}");
    assert_eq!(ended(&host, "faults"), (139.into(), 11.into()));
    assert_eq!(ended(&host, "shared"), (143.into(), 15.into()));
}

#[test]
fn a_guest_that_spins_on_all_its_cpus_can_be_stopped() {
    let host = Host::start();
    let both = format!("    resources: {{limits: {{cpu: 2}}}}\n{NEVER}");
    host.start_pod("spins", "while :; do :; done & while :; do :; done", &both);

    host.ok(["stop", "-t", "1", "spins"]);

    assert_eq!(
        host.pod("spins")["status"]["containers"][0]["terminated"]["exitCode"],
        137
    );
}

/// Waits until the folder of some sandbox has a file of this name.
fn until_a_sandbox_has(host: &Host, name: &str) {
    let sandboxes = host.path("run/sandboxes");
    let news = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    loop {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify");
        watch.add_watch(&sandboxes, news).expect("inotify");
        let folders: Vec<_> = fs::read_dir(&sandboxes)
            .expect("the folder of sandboxes")
            .flatten()
            .map(|entry| entry.path())
            .collect();
        for folder in &folders {
            // Gone again meanwhile, as one of an earlier flintd is.
            let _ = watch.add_watch(folder, news);
        }
        if folders.iter().any(|folder| folder.join(name).exists()) {
            return;
        }
        watch.read_events().expect("inotify");
    }
}

#[test]
fn a_pod_survives_flintds_that_are_killed_while_it_starts_and_runs_once() {
    let mut host = Host::start();
    let manifest = host.path("once.yaml");
    let image = busybox();
    let yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: once}}\nspec:\n  restartPolicy: Never\n  containers:\n  - name: main\n    \
         image: {image}\n    command: [sh, -c, 'echo once; sleep 2; exit 5']\n"
    );
    fs::write(&manifest, yaml).unwrap();

    host.ok(["apply", "-f", manifest.to_str().unwrap()]);
    // Just accepted; a VMM was made; the guest booted; the container runs.
    for file in [None, Some("vmm.log"), Some("ready")] {
        if let Some(file) = file {
            until_a_sandbox_has(&host, file);
        }
        host.kill_daemon();
        host.start_daemon();
    }
    let log = host.ok(["logs", "-f", "once"]);

    assert_eq!(log, "once\n");
    let pod = host.pod("once");
    let container = &pod["status"]["containers"][0];
    assert_eq!(container["terminated"]["exitCode"], 5, "{pod}");
    assert_eq!(container["restartCount"], 0, "{pod}");
}

#[test]
fn garbage_on_the_socket_does_not_hurt() {
    use std::io::{Read, Write};
    let host = Host::start();

    for garbage in [
        &b"\0\0\0\0"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff",
        &[0xaa; 70_000],
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(host.socket()).unwrap();
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }

    assert_eq!(host.flint(["ps"]).code, 0);
}
