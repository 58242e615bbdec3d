//! Environments and files of pods as Kubernetes gives them, in real Linux guests.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod host;

use std::fs;
use std::path::Path;
use std::process::Command;

use host::{Host, busybox};

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
    fs::read_to_string(path)
        .unwrap()
        .replace("127.0.0.1:5000/busybox:1", &busybox())
}

#[test]
fn an_environment_is_made_of_the_pod_its_config_map_and_its_secret() {
    let host = Host::start();

    host.apply(&example("environment.yaml"));

    let line = "good day from environment web 64 hunter2 green";
    assert_eq!(
        host.ok(["logs", "-f", "environment"]),
        format!("{line}, $(LINE), $(UNKNOWN)\n")
    );
}

#[test]
fn files_have_their_places_modes_and_group() {
    let host = Host::start();

    host.apply(&example("volumes.yaml"));

    let log = host.ok(["logs", "-f", "volumes"]);
    let expected = "color = green\nhello\nhunter2\napp=\"volumes\"\ntier=\"web\"\n1\n440 2000\n2777 2000\nread-only\nlogs-volumes\nfull\n";
    assert_eq!(log, expected);
}

/// A pod with a secret in its environment and in a file, as YAML.
fn secretive(value: &str) -> String {
    let secret = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: login}}\nstringData: {{password: {value}, other: {value}}}\n---\n"
    );
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: keeper}}\nspec:\n  terminationGracePeriodSeconds: 1\n  volumes: [{{name: login, secret: {{secretName: login}}}}]\n  \
         containers:\n  - name: main\n    image: {}\n    command: [sh, -c, 'echo ${{#PASSWORD}} long; while [ ! -e /tmp/end ]; do usleep 50000; done; exit 1']\n    \
         env: [{{name: PASSWORD, valueFrom: {{secretKeyRef: {{name: login, key: password}}}}}}]\n    \
         volumeMounts: [{{name: login, mountPath: /login}}]\n",
        busybox()
    );
    secret + &pod
}

/// Whether any file of flintd's has the text.
fn is_on_disk(host: &Host, text: &str) -> bool {
    let folders = [host.path("state"), host.path("run"), host.path("flintd.log")];
    let found = Command::new("grep")
        .arg("-rqaF")
        .arg("-D")
        .arg("skip")
        .arg(text)
        .args(folders)
        .status()
        .unwrap();
    found.code() == Some(0)
}

#[test]
fn a_secret_changes_in_files_stays_in_environments_and_is_never_on_the_hosts_disk() {
    let mut host = Host::start();
    host.apply(&secretive("first-4711-value"));
    let exec = |host: &Host, line: &str| host.ok(["exec", "keeper", "--", "sh", "-c", line]);
    assert_eq!(exec(&host, "cat /login/password"), "first-4711-value");

    host.apply(&secretive("second-4711-value"));

    assert_eq!(
        exec(&host, "cat /login/password /login/other"),
        "second-4711-valuesecond-4711-value"
    );
    assert_eq!(exec(&host, "echo $PASSWORD"), "first-4711-value\n");
    assert!(!is_on_disk(&host, "4711-value"), "{}", host.daemon_log());

    // A flintd that never saw the secret has the container restarted with it.
    host.kill_daemon();
    host.start_daemon();
    exec(&host, "touch /tmp/end");
    let (mut follower, lines) = host.follow("keeper");
    let first = lines.recv_timeout(host::LIMIT);
    let second = lines.recv_timeout(host::LIMIT);
    follower.kill().unwrap();
    follower.wait().unwrap();
    // A log is on the disk, so they are told by their length.
    assert_eq!((first.as_deref(), second.as_deref()), (Ok("16 long"), Ok("17 long")));
}
