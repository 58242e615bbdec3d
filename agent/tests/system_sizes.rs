//! One template fits any pod: clones of every size, with real Linux guests.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use host::{Host, LIMIT, busybox};

const MIB: u64 = 1 << 20;

fn is_clone(host: &Host, pod: &str) -> bool {
    let timeline = host.json(["timeline", pod]);
    println!("{pod}: {}", host.ok(["timeline", pod]));
    let stages = timeline["timeline"].as_array().unwrap().iter();
    let names: Vec<_> = stages.map(|stage| stage["name"].as_str().unwrap()).collect();
    names.contains(&"pool.claim") && names.contains(&"guest.size") && !names.contains(&"vmm.boot")
}

/// What a container sees of its size: CPUs, its limit, and the machine's memory once it is `least` KiB; then it uses some of it.
fn size_line(least: u64) -> String {
    let total = "awk '/MemTotal/ {print $2}' /proc/meminfo";
    format!(
        "nproc; cat /sys/fs/cgroup/memory.max; for i in $(seq 300); do [ $({total}) -ge {least} ] && break; usleep 100000; done; \
         {total}; dd if=/dev/zero of=/dev/shm/used bs=1M count=50 2>/dev/null && echo used"
    )
}

#[test]
fn pods_of_any_size_are_clones_of_one_template() {
    let host = Host::with_pool(2);
    // What its container may use; what its machine has is 64 MiB more. The kernel keeps some of that for itself.
    for (number, (cpus, mib)) in [(1, 65), (2, 1024), (1, 300)].into_iter().enumerate() {
        let name = format!("p{number}");
        let (limit, machine) = (mib * MIB, (mib + 64).next_multiple_of(2) << 10);
        let (least, line) = (machine - (48 << 10), size_line(machine - (48 << 10)));
        let (cpus, memory) = (format!("{cpus}"), format!("{mib}Mi"));
        let args = ["run", "--name", &name, "--cpus", &cpus, "--memory", &memory];
        let image = busybox();
        let done = host.flint(args.into_iter().chain([image.as_str(), "--", "sh", "-c", &line]));
        assert!(is_clone(&host, &name), "{done:?} {}", host.daemon_log());
        let told: Vec<_> = done.stdout.lines().collect();
        let [nproc, max, total, used] = told[..] else {
            panic!("{done:?}")
        };
        assert_eq!(
            (nproc, max.parse(), used),
            (cpus.as_str(), Ok(limit), "used"),
            "{done:?}"
        );
        let total: u64 = total.parse().unwrap();
        assert!((least..=machine).contains(&total), "{total} of {machine} KiB: {done:?}");
        host.ok(["rm", &name]);
        host.wait_pool_full(number + 2);
    }
    assert_eq!(host.daemon_log().matches("made a template").count(), 1);
}

#[test]
fn a_clones_cgroup_grows_with_its_pod() {
    /// Of a VMM with so much guest memory: its own and page tables are added.
    fn limit(guest: u64) -> u64 {
        guest + 64 * MIB + guest / 256
    }
    let host = Host::with_pool(2);
    host.start_pod("large", "sleep 1000", "    resources: {limits: {memory: 1Gi}}\n");
    host.wait_pool_full(2);
    assert!(is_clone(&host, "large"), "{}", host.daemon_log());
    let cgroups = fs::read_dir("/sys/fs/cgroup/flint").unwrap().flatten();
    let limits = cgroups.filter_map(|entry| fs::read_to_string(entry.path().join("memory.max")).ok());
    let mut limits: Vec<u64> = limits.filter_map(|limit| limit.trim().parse().ok()).collect();
    limits.sort_unstable();
    let parked = limit(128 * MIB);
    assert_eq!(limits, [parked, parked, limit((1024 + 64) * MIB)]);
}

const LARGE: &str = "    resources: {limits: {memory: 256Mi}}\n";

/// What all sandboxes take of the host's memory.
fn sandboxes_memory() -> u64 {
    let total = fs::read_to_string("/sys/fs/cgroup/flint/memory.current").unwrap();
    total.trim().parse().unwrap()
}

/// Fills and frees memory, and waits until the host has it again.
fn assert_gives_back(host: &Host, pod: &str) {
    const USED: u64 = 60 * MIB;
    // What it may have free already, or take beside and not give back: caches of its kernel, parts of huge pages.
    const REST: u64 = USED / 4;
    let before = sandboxes_memory();
    host.ok([
        "exec",
        pod,
        "--",
        "dd",
        "if=/dev/urandom",
        "of=/dev/shm/used",
        "bs=1M",
        "count=60",
    ]);
    let used = sandboxes_memory();
    assert!(used >= before + USED - REST, "{before} {used}");
    host.ok(["exec", pod, "--", "rm", "/dev/shm/used"]);
    let end = Instant::now() + LIMIT;
    while sandboxes_memory() > before + REST {
        assert!(Instant::now() < end, "{before} {used} {}", sandboxes_memory());
        thread::sleep(Duration::from_millis(200));
    }
}

/// Memory of the largest of a host's VMMs that is in use, guest included.
fn resident(host: &Host) -> u64 {
    let of = |pid| fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let kib = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    let all = host.vmms().into_iter().filter_map(|pid| kib(of(pid)));
    all.max().expect("there is one") << 10
}

/// Writes a file, which stays in the guest's memory as one that was read does, and waits until the host has that again.
fn assert_gives_files_back(host: &Host, pod: &str) {
    const FILE: u64 = 80 * MIB;
    // What may have been free already, and what is still in use.
    const REST: u64 = FILE / 4;
    let before = resident(host);
    let line = "dd if=/dev/zero of=/file bs=1M count=80 2>/dev/null && sync";
    host.ok(["exec", pod, "--", "sh", "-c", line]);
    let used = resident(host);
    assert!(used >= before + FILE - REST, "{before} {used}");
    let end = Instant::now() + LIMIT;
    // Not down to what was before: the program that wrote it has left something, too.
    while resident(host) > used - (FILE - REST) {
        assert!(Instant::now() < end, "{before} {used} {}", resident(host));
        thread::sleep(Duration::from_millis(200));
    }
    println!(
        "resident before: {before}, with the file: {used}, idle: {}",
        resident(host)
    );
    let same = host.flint(["exec", pod, "--", "sh", "-c", "[ $(wc -c </file) = 83886080 ]"]);
    assert_eq!(same.code, 0, "{same:?}");
}

#[test]
fn a_clone_gives_back_memory_that_it_has_freed_and_when_it_is_idle_that_of_files() {
    let host = Host::with_pool_and(1, |_| vec!["--idle-reclaim=4".to_owned()]);
    host.start_pod("clone", "sleep 1000", LARGE);
    host.wait_pool_full(2);
    assert!(is_clone(&host, "clone"), "{}", host.daemon_log());
    assert_gives_back(&host, "clone");
    assert_gives_files_back(&host, "clone");
}

#[test]
fn a_booted_pod_gives_back_memory_that_it_has_freed() {
    let host = Host::start();
    host.start_pod("booted", "sleep 1000", LARGE);
    assert_gives_back(&host, "booted");
}
