//! Pods whose machines are clones of a template, with real Linux guests: what a user sees is what a booted pod shows, sooner, and
//! no two of them are the same.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::{
    collections::{HashMap, HashSet},
    fs,
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use host::{Done, Host, LIMIT, busybox, image};
use nix::{
    net::if_::if_indextoname,
    sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt},
};
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

/// Faults that a pod's vCPUs met until it said that it was there. It goes on, so that its VMM can be asked (proc(5)).
fn faults_until_it_tells(host: &Host, name: &str) -> (Vec<String>, u64) {
    host.start_pod(name, &format!("{SELF}; sleep 1000"), "");
    let (_follower, lines) = host.follow(name);
    let told = (0..OWN_LINES).map(|_| lines.recv_timeout(LIMIT).unwrap()).collect();
    let pod = host.running_vmms();
    assert_eq!(pod.len(), 1, "it is alone: {pod:?}");
    let tasks = fs::read_dir(format!("/proc/{}/task", pod[0])).unwrap();
    let stats = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    let vcpus = stats.filter(|stat| stat.contains("(vcpu"));
    let faults = vcpus.map(|stat| {
        stat.rsplit_once(") ")
            .unwrap()
            .1
            .split(' ')
            .nth(7)
            .unwrap()
            .parse::<u64>()
    });
    (told, faults.sum::<Result<u64, _>>().unwrap())
}

#[test]
fn pods_are_clones_that_differ_in_all_that_must_differ_and_later_ones_fault_less() {
    let host = Host::with_pool(2);
    let (told_first, first) = faults_until_it_tells(&host, "first");
    let mut machines = vec![told_first];
    // The other one was parked before there was anything to learn.
    host.wait_for_log("a parked clone has learnt", 1);
    host.ok(["rm", "--force", "first"]);
    host.wait_pool_full(2);
    for number in 0..10 {
        let name = format!("p{number}");
        machines.push(told(&run(&host, &name)));
        assert!(is_clone(&host, &name), "{}", host.daemon_log());
        host.ok(["rm", &name]);
        host.wait_pool_full(number + 3);
    }
    let (told_last, last) = faults_until_it_tells(&host, "last");
    machines.push(told_last);
    assert_all_differ(&machines);
    // The first one's working set was replayed into the last one.
    println!("faults of the vCPUs: {first} at first, {last} at last");
    assert_eq!(host.daemon_log().matches("recorded a working set").count(), 1);
    assert!(
        last < first / 2,
        "{first} at first, {last} at last\n{}",
        host.daemon_log()
    );
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

/// All frames that pass the host's interfaces, from the time on that this was made.
struct Capture(OwnedFd);

/// Who a frame says that it is from.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Sender {
    mac: String,
    address: Option<Ipv4Addr>,
}

/// A frame's source; none is told of an address by what is neither IPv4 nor ARP, or asks whether an address is free (RFC 5227).
fn sender(frame: &[u8]) -> Sender {
    let mac: Vec<_> = frame[6..12].iter().map(|byte| format!("{byte:02x}")).collect();
    let at = match frame[12..14] {
        [0x08, 0x00] => Some(26),
        [0x08, 0x06] => Some(28),
        _ => None,
    };
    let address = at.map(|at| Ipv4Addr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).unwrap()));
    Sender {
        mac: mac.join(":"),
        address: address.filter(|address| !address.is_unspecified()),
    }
}

impl Capture {
    fn start() -> Self {
        let family = AddressFamily::Packet;
        let kind = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Raw, kind, SockProtocol::EthAll).expect("a packet socket");
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).expect("room for all of them");
        Self(socket)
    }

    /// What has come in by the taps so far, by the tap's name.
    fn sent_by_guests(&self) -> HashMap<String, HashSet<Sender>> {
        let mut sent: HashMap<_, HashSet<_>> = HashMap::new();
        let mut frame = [0; 2048];
        while let Ok((length, Some(from))) = recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut frame) {
            let interface = u32::try_from(from.ifindex()).unwrap();
            let name = if_indextoname(interface).map(|name| name.into_string().unwrap());
            let incoming = u32::from(from.pkttype()) != u32::from(libc::PACKET_OUTGOING);
            if let Some(tap) = name.ok().filter(|name| incoming && name.starts_with("flt")) {
                sent.entry(tap).or_default().insert(sender(&frame[..length]));
            }
        }
        sent
    }
}

