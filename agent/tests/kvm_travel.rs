//! Snapshots and templates on their way, with flintd, the program: killed while it pushes and while it pulls a snapshot, it leaves nothing
//! half-made, and it works when it is tried again. The snapshot is one that no pod is made of here, but for its machine as
//! flintd keeps it; the template is of a guest of a few instructions.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation
)]

mod daemon;
#[path = "sandbox/dialler.rs"]
mod dialler;
#[allow(dead_code, reason = "the dialler uses a part")]
#[path = "../../vmm/tests/common/guest.rs"]
mod guest;

use std::{fs, path::Path};

use daemon::{Daemon, Start, folder};
use flint_api::{
    host::{self, SnapshotProgress, snapshots_client::SnapshotsClient},
    vmm,
};
use flintd::{
    pods::{ContainerRecord, PodRecord},
    saved::SavedRecord,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message as _;
use tonic::{Streaming, transport::Channel};

const REFERENCE: &str = "127.0.0.1:5000/t/web:1";
const MEMORY: usize = 48 << 20;
/// A registry in flintd's network namespace; it listens when this has ended.
const WITH_REGISTRY: &str = "printf 'version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: \
                             \"127.0.0.1:5000\"}\n' $T > $T/registry.yml; mkfifo $T/registry.log; \
                             docker-registry serve $T/registry.yml </dev/null >$T/registry.log 2>&1 & echo $! >$T/registry.pid; \
                             exec 9<$T/registry.log; rm $T/registry.log; grep -q -m1 'listening on' <&9; cat <&9 >/dev/null &";

fn start() -> Start<'static> {
    Start {
        setup: WITH_REGISTRY,
        ..Start::default()
    }
}

/// One whose snapshots have their memory in files.
fn without_pages() -> String {
    [&daemon::without_pages(), WITH_REGISTRY].join("\n")
}

