//! The pool of clones with the real flint-vmm and a guest of a few instructions, which dials as flint-init does, and once more
//! in each clone. It does not speak gRPC, so no launch here is ever acknowledged: the system tests have guests that do.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod sandbox;
mod trace;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use flint_vmm::snapshot::Snapshot;
use flintd::{
    sandbox::{Config, DiskSource, DiskSpec, Manager, SandboxError, SandboxSpec, pool},
    timeline::Timeline,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use sandbox::{Host, LIMIT, as_daemon, ask, dialler::dialler, on_a_host, signal, spec, wait_for, wait_there};

const MEMORY: u64 = 32 << 20;
const VCPUS: u32 = 4;
const LARGEST: u64 = 4 << 30;
const SCRATCH: u64 = 16 << 20;
const SIZE: usize = 2;
const IMAGES: u32 = 1;

// ---- the host

fn config(host: &Host) -> Config {
    Config {
        pool: pool::Config {
            size: SIZE,
            vcpus: VCPUS,
            memory_bytes: MEMORY,
            largest_bytes: LARGEST,
            scratch_bytes: SCRATCH,
            images: IMAGES,
            ..pool::Config::default()
        },
        ..host.config()
    }
}

async fn filled(manager: &Manager) {
    let full = tokio::time::timeout(LIMIT, manager.pool().filled()).await;
    full.expect("the pool fills");
}

/// A manager whose pool is full.
async fn full(host: &Host) -> (Manager, pool::PoolMetrics) {
    let config = config(host);
    let metrics = config.pool.metrics.clone();
    let manager = Manager::new(config).await.unwrap();
    filled(&manager).await;
    (manager, metrics)
}

async fn end(host: Host, manager: Manager) {
    manager.pool().drain().await;
    host.end(manager).await;
}

fn pod(id: &str) -> SandboxSpec {
    let file = tempfile::tempfile().unwrap();
    file.set_len(512).unwrap();
    let disk = |serial: &str, source, read_only| DiskSpec {
        serial: serial.into(),
        source,
        read_only,
        rate_limit: None,
    };
    let image = DiskSource::Raw {
        file: Arc::new(OwnedFd::from(file)),
    };
    SandboxSpec {
        id: id.into(),
        disks: vec![
            disk("image-0", image, true),
            disk("scratch", DiskSource::Scratch { bytes: SCRATCH }, false),
        ],
        ..spec(true)
    }
}

/// The largest pod that a clone can be.
fn large(id: &str) -> SandboxSpec {
    SandboxSpec {
        vcpus: VCPUS,
        memory_bytes: LARGEST,
        ..pod(id)
    }
}

fn sandboxes(host: &Host) -> PathBuf {
    host.folder().join("run/sandboxes")
}

fn parked(host: &Host) -> Vec<String> {
    let names = fs::read_dir(sandboxes(host)).unwrap().flatten();
    let names = names.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("parked-")).collect()
}

fn address(folder: &Path) -> Ipv4Addr {
    let text = fs::read_to_string(folder.join("sandbox.json")).unwrap();
    let intent: serde_json::Value = serde_json::from_str(&text).unwrap();
    intent["address"].as_str().unwrap().parse().unwrap()
}

fn template(host: &Host) -> PathBuf {
    let mut entries = fs::read_dir(host.folder().join("state/templates")).unwrap().flatten();
    let found = entries.next().expect("a template").path();
    assert!(entries.next().is_none(), "one template and nothing else");
    found
}

fn flip(file: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

async fn until_gone(folder: PathBuf) {
    let gone = tokio::task::spawn_blocking(move || sandbox::wait_gone(&folder));
    tokio::time::timeout(LIMIT, gone).await.expect("in time").unwrap();
}

/// Launches, until the guest is up; does something; and gives the launch up, which is never acknowledged.
async fn while_up(manager: &Manager, host: &Host, id: &str, deed: impl AsyncFnOnce()) -> Timeline {
    let timeline = Timeline::new();
    let folder = sandboxes(host).join(id);
    let serial = folder.join("serial.log");
    let up = tokio::task::spawn_blocking(move || wait_for(&serial, "up"));
    let done = async {
        tokio::time::timeout(LIMIT, up).await.expect("the guest runs").unwrap();
        deed().await;
    };
    tokio::select! {
        launched = manager.launch(pod(id), &timeline) => panic!("{launched:?}"),
        () = done => {}
    }
    until_gone(folder).await;
    timeline
}

fn stages(timeline: &Timeline) -> Vec<String> {
    timeline.stages().into_iter().map(|stage| stage.name).collect()
}

// ---- claims

#[test]
fn a_pod_gets_a_parked_clone_and_the_pool_is_filled_again() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, metrics) = full(&host).await;
        let before: HashSet<_> = parked(&host).into_iter().collect();
        let timeline = while_up(&manager, &host, "a", async || {
            let own = address(&host.file(""));
            let left: Vec<_> = parked(&host);
            assert!(left.iter().all(|name| before.contains(name)), "it was one of them");
            assert_eq!(before.difference(&left.into_iter().collect()).count(), 1);
            let fence = ask("nft list set bridge flint sources");
            assert!(!fence.contains(&own.to_string()), "not before it acknowledged: {fence}");
        })
        .await;
        assert_eq!(stages(&timeline)[0], "pool.claim");
        assert!(!stages(&timeline).contains(&"vmm.boot".to_owned()));
        filled(&manager).await;
        assert_eq!(
            (metrics.hits.get(), metrics.misses.get(), metrics.templates.get()),
            (1, 0, 1)
        );
        end(host, manager).await;
    });
}