#[test]
fn no_clone_sends_a_frame_under_another_identity_than_its_own() {
    let host = Host::with_pool(4);
    // Its image is here by then, and does not fill the capture.
    told(&run(&host, "first"));
    host.wait_pool_full(2);
    let capture = Capture::start();

    let names = ["a", "b", "c", "d"];
    for name in names {
        host.start_pod(
            name,
            "ping -c 3 10.88.0.1 && ping6 -c 1 -w 1 ff02::1%eth0; sleep 1000",
            "",
        );
        assert!(is_clone(&host, name), "{}", host.daemon_log());
        host.ok(["exec", name, "--", "ping", "-c", "1", "-W", "30", "10.88.0.1"]);
    }

    let sent = capture.sent_by_guests();
    println!("{sent:#?}");
    for name in names {
        let address: Ipv4Addr = host.pod(name)["status"]["podIps"][0].as_str().unwrap().parse().unwrap();
        let mac = host.ok(["exec", name, "--", "cat", "/sys/class/net/eth0/address"]);
        let senders = &sent[&format!("flt{:08x}", address.to_bits())];
        let own = |sender: &Sender| sender.mac == mac.trim() && sender.address.is_none_or(|its| its == address);
        assert!(
            senders.iter().any(|sender| sender.address.is_some()),
            "{name} has sent nothing"
        );
        assert!(senders.iter().all(own), "{name} is {mac} {address}: {senders:?}");
    }
}

/// Makes a kernel whose driver of VMGenID finds no device, since it looks for other names (Linux' drivers/virt/vmgenid.c).
fn kernel_that_does_not_notice(folder: &Path) -> PathBuf {
    let kernel = folder.join("vmlinux");
    let line = "export LC_ALL=C; grep -q VMGENCTR $FLINT_KERNEL && sed 's/VMGENCTR/NOGENCTR/g; s/VM_GEN_COUNTER/NO_GEN_COUNTER/g' $FLINT_KERNEL";
    let made = Command::new("sh")
        .args(["-c", line])
        .stdout(File::create(&kernel).unwrap())
        .status();
    assert!(made.unwrap().success(), "the kernel has no driver of VMGenID at all");
    kernel
}

#[test]
fn a_clone_whose_kernel_does_not_take_up_its_generation_is_never_ready_and_its_network_stays_shut() {
    let host = Host::with_pool_and(1, |folder| {
        let kernel = kernel_that_does_not_notice(folder);
        vec![format!("--kernel={}", kernel.display()), "--wake-timeout=10".to_owned()]
    });

    let done = thread::scope(|scope| {
        let run = scope.spawn(|| host.flint(["run", "--name", "unaware", &busybox(), "--", "echo", "it has run"]));
        // It has been claimed, and runs.
        host.wait_for_sandbox();
        let guard = Command::new("nft")
            .args(["list", "set", "bridge", "flint", "sources"])
            .output()
            .unwrap();
        let guard = String::from_utf8(guard.stdout).unwrap();
        assert!(guard.contains("sources") && !guard.contains("elements"), "{guard}");
        run.join().unwrap()
    });

    println!("{done:?}");
    assert_eq!((done.code, done.stdout.as_str()), (125, ""), "{done:?}");
    assert!(
        done.stderr.contains("not noticed") && done.stderr.contains("VMGenID"),
        "{done:?}"
    );
}

/// Tells the time to whoever sends a byte. Debian's python3-minimal has no more than `_socket`.
const CLOCK: &str = r"
import _socket, time
listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
listener.bind(('0.0.0.0', 7))
listener.listen()
print('up', flush=True)
stream = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, listener._accept()[0])
while stream.recv(1):
    stream.send(b'%20d' % time.time_ns())
";

/// How far a guest's clock is from the host's, and how far off that may be: of many questions, the one answered soonest.
fn clock_offset(stream: &mut TcpStream) -> (Duration, Duration) {
    let epoch = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap();
    let asked = (0..100).map(|_| {
        let before = epoch(SystemTime::now());
        stream.write_all(b"?").unwrap();
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).unwrap();
        let after = epoch(SystemTime::now());
        let nanoseconds = str::from_utf8(&answer).unwrap().trim_start().parse().unwrap();
        let uncertain = (after - before) / 2;
        (
            uncertain,
            Duration::from_nanos(nanoseconds).abs_diff(before + uncertain),
        )
    });
    let (uncertain, offset) = asked.min().unwrap();
    (offset, uncertain)
}

#[test]
fn a_clones_clock_is_the_hosts_within_5_ms() {
    let host = Host::with_pool(1);
    // What a clock that went on from the template's time would be off by.
    thread::sleep(Duration::from_secs(5));
    host.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: clock}}\nspec:\n  containers:\n  - name: main\n    image: {}\n    \
         command: [python3, -c, {}]\n",
        image("python:3"),
        serde_json::to_string(CLOCK).unwrap()
    ));
    assert!(is_clone(&host, "clock"), "{}", host.daemon_log());
    let (_follower, lines) = host.follow("clock");
    assert_eq!(lines.recv_timeout(LIMIT).unwrap(), "up");
    let address = host.pod("clock")["status"]["podIps"][0].as_str().unwrap().to_owned();
    let mut stream = TcpStream::connect((address, 7)).unwrap();
    stream.set_nodelay(true).unwrap();
    // At first, and some seconds later: it must not run away either.
    let offsets = [0, 6].map(|pause| {
        thread::sleep(Duration::from_secs(pause));
        clock_offset(&mut stream)
    });
    println!("off by, give or take: {offsets:?}");
    for (offset, uncertain) in offsets {
        assert!(offset < Duration::from_millis(5) + uncertain, "{offsets:?}");
    }
}
