//! flint-init as PID 1 of a real guest, driven over vsock as flintd drives it.
//!
//! QEMU's microvm stands in for flint-vmm, so that a failure here is flint-init's. Needs a host with /dev/kvm and
//! /dev/vhost-vsock; `hack/test system` makes the guest's files and runs this where there are both.
//! FLINT_KERNEL, FLINT_INITRD, FLINT_TEST_IMAGE and FLINT_TEST_SCRATCH name the files.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::{
    env,
    fs::File,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use flint_api::guest::{guest_client::GuestClient, *};
use hyper_util::rt::TokioIo;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

type Client = GuestClient<Channel>;

/// An emulated machine boots in seconds; this is for one that hangs.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// The bound is 8 MiB for what is deployed (flint-bench footprint); the development profile's code is larger, and mapped code
/// counts.
const RSS_LIMIT: u64 = 12 << 20;
const CID: u32 = 42;
const MAC: &str = "02:00:00:00:00:01";

/// A guest that ends with the test.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn file(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run guest-init/tests/run"))
}

fn start_guest() -> Guest {
    let disk = |serial: &str, path: &str, options: &str| {
        [
            "-drive".to_owned(),
            format!("if=none,id={serial},format=raw,file={path}{options}"),
            "-device".to_owned(),
            format!("virtio-blk-device,drive={serial},serial={serial}"),
        ]
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-M",
            "microvm,rtc=off",
            "-m",
            "256",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-nographic", "-no-reboot", "-serial", "stdio"])
        .args(["-kernel", &file("FLINT_KERNEL"), "-initrd", &file("FLINT_INITRD")])
        .args(["-append", "console=ttyS0 quiet panic=-1 reboot=t"])
        .args(["-device", &format!("vhost-vsock-device,guest-cid={CID}")])
        .args([
            "-netdev",
            "user,id=net,restrict=on",
            "-device",
            &format!("virtio-net-device,netdev=net,mac={MAC}"),
        ])
        .args(["-device", "virtio-rng-device"])
        .args(disk("image-0", &file("FLINT_TEST_IMAGE"), ",readonly=on"))
        .args(disk("scratch", &file("FLINT_TEST_SCRATCH"), ""));
    let log = File::create(env::var("FLINT_TEST_GUEST_LOG").unwrap_or("/dev/stderr".into())).unwrap();
    Guest(
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap(),
    )
}

async fn connect() -> Client {
    let endpoint = Endpoint::from_static("http://guest");
    let connector = tower::service_fn(|_| async {
        let stream = VsockStream::connect(VsockAddr::new(CID, PORT)).await?;
        Ok::<_, std::io::Error>(TokioIo::new(stream))
    });
    GuestClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

fn identity() -> AdoptIdentityRequest {
    AdoptIdentityRequest {
        hostname: "pod-7".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        realtime_ns: 1_900_000_000_000_000_000,
        entropy: vec![7; 64],
        interfaces: vec![Interface {
            mac: vec![2, 0, 0, 0, 0, 1],
            name: "eth0".into(),
            addresses: vec!["10.0.2.15/24".into(), "fd00::15/64".into()],
            gateways: vec!["10.0.2.2".into(), "fd00::2".into()],
            mtu: 1400,
        }],
        dns: Some(Dns {
            nameservers: vec!["10.0.2.3".into()],
            searches: vec!["svc".into()],
            options: vec![],
        }),
        host_aliases: vec![HostAlias {
            ip: "10.9.9.9".into(),
            hostnames: vec!["db".into()],
        }],
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
    }
}

fn shell(script: &str) -> Process {
    Process {
        args: vec!["sh".into(), "-c".into(), script.into()],
        ..Process::default()
    }
}

fn container(id: &str, process: Process) -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: id.into(),
        image_id: "busybox".into(),
        process: Some(process),
        scratch_serial: "scratch".into(),
        ..CreateContainerRequest::default()
    }
}

async fn create_and_start(client: &mut Client, request: CreateContainerRequest) {
    let container_id = request.container_id.clone();
    client.create_container(request).await.unwrap();
    client
        .start_container(StartContainerRequest { container_id })
        .await
        .unwrap();
}

async fn wait(client: &mut Client, id: &str) -> ContainerExit {
    client
        .wait_container(WaitContainerRequest {
            container_id: id.into(),
        })
        .await
        .unwrap()
        .into_inner()
}