#[test]
fn pods_at_once_get_a_clone_each_and_one_too_many_is_booted() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, metrics) = full(&host).await;
        let names = ["a", "b", "c"];
        let timelines = names.map(|_| Timeline::new());
        let up = names.map(|name| {
            let serial = sandboxes(&host).join(name).join("serial.log");
            tokio::task::spawn_blocking(move || wait_for(&serial, "up"))
        });
        let launches = names
            .iter()
            .zip(&timelines)
            .map(|(name, timeline)| manager.launch(pod(name), timeline));
        let all_up = async {
            for up in up {
                tokio::time::timeout(LIMIT, up).await.expect("in time").unwrap();
            }
        };
        tokio::select! {
            launched = futures::future::select_all(launches.map(Box::pin)) => panic!("{:?}", launched.0),
            () = all_up => {
                let addresses: HashSet<_> = names.iter().map(|name| address(&sandboxes(&host).join(name))).collect();
                assert_eq!(addresses.len(), names.len());
            }
        }
        for name in names {
            until_gone(sandboxes(&host).join(name)).await;
        }
        assert_eq!((metrics.hits.get(), metrics.misses.get()), (2, 1));
        assert!(stages(&timelines[2]).contains(&"pool.empty".to_owned()));
        end(host, manager).await;
    });
}

#[test]
fn a_pod_that_does_not_fit_is_booted_and_takes_no_clone() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let mut config = config(&host);
        config.boot_timeout = Duration::from_secs(5);
        let metrics = config.pool.metrics.clone();
        let manager = Manager::new(config).await.unwrap();
        filled(&manager).await;
        let timeline = Timeline::new();
        let large = SandboxSpec {
            vcpus: VCPUS + 1,
            ..pod("a")
        };
        let serial = host.file("serial.log");
        let up = tokio::task::spawn_blocking(move || wait_for(&serial, "up"));
        tokio::select! {
            launched = manager.launch(large, &timeline) => panic!("{launched:?}"),
            up = up => up.unwrap(),
        }
        until_gone(host.file("")).await;
        assert!(stages(&timeline).contains(&"pool.unfit".to_owned()), "{timeline:?}");
        assert_eq!((metrics.misfits.get(), manager.pool().parked()), (1, SIZE));
        end(host, manager).await;
    });
}

#[test]
fn a_clone_that_dials_is_waited_for_until_it_acknowledges() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let mut config = config(&host);
        config.wake_timeout = Duration::from_secs(1);
        let manager = Manager::new(config).await.unwrap();
        filled(&manager).await;
        let timeline = Timeline::new();
        // It has dialled within the second, and then never answers.
        let launch = manager.launch(pod("a"), &timeline);
        tokio::time::timeout(Duration::from_secs(3), launch).await.unwrap_err();
        assert!(stages(&timeline).contains(&"guest.wake".to_owned()), "{timeline:?}");
        assert!(!host.file("ready").exists(), "it is nobody's sandbox");
        until_gone(host.file("")).await;
        end(host, manager).await;
    });
}

#[test]
fn a_clone_that_does_not_dial_again_is_ended() {
    on_a_host(&dialler(IMAGES, false), |host| async move {
        let mut config = config(&host);
        config.wake_timeout = Duration::from_secs(2);
        let manager = Manager::new(config).await.unwrap();
        filled(&manager).await;
        let error = manager.launch(pod("a"), &Timeline::new()).await.unwrap_err();
        assert!(matches!(error, SandboxError::WakeTimeout(_)), "{error:?}");
        assert!(error.to_string().contains("VMGenID"), "{error}");
        assert!(!host.file("").exists(), "nothing of it is left");
        end(host, manager).await;
    });
}

