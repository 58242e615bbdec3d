//! Pods end to end, as a user drives them: real images from a real registry, in real Linux guests.

mod host;

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use host::{Host, busybox, image, run};

#[test]
fn an_image_from_a_registry_runs_and_tells_how_its_start_went() {
    let host = Host::start();

    let done = host.flint(["run", "--name", "first", &busybox(), "--", "echo", "hello"]);

    assert_eq!((done.code, done.stdout.as_str()), (0, "hello\n"), "{done:?}");
    let timeline = host.json(["timeline", "first"]);
    let stages: Vec<_> = timeline["timeline"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    for stage in [
        "image.pull",
        "vmm.spawn",
        "vmm.boot",
        "guest.identity",
        "container.main.first-output",
    ] {
        assert!(stages.contains(&stage), "{stage} is not in {stages:?}");
    }
}

#[test]
fn exit_codes_are_the_programs_own() {
    let host = Host::start();

    assert_eq!(host.sh("exit 7").code, 7);
    assert_eq!(host.sh("sleep 100 & kill -9 $!; wait $!").code, 137);
    assert_eq!(host.sh("true").code, 0);
}

#[test]
fn a_program_that_cannot_be_started_says_why() {
    let host = Host::start();

    let missing = host.flint(["run", "--rm", &busybox(), "--", "/bin/nope"]);
    let folder = host.flint(["run", "--rm", &busybox(), "--", "/etc"]);
    let no_program = host.flint(["run", "--rm", &busybox(), "--", "/etc/hosts"]);

    assert_eq!(missing.code, 127, "{missing:?}");
    assert!(missing.stderr.contains("/bin/nope"), "{missing:?}");
    assert_eq!(folder.code, 126, "{folder:?}");
    assert_eq!(no_program.code, 126, "{no_program:?}");
    assert!(no_program.stderr.contains("/etc/hosts"), "{no_program:?}");
}

#[test]
fn standard_output_and_error_stay_apart() {
    let host = Host::start();

    let done = host.sh("echo out; echo err >&2");

    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
}

#[test]
fn a_container_has_its_environment_user_folder_and_names() {
    let host = Host::start();
    let line = "id -u; id -g; pwd; echo $GREETING; hostname; grep -c $(hostname) /etc/hosts; touch /x 2>/dev/null || echo read-only";

    let done = host.flint([
        "run",
        "--rm",
        "--name",
        "named",
        "-u",
        "1000:1001",
        "-w",
        "/some/where",
        "-e",
        "GREETING=good day",
        "--read-only",
        &busybox(),
        "--",
        "sh",
        "-c",
        line,
    ]);

    assert_eq!(
        done.stdout, "1000\n1001\n/some/where\ngood day\nnamed\n1\nread-only\n",
        "{done:?}"
    );
}

#[test]
fn a_language_runtime_works_on_its_own_image() {
    let host = Host::start();

    let done = host.flint([
        "run",
        "--rm",
        &image("python:3"),
        "--",
        "python3",
        "-c",
        "print(sum(range(101)))",
    ]);

    assert_eq!((done.code, done.stdout.as_str()), (0, "5050\n"), "{done:?}");
}

#[test]
fn two_containers_share_a_pod() {
    let host = Host::start();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/two-containers.yaml");
    let manifest = fs::read_to_string(example)
        .unwrap()
        .replace("127.0.0.1:5000/busybox:1", &busybox());

    host.apply(&manifest);

    assert_eq!(host.ok(["logs", "-f", "pair", "-c", "reader"]), "the answer is 42\n");
}

#[test]
fn exec_takes_input_gives_output_and_the_exit_code() {
    let host = Host::start();
    host.start_pod("box", "sleep 1000", "");

    let mut command = host.command([
        "exec",
        "-i",
        "box",
        "--",
        "sh",
        "-c",
        "tr a-z A-Z; echo done >&2; exit 3",
    ]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("flint starts");
    child.stdin.take().unwrap().write_all(b"quiet\n").unwrap();
    let output = child.wait_with_output().unwrap();

    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"QUIET\n"[..], &b"done\n"[..])
    );
    assert_eq!(host.flint(["exec", "box", "--", "/bin/nope"]).code, 127);
    // Of another processor: what an image for another platform has in it (ELF, e_machine AArch64).
    let foreign = "printf '\\177ELF\\2\\1\\1\\0\\0\\0\\0\\0\\0\\0\\0\\0\\2\\0\\267\\0\\1\\0\\0\\0' > /foreign; head -c 100 /dev/zero >> /foreign; \
                   chmod +x /foreign";
    host.ok(["exec", "box", "--", "sh", "-c", foreign]);
    let foreign = host.flint(["exec", "box", "--", "/foreign"]);
    assert_eq!(foreign.code, 126, "{foreign:?}");
    assert!(foreign.stderr.contains("/foreign"), "{foreign:?}");
}