async fn delete(client: &mut Client, id: &str) {
    client
        .delete_container(DeleteContainerRequest {
            container_id: id.into(),
        })
        .await
        .unwrap();
}

/// All output, acknowledged as it is read: standard output, standard error.
async fn output(client: &mut Client, id: &str) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut err, mut from_offset) = (Vec::new(), Vec::new(), 0);
    loop {
        let request = ReadOutputRequest {
            container_id: id.into(),
            from_offset,
        };
        let mut stream = client.read_output(request).await.unwrap().into_inner();
        let before = from_offset;
        while let Some(chunk) = stream.message().await.unwrap() {
            assert_eq!(chunk.offset, from_offset);
            from_offset += chunk.data.len() as u64;
            let to = if chunk.stream() == output_chunk::Stream::Stderr {
                &mut err
            } else {
                &mut out
            };
            to.extend(chunk.data);
        }
        if from_offset == before {
            return (out, err);
        }
    }
}

/// Creates, runs and deletes a container.
async fn run(client: &mut Client, request: CreateContainerRequest) -> (ContainerExit, String, String) {
    let id = request.container_id.clone();
    create_and_start(client, request).await;
    let (out, err) = output(client, &id).await;
    let exit = wait(client, &id).await;
    delete(client, &id).await;
    (
        exit,
        String::from_utf8_lossy(&out).into_owned(),
        String::from_utf8_lossy(&err).into_owned(),
    )
}

async fn exec(client: &mut Client, frames: Vec<exec_request::Frame>) -> (String, String, ContainerExit) {
    let frames = frames.into_iter().map(|frame| ExecRequest { frame: Some(frame) });
    let mut answers = client
        .exec(tokio_stream::iter(frames.collect::<Vec<_>>()))
        .await
        .unwrap()
        .into_inner();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match answers.message().await.unwrap().unwrap().frame.unwrap() {
            exec_response::Frame::Stdout(data) => out.extend(data),
            exec_response::Frame::Stderr(data) => err.extend(data),
            exec_response::Frame::Exit(exit) => {
                return (
                    String::from_utf8_lossy(&out).into_owned(),
                    String::from_utf8_lossy(&err).into_owned(),
                    exit,
                );
            }
        }
    }
}

fn exec_start(id: &str, process: Process) -> exec_request::Frame {
    let terminal_size = Some(TerminalSize { rows: 33, columns: 101 });
    exec_request::Frame::Start(ExecStart {
        container_id: id.into(),
        process: Some(process),
        terminal_size,
    })
}

fn step(text: &str) {
    eprintln!("system_init: {text}");
}

/// One guest and its whole life; each part is a function, for the failure's name.
#[tokio::test]
async fn a_guest_lives_and_ends() {
    let announced = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT)).unwrap();
    let mut guest = start_guest();
    let (_, peer) = tokio::time::timeout(BOOT_TIMEOUT, announced.accept())
        .await
        .expect("the guest came up")
        .unwrap();
    assert_eq!(peer.cid(), CID);
    let mut client = connect().await;
    refuses_containers_before_it_has_an_identity(&mut client).await;
    adopts_its_identity(&mut client).await;
    mounts_images_once(&mut client).await;
    runs_a_container(&mut client).await;
    says_why_a_program_cannot_run(&mut client).await;
    tells_signals_and_oom(&mut client).await;
    keeps_users_and_limits(&mut client).await;
    shares_what_a_pod_shares(&mut client).await;
    holds_back_a_flood(&mut client).await;
    feeds_input(&mut client).await;
    gives_a_terminal(&mut client).await;
    execs(&mut client).await;
    refuses_bad_requests(&mut client).await;
    survives_garbage_and_reconnects(&mut client).await;
    leaves_nothing_behind(&mut client).await;
    step("shutdown");
    // The answer may be lost with the machine.
    let _ = client.shutdown(ShutdownRequest {}).await;
    let ended = tokio::task::spawn_blocking(move || guest.0.wait());
    assert!(
        tokio::time::timeout(BOOT_TIMEOUT, ended)
            .await
            .expect("the guest powers off")
            .unwrap()
            .unwrap()
            .success()
    );
}

