//! Containers: how they run and end, what they may, what they share, and which are refused.

use std::time::SystemTime;

use flint_api::guest::*;
use tonic::Code;

use crate::{
    calls::{container, create_and_start, delete, first_output, run, shell, wait},
    guest::{Client, identity, step},
};

pub async fn runs_a_container(client: &mut Client) {
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

pub async fn says_why_a_program_cannot_run(client: &mut Client) {
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

pub async fn tells_signals_and_oom(client: &mut Client) {
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

pub async fn keeps_users_and_limits(client: &mut Client) {
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
            ..Default::default()
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

pub async fn shares_what_a_pod_shares(client: &mut Client) {
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
            ..Default::default()
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

pub async fn refuses_bad_requests(client: &mut Client) {
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