#[test]
fn exec_with_a_terminal_has_one() {
    let host = Host::start();
    host.start_pod("box", "sleep 1000", "");
    let socket = host.socket();
    let line = format!(
        "stty rows 33 cols 77; {} --socket {} exec -it box -- sh -c 'tty; stty size; exit 5'",
        host::bin("flint").display(),
        socket.display()
    );

    // script(1) gives the command line a terminal of its own and passes its exit code on.
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::null());
    let done = run(command);

    assert_eq!(done.code, 5, "{done:?}");
    assert!(done.stdout.contains("/dev/pts/"), "{done:?}");
    assert!(done.stdout.contains("33 77"), "{done:?}");
}

#[test]
fn logs_follow_to_the_end_and_can_be_cut() {
    let host = Host::start();
    host.start_pod(
        "counter",
        "for i in 1 2 3 4 5; do echo line $i; usleep 100000; done",
        "  restartPolicy: Never\n",
    );

    let followed = host.ok(["logs", "-f", "counter"]);

    assert_eq!(followed, "line 1\nline 2\nline 3\nline 4\nline 5\n");
    assert_eq!(host.ok(["logs", "--tail", "2", "counter"]), "line 4\nline 5\n");
}

#[test]
fn a_failing_container_is_started_again_until_it_succeeds() {
    let host = Host::start();
    let line = "n=$(cat /data/n 2>/dev/null || echo 0); echo $((n + 1)) > /data/n; echo run $n; test $n -ge 1";
    let more = "    volumeMounts: [{name: data, mountPath: /data}]\n  volumes: [{name: data, emptyDir: {}}]\n  restartPolicy: OnFailure\n";

    host.start_pod("stubborn", line, more);
    // Follows over the restart, until the container has ended for good.
    let log = host.ok(["logs", "-f", "stubborn"]);

    assert!(log.ends_with("run 1\n"), "{log:?}");
    let pod = host.pod("stubborn");
    assert_eq!(pod["status"]["phase"], "SUCCEEDED", "{pod}");
    assert_eq!(pod["status"]["containers"][0]["restartCount"], 1, "{pod}");
}

#[test]
fn stop_lets_a_program_end_itself_and_kills_one_that_does_not() {
    let host = Host::start();
    host.start_pod(
        "polite",
        "trap 'echo bye; exit 4' TERM; echo up; while :; do usleep 50000; done",
        "  restartPolicy: Never\n",
    );
    host.start_pod(
        "deaf",
        "trap '' TERM; while :; do usleep 50000; done",
        "  restartPolicy: Never\n",
    );

    host.ok(["stop", "-t", "20", "polite"]);
    host.ok(["stop", "-t", "1", "deaf"]);

    assert_eq!(host.ok(["logs", "polite"]), "up\nbye\n");
    let code = |name: &str| host.pod(name)["status"]["containers"][0]["terminated"]["exitCode"].clone();
    assert_eq!((code("polite"), code("deaf")), (4.into(), 137.into()));
}

#[test]
fn pods_have_addresses_and_reach_each_other() {
    let host = Host::start();
    host.start_pod(
        "server",
        "mkdir /www; echo served > /www/index.html; httpd -f -p 80 -h /www",
        "",
    );
    let address = host.pod("server")["status"]["podIps"][0]
        .as_str()
        .expect("an address")
        .to_owned();

    let done = host.sh(&format!(
        "for i in 1 2 3 4 5 6 7 8 9 10; do wget -q -O - http://{address}/ && exit; usleep 200000; done; exit 1"
    ));

    assert_eq!((done.code, done.stdout.as_str()), (0, "served\n"), "{done:?}");
}

#[test]
fn a_killed_flintd_finds_its_pods_again_and_loses_no_output() {
    let mut host = Host::start();
    host.start_pod(
        "long",
        "i=0; while :; do echo $i; i=$((i + 1)); usleep 100000; done",
        "",
    );
    let boot_id = || host.ok(["exec", "long", "--", "cat", "/proc/sys/kernel/random/boot_id"]);
    let before = boot_id();

    host.kill_daemon();
    host.start_daemon();

    let after = host.ok(["exec", "long", "--", "cat", "/proc/sys/kernel/random/boot_id"]);
    assert_eq!(before, after, "it is the same machine");
    let refused = host.flint(["images", "rm", &busybox()]);
    assert!(refused.code == 1 && refused.stderr.contains("in use"), "{refused:?}");
    host.assert_counts("long", 40);
    assert_eq!(host.pod("long")["status"]["containers"][0]["restartCount"], 0);
}

#[test]
fn a_manifest_with_an_unsupported_field_is_refused_by_its_path() {
    let host = Host::start();
    let file = host.path("bad.yaml");
    let yaml = "apiVersion: v1\nkind: Pod\nmetadata: {name: bad}\nspec:\n  hostNetwork: true\n  containers: [{name: a, image: b}]\n";
    fs::write(&file, yaml).unwrap();

    let done = host.flint(["apply", "-f", file.to_str().unwrap()]);

    assert_eq!(done.code, 1);
    assert!(done.stderr.contains("spec.hostNetwork"), "{done:?}");
    assert_eq!(host.json(["ps", "-a"])["pods"].as_array().map(Vec::len), Some(0));
}