#[test]
fn between_claim_and_first_instruction_nothing_is_made_or_opened_by_name() {
    // It does not dial again, so that the launch ends by itself and nobody has to look for that.
    on_a_host(&dialler(IMAGES, false), |host| async move {
        let mut config = config(&host);
        config.wake_timeout = Duration::from_secs(2);
        let manager = Manager::new(config).await.unwrap();
        filled(&manager).await;
        let vmms: Vec<_> = parked(&host).iter().flat_map(|name| host.processes_of(name)).collect();
        assert_eq!(vmms.len(), SIZE);
        // The largest that there can be: its size is no matter of the claim's.
        let (pod, timeline) = (large("a"), Timeline::new());
        let trace = trace::Trace::of(&vmms, &host.folder().join("trace")).await;
        trace::mark();
        manager.launch(pod, &timeline).await.unwrap_err();
        let calls = trace.until_first_run();
        println!("{}", calls.join("\n"));
        assert!(
            calls.iter().any(|call| call.contains("sendmsg")),
            "the claim is in it: {calls:#?}"
        );
        let forbidden: Vec<_> = calls.iter().filter(|call| trace::is_forbidden(call)).collect();
        assert!(forbidden.is_empty(), "{forbidden:#?}");
        end(host, manager).await;
    });
}

#[test]
fn claims_are_quick() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, _) = full(&host).await;
        let mut claims = Vec::new();
        for round in 0..20 {
            filled(&manager).await;
            let timeline = while_up(&manager, &host, &format!("p{round}"), async || {}).await;
            let stage = timeline
                .stages()
                .into_iter()
                .find(|stage| stage.name == "pool.claim")
                .unwrap();
            claims.push(Duration::try_from(stage.duration.unwrap()).unwrap());
        }
        claims.sort_unstable();
        println!("claim p50 {:?} least {:?} most {:?}", claims[10], claims[0], claims[19]);
        assert!(claims[10] < Duration::from_millis(100), "{claims:?}");
        end(host, manager).await;
    });
}

// ---- faults

#[test]
fn a_parked_clone_that_is_killed_is_replaced() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, metrics) = full(&host).await;
        let victim = parked(&host).remove(0);
        signal(host.processes_of(&victim)[0], Signal::SIGKILL);
        until_gone(sandboxes(&host).join(&victim)).await;
        filled(&manager).await;
        assert_eq!(metrics.failures.get(), 1);
        assert!(!parked(&host).contains(&victim));
        while_up(&manager, &host, "a", async || {}).await;
        end(host, manager).await;
    });
}

/// Not a test of its own: what the daemon of the test below does, in a process of its own.
#[test]
#[ignore = "other tests run it"]
fn daemon() {
    as_daemon(|host| async move {
        let (manager, _) = full(&host).await;
        fs::write(host.folder().join("full"), "").unwrap();
        let launched = manager.launch(pod("a"), &Timeline::new()).await;
        panic!("{launched:?}");
    })
    .expect("other tests run this");
}

#[test]
fn a_daemon_that_is_killed_with_parked_and_claimed_clones_leaves_a_template_and_nothing_else() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let daemon = host.daemon("daemon");
        let serial = host.file("serial.log");
        let up = tokio::task::spawn_blocking(move || wait_for(&serial, "up"));
        tokio::time::timeout(LIMIT, up).await.expect("the guest runs").unwrap();
        let folder = host.folder().join("full");
        wait_there(&folder);
        daemon.kill_9();
        assert!(!parked(&host).is_empty(), "they outlive it");
        fs::create_dir(host.folder().join("state/templates/draft-x")).unwrap();

        let (manager, metrics) = full(&host).await;
        assert_eq!(metrics.templates.get(), 0, "the template that is there is taken");
        let of_dead: Vec<_> = parked(&host);
        manager.end_unknown(&HashSet::new()).await;
        assert_eq!(parked(&host).len(), SIZE, "the new ones only: {of_dead:?}");
        assert!(!host.file("").exists(), "a clone without an identity is no pod's");
        template(&host);
        while_up(&manager, &host, "b", async || {}).await;
        end(host, manager).await;
    });
}

#[test]
fn a_template_that_was_altered_by_a_bit_is_made_anew() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, _) = full(&host).await;
        manager.pool().drain().await;
        manager.remove().await.unwrap();
        for (file, at) in [("memory", 0x10_0010), ("memory", 5), ("state", 100), ("seal", 12)] {
            flip(&template(&host).join(file), at);
            let (manager, metrics) = full(&host).await;
            assert_eq!(metrics.templates.get(), 1, "{file} at {at}");
            manager.pool().drain().await;
            manager.remove().await.unwrap();
        }
        let (manager, metrics) = full(&host).await;
        assert_eq!(metrics.templates.get(), 0);
        end(host, manager).await;
    });
}