/// Ends the registry that a flintd was started with.
fn stop_registry(daemon: &Daemon) {
    let pid = fs::read_to_string(daemon.path("registry.pid")).unwrap();
    kill(Pid::from_raw(pid.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
}

/// Kills flintd, and starts another one, with a registry that has what the one before had.
fn start_again(daemon: &mut Daemon, setup: &str) {
    daemon.kill();
    stop_registry(daemon);
    daemon.start_again(&Start {
        setup,
        ..Start::default()
    });
}

/// What flintd would have kept of a pod that it saved.
fn make_snapshot(folder: &Path) {
    let folder = folder.join("state/snapshots/warm");
    fs::create_dir_all(&folder).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    let memory: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(MEMORY).collect();
    fs::write(folder.join("memory"), memory).unwrap();
    fs::write(folder.join("state"), "state").unwrap();
    fs::write(folder.join("scratch"), "disk").unwrap();
    let meta = host::PodMeta {
        uid: "a".into(),
        namespace: "default".into(),
        name: "web".into(),
        ..Default::default()
    };
    let container = host::Container {
        name: "main".into(),
        image: "busybox:1".into(),
        ..Default::default()
    };
    let status = host::ContainerStatus {
        name: "main".into(),
        ..Default::default()
    };
    let pod = host::Pod {
        meta: Some(meta.clone()),
        spec: Some(host::PodSpec {
            containers: vec![container],
            ..Default::default()
        }),
        status: Some(host::PodStatus {
            containers: vec![status],
            ..Default::default()
        }),
        revision: 1,
    };
    let record = SavedRecord {
        snapshot: Some(host::Snapshot {
            name: "warm".into(),
            pod: Some(meta),
            ..Default::default()
        }),
        pod: Some(PodRecord {
            pod: Some(pod),
            containers: vec![ContainerRecord::default()],
            ..Default::default()
        }),
        machine: Some(vmm::CreateMachine::default()),
        ..Default::default()
    };
    fs::write(folder.join("record"), record.encode_to_vec()).unwrap();
}

async fn client(daemon: &Daemon) -> SnapshotsClient<Channel> {
    SnapshotsClient::new(daemon.channel().await)
}

async fn push(daemon: &Daemon) -> Streaming<SnapshotProgress> {
    let request = host::PushSnapshotRequest {
        name: "warm".into(),
        reference: REFERENCE.into(),
        credentials: None,
    };
    client(daemon).await.push(request).await.unwrap().into_inner()
}

async fn pull(daemon: &Daemon) -> Streaming<SnapshotProgress> {
    let request = host::PullSnapshotRequest {
        reference: REFERENCE.into(),
        ..Default::default()
    };
    client(daemon).await.pull(request).await.unwrap().into_inner()
}

/// Waits until something of it has come, and not all.
async fn begun(progress: &mut Streaming<SnapshotProgress>) {
    while let Some(step) = progress.message().await.unwrap() {
        assert!(step.snapshot.is_none(), "it was too fast to be killed");
        if step.bytes_sent > 0 {
            return;
        }
    }
}

/// The last message of one that ends well, and how much was sent for it.
async fn end(mut progress: Streaming<SnapshotProgress>) -> (SnapshotProgress, u64) {
    let (mut last, mut sent) = (SnapshotProgress::default(), 0);
    while let Some(step) = progress.message().await.unwrap() {
        sent = sent.max(step.bytes_sent);
        last = step;
    }
    assert!(last.snapshot.is_some(), "{last:?}");
    (last, sent)
}

/// What flintd has of snapshots: names, those of unfinished ones too.
fn names(daemon: &Daemon) -> Vec<String> {
    let entries = fs::read_dir(daemon.path("state/snapshots")).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Bytes of chunks that flintd has.
fn packed(daemon: &Daemon) -> u64 {
    let packs = fs::read_dir(daemon.path("state/images/packs")).unwrap();
    packs.map(|pack| pack.unwrap().metadata().unwrap().len()).sum()
}

#[tokio::test]
async fn flintd_is_killed_while_it_pushes_and_while_it_pulls_a_snapshot() {
    let folder = folder();
    make_snapshot(folder.path());
    let memory = fs::read(folder.path().join("state/snapshots/warm/memory")).unwrap();
    let without_pages = without_pages();
    let first = Start {
        setup: &without_pages,
        ..Start::default()
    };
    let mut daemon = Daemon::start(folder, &first);

    begun(&mut push(&daemon).await).await;
    start_again(&mut daemon, &without_pages);
    assert_eq!((names(&daemon), packed(&daemon)), (vec!["warm".to_owned()], 0));
    let missing = daemon.sh(&format!("flint snapshot pull {REFERENCE} other"));
    assert_eq!(missing.code, 1, "nothing half-made is seen: {missing:?}");
    assert!(missing.stderr.contains("check name and tag"), "{missing:?}");
    let (_, sent) = end(push(&daemon).await).await;
    assert!(0 < sent && sent < MEMORY as u64, "{sent} bytes were sent again");

    assert_eq!(daemon.sh("flint snapshot rm warm").code, 0);
    begun(&mut pull(&daemon).await).await;
    start_again(&mut daemon, &without_pages);
    assert!(names(&daemon).is_empty(), "nothing half-made is left");
    end(pull(&daemon).await).await;
    assert!(fs::read(daemon.path("state/snapshots/warm/memory")).unwrap() == memory);
    assert_eq!(daemon.sh("flint snapshot rm warm").code, 0);
    assert_eq!((names(&daemon), packed(&daemon)), (vec![], 0));
    stop_registry(&daemon);
}

#[tokio::test]
async fn memory_that_was_pulled_stays_in_the_store_and_can_be_pushed_from_there() {
    let folder = folder();
    make_snapshot(folder.path());
    let mut daemon = Daemon::start(folder, &start());
    end(push(&daemon).await).await;
    assert_eq!(daemon.sh("flint snapshot rm warm").code, 0);
    end(pull(&daemon).await).await;
    let memory = || fs::metadata(daemon.path("state/snapshots/warm/memory")).unwrap().len();
    assert_eq!(memory(), 0, "it is no file");
    let kept = packed(&daemon);
    assert!(kept >= MEMORY as u64);
    start_again(&mut daemon, WITH_REGISTRY);
    assert_eq!((names(&daemon), packed(&daemon)), (vec!["warm".to_owned()], kept));
    let (_, sent) = end(push(&daemon).await).await;
    assert_eq!(sent, 0, "the registry has it all");
    assert_eq!(daemon.sh("flint snapshot rm warm").code, 0);
    assert_eq!((names(&daemon), packed(&daemon)), (vec![], 0));
    end(pull(&daemon).await).await;
    assert_eq!(packed(&daemon), kept);
    stop_registry(&daemon);
}

const TEMPLATE: &str = "127.0.0.1:5000/t/template:1";

fn with_pool<'a>(args: &'a [&'a str]) -> Start<'a> {
    Start { args, ..start() }
}

/// The seal of the one template that flintd has: digests of its machine and memory.
fn template(daemon: &Daemon) -> String {
    let entries = fs::read_dir(daemon.path("state/templates")).unwrap();
    let folders: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    let [folder] = &folders[..] else { panic!("{folders:?}") };
    fs::read_to_string(folder.join("seal")).unwrap()
}

#[test]
fn a_template_goes_to_a_host_that_is_alike_and_is_refused_by_others_with_what_differs() {
    let folder = folder();
    fs::write(folder.path().join("kernel"), dialler::dialler(8, true)).unwrap();
    let small = ["--pool", "1", "--pool-memory", "32"];
    let again = |daemon: &mut Daemon, args: &[&str]| {
        daemon.kill();
        stop_registry(daemon);
        daemon.start_again(&with_pool(args));
        daemon.wait_for_log("the pool is full", 1);
    };
    let pull = format!("flint template pull {TEMPLATE}");
    let mut daemon = Daemon::start(folder, &with_pool(&small));
    daemon.wait_for_log("the pool is full", 1);
    let pushed = daemon.sh(&format!("flint template push {TEMPLATE}"));
    assert!(pushed.code == 0 && pushed.stdout.contains("@sha256:"), "{pushed:?}");
    let first = template(&daemon);

    // Another host, which has booted one of its own.
    fs::remove_dir_all(daemon.path("state/templates")).unwrap();
    again(&mut daemon, &small);
    assert!(template(&daemon) != first);
    let pulled = daemon.sh(&pull);
    assert_eq!(pulled.code, 0, "{pulled:?}");
    daemon.wait_for_log("the pool is full", 2);
    assert!(template(&daemon) == first);
    assert_eq!(daemon.log().matches("made a template").count(), 1, "{}", daemon.log());
    again(&mut daemon, &small);
    assert!(!daemon.log().contains("made a template"), "{}", daemon.log());
    assert!(template(&daemon) == first);

    // Hosts that differ keep their own.
    again(&mut daemon, &["--pool", "1", "--pool-memory", "34"]);
    let own = template(&daemon);
    let other_shape = daemon.sh(&pull);
    assert_eq!(template(&daemon), own);
    assert_eq!(other_shape.code, 1, "{other_shape:?}");
    assert!(
        other_shape
            .stderr
            .contains("memory_bytes is 33554432 there, 35651584 here"),
        "{other_shape:?}"
    );
    fs::write(daemon.path("initrd"), "another").unwrap();
    again(&mut daemon, &["--pool", "1", "--pool-memory", "34"]);
    let other_initrd = daemon.sh(&pull);
    assert!(
        other_initrd.stderr.contains("its initrd is another one than"),
        "{other_initrd:?}"
    );
    let no_template = daemon.sh("flint template pull 127.0.0.1:5000/t/none:1");
    assert!(no_template.stderr.contains("check name and tag"), "{no_template:?}");
    stop_registry(&daemon);
}