async fn refuses_containers_before_it_has_an_identity(client: &mut Client) {
    step("no identity");
    let refused = client
        .create_container(container("early", shell("true")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
}

async fn adopts_its_identity(client: &mut Client) {
    step("identity");
    let absent = Interface {
        mac: vec![2, 9, 9, 9, 9, 9],
        name: "eth9".into(),
        ..Interface::default()
    };
    let wrong = AdoptIdentityRequest {
        interfaces: vec![absent],
        ..identity()
    };
    let refused = client.adopt_identity(wrong).await.unwrap_err();
    assert!(
        refused.message().contains("eth9") && refused.message().contains(MAC),
        "{refused}"
    );
    let adopted = client.adopt_identity(identity()).await.unwrap().into_inner();
    assert!(adopted.kernel_uptime_us > adopted.init_uptime_us && adopted.init_uptime_us > 0);
    step(&format!(
        "kernel up {} ms, init up {} ms",
        adopted.kernel_uptime_us / 1000,
        adopted.init_uptime_us / 1000
    ));
}

async fn mounts_images_once(client: &mut Client) {
    step("images");
    let request = |disk_serial: &str| MountImageRequest {
        image_id: "busybox".into(),
        disk_serial: disk_serial.into(),
    };
    let refused = client
        .create_container(container("early", shell("true")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    client.mount_image(request("image-0")).await.unwrap();
    client.mount_image(request("image-0")).await.unwrap();
    assert_eq!(
        client.mount_image(request("scratch")).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

async fn runs_a_container(client: &mut Client) {
    step("a container");
    let script = "echo out; echo err >&2; hostname; pwd; cat /etc/resolv.conf /etc/hosts /etc/machine-id; date +%s; \
                  ip -o addr show eth0; ip route; ip -6 route; cat /sys/class/net/eth0/mtu; id; echo $$; env; exit 7";
    let process = Process {
        working_dir: "/srv/deep/dir".into(),
        env: vec!["GREETING=hi".into()],
        ..shell(script)
    };
    let began = SystemTime::now();
    let (exit, out, err) = run(client, container("first", process)).await;
    step(&format!(
        "create to deleted: {} ms\n{out}",
        began.elapsed().unwrap().as_millis()
    ));
    assert_eq!((exit.exit_code, exit.signal, exit.start_error.as_str()), (7, 0, ""));
    assert_eq!(err, "err\n");
    for expected in [
        "out\n",
        "pod-7\n",
        "/srv/deep/dir\n",
        "nameserver 10.0.2.3\n",
        "10.0.2.15\tpod-7",
        "10.9.9.9\tdb",
        "0123456789abcdef0123456789abcdef\n",
        "\n1900000",
        "10.0.2.15/24",
        "fd00::15/64",
        "default via 10.0.2.2",
        "default via fd00::2",
        "\n1400\n",
        "uid=0(root)",
        "\n1\n",
        "GREETING=hi\n",
        "HOME=/root\n",
    ] {
        assert!(out.contains(expected), "{expected:?} is missing");
    }
    assert!(exit.started_at_ns >= identity().realtime_ns && exit.finished_at_ns >= exit.started_at_ns);
}

async fn says_why_a_program_cannot_run(client: &mut Client) {
    step("programs that cannot run");
    for (program, code, text) in [
        ("/bin/nope", 127, "exec /bin/nope: no such file or directory"),
        ("nope", 127, "exec nope: executable file not found in $PATH"),
        ("/etc/passwd", 126, "exec /etc/passwd: permission denied"),
    ] {
        let process = Process {
            args: vec![program.into()],
            ..Process::default()
        };
        let (exit, _, _) = run(client, container("bad", process)).await;
        assert_eq!((exit.exit_code, exit.start_error.as_str()), (code, text));
    }
    let process = Process {
        user: Some(User {
            name: "ghost".into(),
            ..User::default()
        }),
        ..shell("true")
    };
    let refused = client.create_container(container("bad", process)).await.unwrap_err();
    assert!(
        refused
            .message()
            .contains("\"ghost\" is not in the container's /etc/passwd"),
        "{refused}"
    );
    // The failed create left the id free.
    assert_eq!(run(client, container("bad", shell("true"))).await.0.exit_code, 0);
}

async fn tells_signals_and_oom(client: &mut Client) {
    step("signals");
    create_and_start(
        client,
        container("sleeper", shell("trap 'exit 9' TERM; echo ready; sleep 1000 & wait")),
    )
    .await;
    first_output(client, "sleeper").await;
    let signal = |signal, all_processes| SignalContainerRequest {
        container_id: "sleeper".into(),
        signal,
        all_processes,
    };
    client.signal_container(signal(15, false)).await.unwrap();
    assert_eq!(wait(client, "sleeper").await.exit_code, 9);
    assert_eq!(
        client.signal_container(signal(15, false)).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    assert_eq!(
        client.signal_container(signal(99, false)).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    delete(client, "sleeper").await;
    create_and_start(client, container("sleeper", shell("sleep 1000"))).await;
    client.signal_container(signal(9, true)).await.unwrap();
    let exit = wait(client, "sleeper").await;
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (137, 9, false));
    delete(client, "sleeper").await;
    step("killed before its start");
    client
        .create_container(container("sleeper", shell("sleep 1000")))
        .await
        .unwrap();
    client.signal_container(signal(9, false)).await.unwrap();
    let exit = wait(client, "sleeper").await;
    assert_eq!((exit.signal, exit.started_at_ns), (9, 0));
    delete(client, "sleeper").await;
    step("out of memory");
    let resources = Some(ContainerResources {
        memory_limit_bytes: 16 << 20,
        ..ContainerResources::default()
    });
    let request = CreateContainerRequest {
        resources,
        ..container("hungry", shell("tail /dev/zero"))
    };
    let (exit, _, _) = run(client, request).await;
    assert!(exit.oom_killed, "{exit:?}");
    assert_eq!(exit.exit_code, 137);
}

/// Waits until the container has said something.
async fn first_output(client: &mut Client, id: &str) {
    let request = ReadOutputRequest {
        container_id: id.into(),
        from_offset: 0,
    };
    let mut stream = client.read_output(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
}

async fn keeps_users_and_limits(client: &mut Client) {
    step("users and limits");
    let process = Process {
        user: Some(User {
            name: "app".into(),
            ..User::default()
        }),
        capabilities: vec!["CHOWN".into(), "SETUID".into()],
        no_new_privileges: true,
        rlimits: vec![Rlimit {
            r#type: "RLIMIT_NOFILE".into(),
            soft: 100,
            hard: 200,
        }],
        ..shell(
            "id; echo ~; ulimit -n; grep -E 'CapBnd|NoNewPrivs' /proc/self/status; touch /root-file; cat /proc/kcore | head -c 1 | wc -c; \
                 cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; echo x > /mnt/tmp/x && cat /mnt/tmp/x; echo 1 > /proc/sys/kernel/panic",
        )
    };
    let tmpfs = mount::Source::Tmpfs(Tmpfs { size_bytes: 1 << 20 });
    let request = CreateContainerRequest {
        read_only_root: true,
        mounts: vec![Mount {
            destination: "/mnt/tmp".into(),
            read_only: false,
            source: Some(tmpfs),
        }],
        resources: Some(ContainerResources {
            cpu_limit_milli: 500,
            pids_limit: 20,
            ..ContainerResources::default()
        }),
        ..container("limited", process)
    };
    let (_, out, err) = run(client, request).await;
    step(&format!("{out}{err}"));
    for expected in [
        "uid=1000(app) gid=1001(app) groups=29(audio)",
        "/home/app\n",
        "100\n",
        "CapBnd:\t0000000000000081\n",
        "NoNewPrivs:\t1\n",
        "\n0\n",
        "50000 100000\n20\n",
        "\nx\n",
    ] {
        assert!(out.contains(expected), "{expected:?} is missing");
    }
    assert!(
        err.contains("/root-file: Read-only file system") || err.contains("/root-file: Permission denied"),
        "{err}"
    );
}

async fn shares_what_a_pod_shares(client: &mut Client) {
    step("pod directories, shm, pid namespace");
    let directory = |name: &str, memory| {
        let source = mount::Source::PodDirectory(PodDirectory {
            name: name.into(),
            memory,
            size_bytes: 0,
        });
        Mount {
            destination: format!("/{name}"),
            read_only: false,
            source: Some(source),
        }
    };
    let mounts = vec![directory("disk", false), directory("mem", true)];
    let writer = shell("echo a > /disk/f; echo b > /mem/f; echo c > /dev/shm/f; echo written; sleep 1000");
    let reader = shell("cat /disk/f /mem/f /dev/shm/f; ps -o args | grep -c 'sleep 100[0]'; ps -o pid,args");
    let request = CreateContainerRequest {
        mounts: mounts.clone(),
        share_pid_namespace: true,
        ..container("writer", writer)
    };
    create_and_start(client, request).await;
    first_output(client, "writer").await;
    let request = CreateContainerRequest {
        mounts,
        share_pid_namespace: true,
        ..container("reader", reader)
    };
    let (_, out, err) = run(client, request).await;
    step(&format!("{out}{err}"));
    assert!(out.starts_with("a\nb\nc\n"), "{out}{err}");
    assert!(out.contains("sleep 1000"), "{out}{err}");
    // The writer's child lives in the shared namespace, and still ends with its container.
    let kill = SignalContainerRequest {
        container_id: "writer".into(),
        signal: 9,
        all_processes: false,
    };
    client.signal_container(kill).await.unwrap();
    assert_eq!(wait(client, "writer").await.signal, 9);
    delete(client, "writer").await;
}

async fn holds_back_a_flood(client: &mut Client) {
    step("flood");
    let flood = shell("dd if=/dev/zero bs=64k count=80 2>/dev/null; echo end >&2");
    create_and_start(client, container("flood", flood)).await;
    let before = client.stats(StatsRequest {}).await.unwrap().into_inner().init_rss_bytes;
    let (out, err) = output(client, "flood").await;
    assert_eq!((out.len(), String::from_utf8_lossy(&err).as_ref()), (80 << 16, "end\n"));
    assert_eq!(wait(client, "flood").await.exit_code, 0);
    delete(client, "flood").await;
    step(&format!("flint-init resident: {before} bytes"));
}

async fn feeds_input(client: &mut Client) {
    step("input");
    let request = CreateContainerRequest {
        stdin: true,
        ..container("cat", shell("cat; echo done"))
    };
    create_and_start(client, request).await;
    let frame = |data: &str, eof| InputFrame {
        container_id: "cat".into(),
        data: data.into(),
        eof,
        resize: None,
    };
    client
        .write_input(tokio_stream::iter([frame("one ", false)]))
        .await
        .unwrap();
    client
        .write_input(tokio_stream::iter([frame("two ", true)]))
        .await
        .unwrap();
    assert_eq!(output(client, "cat").await.0, b"one two done\n");
    delete_ended(client, "cat").await;
}

async fn delete_ended(client: &mut Client, id: &str) {
    wait(client, id).await;
    delete(client, id).await;
}

async fn gives_a_terminal(client: &mut Client) {
    step("terminal");
    let process = Process {
        terminal: true,
        ..shell("read x; tty; stty size; echo got $x $TERM")
    };
    create_and_start(
        client,
        CreateContainerRequest {
            stdin: true,
            ..container("tty", process)
        },
    )
    .await;
    let resize = Some(TerminalSize { rows: 20, columns: 77 });
    let frame = InputFrame {
        container_id: "tty".into(),
        data: b"word\n".to_vec(),
        eof: false,
        resize,
    };
    client.write_input(tokio_stream::iter([frame])).await.unwrap();
    let out = String::from_utf8(output(client, "tty").await.0).unwrap();
    assert!(out.contains("/dev/pts/0\r\n20 77\r\ngot word xterm\r\n"), "{out:?}");
    delete_ended(client, "tty").await;
}

async fn execs(client: &mut Client) {
    use exec_request::Frame;
    step("exec");
    let process = Process {
        env: vec!["FROM=container".into()],
        working_dir: "/tmp".into(),
        ..shell("mkfifo fifo; echo up; cat fifo; exit 5")
    };
    create_and_start(client, container("host", process)).await;
    first_output(client, "host").await;
    let began = SystemTime::now();
    let (out, err, exit) = exec(
        client,
        vec![
            exec_start("host", shell("echo $FROM; pwd; cat; echo e >&2; exit 3")),
            Frame::Stdin(b"in\n".to_vec()),
            Frame::StdinEof(StdinEof {}),
        ],
    )
    .await;
    step(&format!("exec took {} ms", began.elapsed().unwrap().as_millis()));
    assert_eq!(
        (out.as_str(), err.as_str(), exit.exit_code),
        ("container\n/tmp\nin\n", "e\n", 3)
    );
    let nope = Process {
        args: vec!["nope".into()],
        ..Process::default()
    };
    let (_, _, exit) = exec(client, vec![exec_start("host", nope)]).await;
    assert_eq!(
        (exit.exit_code, exit.start_error.as_str()),
        (127, "exec nope: executable file not found in $PATH")
    );
    let tty = Process {
        terminal: true,
        user: Some(User {
            name: "app".into(),
            ..User::default()
        }),
        ..shell("stty size; id -u; echo $HOME")
    };
    let (out, _, _) = exec(client, vec![exec_start("host", tty)]).await;
    assert_eq!(out, "33 101\r\n1000\r\n/home/app\r\n");
    step("exec: a child that holds the pipe, a signal");
    let (out, _, exit) = exec(client, vec![exec_start("host", shell("sleep 500 & echo left"))]).await;
    assert_eq!((out.as_str(), exit.exit_code), ("left\n", 0));
    let (_, _, exit) = exec(client, vec![exec_start("host", shell("sleep 600")), Frame::Signal(9)]).await;
    assert_eq!(exit.signal, 9);
    step("exec: a client that goes away");
    // The container ends when the last writer of its FIFO does, which is the program of the client that went.
    let frames = ExecRequest {
        frame: Some(exec_start("host", shell("exec 3>/tmp/fifo; echo up; exec sleep 700"))),
    };
    let mut answers = client.exec(tokio_stream::iter([frames])).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    drop(answers);
    assert_eq!(wait(client, "host").await.exit_code, 5);
    let refused = client
        .exec(tokio_stream::iter([ExecRequest {
            frame: Some(exec_start("host", shell("true"))),
        }]))
        .await;
    assert_eq!(
        refused.unwrap().into_inner().message().await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    delete(client, "host").await;
}

async fn refuses_bad_requests(client: &mut Client) {
    step("bad requests");
    let code = |result: Result<tonic::Response<CreateContainerResponse>, tonic::Status>| result.unwrap_err().code();
    assert_eq!(
        code(client.create_container(container("../x", shell("true"))).await),
        Code::InvalidArgument
    );
    assert_eq!(
        code(client.create_container(container("x", Process::default())).await),
        Code::InvalidArgument
    );
    let unknown = WaitContainerRequest {
        container_id: "unknown".into(),
    };
    assert_eq!(client.wait_container(unknown).await.unwrap_err().code(), Code::NotFound);
    create_and_start(client, container("twice", shell("echo x; sleep 1000"))).await;
    assert_eq!(
        code(client.create_container(container("twice", shell("true"))).await),
        Code::AlreadyExists
    );
    let again = StartContainerRequest {
        container_id: "twice".into(),
    };
    assert_eq!(
        client.start_container(again).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let early = DeleteContainerRequest {
        container_id: "twice".into(),
    };
    assert_eq!(
        client.delete_container(early).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let ahead = ReadOutputRequest {
        container_id: "twice".into(),
        from_offset: 1 << 40,
    };
    assert_eq!(
        client.read_output(ahead).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

async fn survives_garbage_and_reconnects(client: &mut Client) {
    use tokio::io::AsyncWriteExt;
    step("garbage");
    for round in 0..20_u8 {
        let mut stream = VsockStream::connect(VsockAddr::new(CID, PORT)).await.unwrap();
        let garbage: Vec<u8> = (0..4096_u32)
            .map(|byte| u8::try_from(byte % 251).unwrap() ^ round)
            .collect();
        // The guest may hang up before it has read all.
        let _ = stream.write_all(&garbage).await;
    }
    *client = connect().await;
    let list = client
        .list_containers(ListContainersRequest {})
        .await
        .unwrap()
        .into_inner()
        .containers;
    assert_eq!(list.len(), 1);
    assert_eq!(
        (list[0].container_id.as_str(), list[0].state()),
        ("twice", container_status::State::Running)
    );
    let kill = SignalContainerRequest {
        container_id: "twice".into(),
        signal: 9,
        all_processes: true,
    };
    client.signal_container(kill).await.unwrap();
    assert_eq!(output(client, "twice").await.0, b"x\n");
    delete_ended(client, "twice").await;
}

async fn leaves_nothing_behind(client: &mut Client) {
    step("traces");
    let look = shell("cat /proc/mounts | grep -c overlay; ls /guest/sys/fs/cgroup 2>/dev/null; cat /proc/self/cgroup");
    let (_, out, _) = run(client, container("look", look)).await;
    assert!(out.starts_with("1\n"), "only its own overlay: {out}");
    let stats = client.stats(StatsRequest {}).await.unwrap().into_inner();
    step(&format!(
        "resident {} of {} bytes",
        stats.init_rss_bytes, stats.memory_total_bytes
    ));
    assert!(stats.containers.is_empty());
    assert!(
        stats.init_rss_bytes <= RSS_LIMIT,
        "flint-init takes {} bytes",
        stats.init_rss_bytes
    );
}