/// A template's files, to be adopted, with another state.
fn arriving(templates: &pool::Templates, memory: &File, state: &[u8]) -> pool::TemplateFiles {
    let mut files = templates.draft().unwrap();
    files.state.write_all(state).unwrap();
    // With its holes, as what comes from a registry is laid out.
    let length = memory.metadata().unwrap().len();
    files.memory.set_len(length).unwrap();
    let mut page = [0; 4096];
    for at in (0..length).step_by(page.len()) {
        memory.read_exact_at(&mut page, at).unwrap();
        if page != [0; 4096] {
            files.memory.write_all_at(&page, at).unwrap();
        }
    }
    files
}

#[test]
fn a_template_of_another_processor_is_refused_by_its_passports_line_and_the_hosts_own_stays() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, metrics) = full(&host).await;
        let templates = manager.templates();
        let (record, mut own) = templates.current().await.unwrap();
        let mut state = Vec::new();
        own.state.read_to_end(&mut state).unwrap();
        let mut other = Snapshot::decode(&state).unwrap();
        other.passport.vendor = "FlintFlint99".into();

        templates.check(&record).await.unwrap();
        let refused = templates
            .adopt(arriving(&templates, &own.memory, &other.encode()))
            .await;
        assert!(
            matches!(&refused, Err(SandboxError::ForeignTemplate(line)) if line.contains("CPU vendor: it needs FlintFlint99")),
            "{refused:?}"
        );
        let truncated = templates
            .adopt(arriving(&templates, &own.memory, &state[..state.len() - 1]))
            .await;
        assert!(
            matches!(truncated, Err(SandboxError::ForeignTemplate(_))),
            "{truncated:?}"
        );
        assert_eq!(
            (manager.pool().parked(), parked(&host).len()),
            (SIZE, SIZE),
            "its own clones are there"
        );

        let before = parked(&host);
        templates
            .adopt(arriving(&templates, &own.memory, &state))
            .await
            .unwrap();
        for name in before {
            until_gone(sandboxes(&host).join(name)).await;
        }
        filled(&manager).await;
        assert_eq!(metrics.templates.get(), 1, "none was made anew");
        drop(templates);
        end(host, manager).await;
    });
}

#[test]
fn another_command_line_is_another_template() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, _) = full(&host).await;
        let first = template(&host);
        manager.remove().await.unwrap();
        let mut config = config(&host);
        config.cmdline = "quiet".into();
        let manager = Manager::new(config).await.unwrap();
        filled(&manager).await;
        assert_ne!(template(&host), first);
        end(host, manager).await;
    });
}

#[test]
fn a_disk_that_is_full_costs_the_clones_and_not_the_pods_until_there_is_room() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let disk = host.folder().join("state/templates");
        fs::create_dir_all(&disk).unwrap();
        let size = |flags, size: &str| mount(Some("none"), &disk, Some("tmpfs"), flags, Some(size)).unwrap();
        size(MsFlags::empty(), "size=16k");
        let mut config = config(&host);
        let metrics = config.pool.metrics.clone();
        config.pool.size = 1;
        let manager = Manager::new(config).await.unwrap();
        let timeline = while_up(&manager, &host, "a", async || {}).await;
        assert!(stages(&timeline).contains(&"pool.empty".to_owned()));
        size(MsFlags::MS_REMOUNT, "size=16m");
        filled(&manager).await;
        assert!(metrics.failures.get() >= 1);
        assert_eq!(metrics.templates.get(), 1);
        template(&host);
        manager.pool().drain().await;
        umount2(&disk, MntFlags::MNT_DETACH).unwrap();
        host.end(manager).await;
    });
}

#[test]
fn a_damaged_working_set_goes_and_the_pool_fills_all_the_same() {
    on_a_host(&dialler(IMAGES, true), |host| async move {
        let (manager, _) = full(&host).await;
        manager.pool().drain().await;
        let record = template(&host).join("working-set");
        fs::write(&record, "FLINTWSS and nothing more").unwrap();
        let (next, metrics) = full(&host).await;
        assert!(!record.exists());
        assert_eq!(
            (metrics.templates.get(), metrics.replays.get(), metrics.failures.get()),
            (0, 0, 0),
            "the template is as good as it was"
        );
        drop(manager);
        end(host, next).await;
    });
}
