//! Sandboxes with the real flint-vmm and guests of a few instructions: how they end, and that nothing is left of them.
//! These guests never announce themselves, so no launch here succeeds; the system tests have those that do.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod sandbox;

use std::{collections::HashSet, fs, time::Duration};

use flint_api::vmm::{ExitReason, Stop, request::Command};
use flintd::{
    sandbox::{Exited, Manager, SandboxError, TakenOver, control::Control},
    timeline::Timeline,
};
use nix::{
    sys::{ptrace, signal::Signal, wait::waitpid},
    unistd::Pid,
};
use sandbox::{Host, LIMIT, as_daemon, ask, guest, on_a_host, signal, spec, wait_for, wait_gone, wait_there};

/// A guest that says it runs, and then sleeps.
fn sleeper() -> Vec<u8> {
    guest::elf(&[guest::print("up"), guest::halt()].concat())
}

/// Launches what must fail because its sandbox ends, and says how it ended.
async fn end_of(manager: &Manager, net: bool) -> (Exited, String) {
    match manager.launch(spec(net), &Timeline::new()).await {
        Err(SandboxError::Ended { exited, log }) => (exited, log),
        other => panic!("{other:?}"),
    }
}

/// The same, with something done to the VMM as soon as its guest runs.
async fn end_after(manager: &Manager, host: &Host, deed: impl FnOnce(Pid)) -> Exited {
    let serial = host.file("serial.log");
    let ready = tokio::task::spawn_blocking(move || wait_for(&serial, "up"));
    let done = async {
        ready.await.unwrap();
        let processes = host.processes();
        assert_eq!(processes.len(), 1, "the launcher has left, the VMM is there");
        deed(processes[0]);
    };
    let ((exited, _), ()) = tokio::time::timeout(LIMIT, async { tokio::join!(end_of(manager, true), done) })
        .await
        .expect("in time");
    exited
}

fn ends_with(code: &[u8], reason: ExitReason) {
    let kernel = guest::elf(&[guest::print("last words"), code.to_vec()].concat());
    on_a_host(&kernel, move |host| async move {
        let manager = host.manager().await;
        let (exited, log) = end_of(&manager, true).await;
        assert_eq!(exited.reason, reason, "{exited:?} {log}");
        assert!(log.contains("last words"), "the error shows the guest's console: {log}");
        host.end(manager).await;
    });
}

#[test]
fn a_guest_that_resets_itself_ends_the_launch() {
    ends_with(&guest::out(0x64, 0xfe), ExitReason::Reset);
}

#[test]
fn a_guest_that_powers_off_ends_the_launch() {
    ends_with(&guest::out(0x601, 0x34), ExitReason::Poweroff);
}

#[test]
fn a_guest_that_panics_ends_the_launch() {
    ends_with(&guest::out(0x505, 1), ExitReason::Panic);
}

#[test]
fn a_guest_with_a_triple_fault_ends_the_launch() {
    ends_with(&guest::triple_fault(), ExitReason::TripleFault);
}

#[test]
fn a_guest_that_never_calls_is_ended_after_the_boot_timeout() {
    on_a_host(&sleeper(), |host| async move {
        let mut config = host.config();
        config.boot_timeout = Duration::from_secs(1);
        let manager = Manager::new(config).await.unwrap();
        let error = manager.launch(spec(true), &Timeline::new()).await.unwrap_err();
        assert!(matches!(error, SandboxError::BootTimeout(_)), "{error:?}");
        assert!(
            error.to_string().contains("serial.log"),
            "it says where to look: {error}"
        );
        host.end(manager).await;
    });
}

#[test]
fn a_vmm_that_is_killed_leaves_nothing() {
    on_a_host(&sleeper(), |host| async move {
        let manager = host.manager().await;
        let exited = end_after(&manager, &host, |vmm| signal(vmm, Signal::SIGKILL)).await;
        assert_eq!(exited.reason, ExitReason::Killed, "{exited:?}");
        host.end(manager).await;
    });
}

/// Kills the VMM, and its launcher if that is still there, so long after its start began; at the latest when its guest runs.
async fn kill_vmm_after(host: &Host, moment: Duration) {
    let (folder, serial) = (host.file(""), host.file("serial.log"));
    tokio::task::spawn_blocking(move || wait_there(&folder)).await.unwrap();
    tokio::time::sleep(moment).await;
    if host.processes().is_empty() {
        tokio::task::spawn_blocking(move || wait_for(&serial, "up"))
            .await
            .unwrap();
    }
    for process in host.processes() {
        // The launcher may have left meanwhile.
        let _ = nix::sys::signal::kill(process, Signal::SIGKILL);
    }
}

#[test]
fn whenever_a_vmm_is_killed_during_its_start_that_is_said_and_nothing_is_left() {
    const ROUNDS: usize = 16;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    on_a_host(&sleeper(), move |host| async move {
        let mut random = fastrand::Rng::with_seed(seed);
        let manager = host.manager().await;
        for _ in 0..ROUNDS {
            // No event marks these moments: they lie between all that can be seen.
            let moment = Duration::from_micros(random.u64(..60_000));
            let killed = async { tokio::join!(end_of(&manager, true), kill_vmm_after(&host, moment)) };
            let ((exited, _), ()) = tokio::time::timeout(LIMIT, killed).await.expect("in time");
            assert_eq!(exited.reason, ExitReason::Killed, "after {moment:?}: {exited:?}");
            host.assert_clean();
        }
        host.end(manager).await;
    });
}

/// Makes a process that waits in a system call make another one: ptrace(2), of which no filter may know.
fn make_forbidden_call(vmm: Pid) {
    ptrace::attach(vmm).unwrap();
    waitpid(vmm, None).unwrap();
    let mut registers = ptrace::getregs(vmm).unwrap();
    // Back onto the two bytes of SYSCALL; and no restart of the interrupted call.
    registers.rip -= 2;
    registers.rax = u64::try_from(nix::libc::SYS_ptrace).unwrap();
    registers.orig_rax = u64::MAX;
    ptrace::setregs(vmm, registers).unwrap();
    ptrace::detach(vmm, None).unwrap();
}

#[test]
fn a_vmm_that_makes_a_forbidden_system_call_is_reported_as_such() {
    on_a_host(&sleeper(), |host| async move {
        let manager = host.manager().await;
        let exited = end_after(&manager, &host, make_forbidden_call).await;
        assert_eq!(exited.reason, ExitReason::Seccomp, "{exited:?}");
        host.end(manager).await;
    });
}

#[test]
fn a_launch_that_nobody_waits_for_any_more_is_undone() {
    on_a_host(&sleeper(), |host| async move {
        let manager = host.manager().await;
        let serial = host.file("serial.log");
        let folder = host.file("");
        let ready = tokio::task::spawn_blocking(move || wait_for(&serial, "up"));
        let timeline = Timeline::new();
        tokio::select! {
            launched = manager.launch(spec(true), &timeline) => panic!("{launched:?}"),
            _ = ready => {}
        }
        // The future is gone. Its sandbox's folder goes last of all.
        let ended = tokio::task::spawn_blocking(move || wait_gone(&folder));
        tokio::time::timeout(LIMIT, ended).await.expect("in time").unwrap();
        host.end(manager).await;
    });
}

#[test]
fn a_vmm_that_cannot_start_is_explained() {
    on_a_host(&sleeper(), |host| async move {
        let mut config = host.config();
        config.vmm = "/bin/false".into();
        let manager = Manager::new(config).await.unwrap();
        let (exited, _) = end_of(&manager, true).await;
        assert_eq!(exited.reason, ExitReason::VmmError, "{exited:?}");
        assert!(exited.detail.contains("status 1"), "{exited:?}");
        host.end(manager).await;
    });
}

/// Not a test of its own: what the daemon of the tests below does, in a process of its own.
#[test]
#[ignore = "other tests run it"]
fn daemon() {
    as_daemon(|host| async move {
        let manager = host.manager().await;
        let launched = manager.launch(spec(true), &Timeline::new()).await;
        panic!("a sleeper cannot be launched: {launched:?}");
    })
    .expect("other tests run this");
}

/// A daemon launches a sandbox, whose start is made out to be complete, and is killed.
async fn orphan(host: &Host) {
    let daemon = host.daemon("daemon");
    let serial = host.file("serial.log");
    let up = tokio::task::spawn_blocking(move || wait_for(&serial, "up"));
    tokio::time::timeout(LIMIT, up).await.expect("the guest runs").unwrap();
    fs::write(host.file("ready"), "").unwrap();
    daemon.kill_9();
    assert_eq!(host.processes().len(), 1, "the VMM goes on without the daemon");
}

async fn ended(manager: &Manager) -> Exited {
    match manager.take_over("a").await.unwrap() {
        TakenOver::Ended(exited) => exited,
        TakenOver::Running(sandbox) => panic!("{sandbox:?}"),
    }
}

#[test]
fn a_sandbox_outlives_its_daemon_and_is_taken_over_by_the_next() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        // A sleeper has no images; one that has notes them here.
        let intent = fs::read_to_string(host.file("sandbox.json")).unwrap();
        let with_image = intent.replace(r#""images":[]"#, r#""images":["sha256:of-an-image"]"#);
        assert_ne!(intent, with_image);
        fs::write(host.file("sandbox.json"), with_image).unwrap();
        let manager = host.manager().await;
        let TakenOver::Running(sandbox) = manager.take_over("a").await.unwrap() else {
            panic!("it runs");
        };
        assert_eq!(
            sandbox.state().await.unwrap().phase(),
            flint_api::vmm::state::Phase::Running
        );
        assert_eq!(sandbox.addresses().len(), 1);
        assert_eq!(
            sandbox.images(),
            ["sha256:of-an-image"],
            "what it reads is known to who keeps images"
        );
        assert!(ask("nft list set bridge flint sources").contains(&sandbox.addresses()[0].to_string()));
        assert!(manager.take_over("a").await.is_err(), "it has an owner now");
        sandbox.kill();
        assert_eq!(sandbox.wait().await.reason, ExitReason::Stopped);
        host.end(manager).await;
    });
}

#[test]
fn a_sandbox_that_was_taken_over_is_followed_to_its_end() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        let manager = host.manager().await;
        let TakenOver::Running(sandbox) = manager.take_over("a").await.unwrap() else {
            panic!("it runs");
        };
        signal(host.processes()[0], Signal::SIGKILL);
        assert_eq!(sandbox.wait().await.reason, ExitReason::Killed);
        host.end(manager).await;
    });
}

#[test]
fn a_sandbox_that_ended_meanwhile_tells_why_by_its_exit_file() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        let (control, mut events) = Control::connect(&host.file("control.sock")).unwrap();
        control.command(Command::Stop(Stop {}), &[]).await.unwrap();
        while events.recv().await.is_some() {}
        let manager = host.manager().await;
        let exited = ended(&manager).await;
        assert_eq!(exited.reason, ExitReason::Stopped);
        assert_eq!(exited.detail, "Stop was asked for", "the VMM's own words");
        host.end(manager).await;
    });
}

#[test]
fn a_start_that_the_daemon_did_not_survive_is_undone() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        fs::remove_file(host.file("ready")).unwrap();
        let manager = host.manager().await;
        let exited = ended(&manager).await;
        assert!(
            exited.detail.contains("before the sandbox's start was complete"),
            "{exited:?}"
        );
        host.end(manager).await;
    });
}

/// A daemon is killed in the middle of a start; the next one must find or undo all of it.
async fn killed_while_starting(host: &Host, moment: impl FnOnce() + Send + 'static) {
    let daemon = host.daemon("daemon");
    let moment = tokio::task::spawn_blocking(moment);
    tokio::time::timeout(LIMIT, moment).await.expect("in time").unwrap();
    daemon.kill_9();
    let manager = host.manager().await;
    match manager.take_over("a").await {
        Ok(TakenOver::Ended(exited)) => assert!(exited.detail.contains("before the sandbox's start"), "{exited:?}"),
        Ok(TakenOver::Running(sandbox)) => panic!("its guest has not dialled: {sandbox:?}"),
        // Nothing was begun yet.
        Err(SandboxError::Unknown(_)) => {}
        Err(error) => panic!("{error}"),
    }
    host.assert_clean();
    manager.remove().await.unwrap();
}

#[test]
fn whatever_step_of_a_start_the_daemon_is_killed_at_nothing_is_left() {
    on_a_host(&sleeper(), |host| async move {
        for file in [
            "",
            "sandbox.json",
            "control.sock",
            "vsock.sock",
            "exit",
            "serial.log",
            "vmm.log",
        ] {
            let file = host.file(file);
            killed_while_starting(&host, move || wait_there(&file)).await;
        }
        let serial = host.file("serial.log");
        killed_while_starting(&host, move || wait_for(&serial, "up")).await;
    });
}

#[test]
fn whenever_the_daemon_is_killed_during_a_start_nothing_is_left() {
    const ROUNDS: usize = 12;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    on_a_host(&sleeper(), move |host| async move {
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..ROUNDS {
            let folder = host.file("");
            // No event marks these moments: they lie between all that can be seen.
            let moment = Duration::from_micros(random.u64(..60_000));
            killed_while_starting(&host, move || {
                wait_there(&folder);
                std::thread::sleep(moment);
            })
            .await;
        }
    });
}

#[test]
fn a_kernel_that_only_looks_like_one_is_refused_with_its_name() {
    on_a_host(b"\x7fELF and nothing more of it", |host| async move {
        let manager = host.manager().await;
        let error = manager.launch(spec(true), &Timeline::new()).await.unwrap_err();
        let message = flintd::chain(&error);
        assert!(message.to_lowercase().contains("kernel"), "{message}");
        host.end(manager).await;
    });
}

#[test]
fn sandboxes_that_nobody_claims_are_ended() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        let manager = host.manager().await;
        manager.end_unknown(&HashSet::from(["a".to_owned()])).await;
        assert_eq!(host.processes().len(), 1, "a known one stays");
        manager.end_unknown(&HashSet::new()).await;
        host.end(manager).await;
    });
}

#[test]
fn a_damaged_intent_costs_its_sandbox_and_nothing_else() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        fs::write(host.file("sandbox.json"), "{\"id\":").unwrap();
        fs::write(host.stray(), "a file where only folders belong").unwrap();
        let manager = host.manager().await;
        let exited = ended(&manager).await;
        assert!(exited.detail.contains("sandbox.json"), "{exited:?}");
        fs::remove_file(host.stray()).unwrap();
        host.end(manager).await;
    });
}

#[test]
fn a_sandbox_whose_address_is_no_longer_in_the_range_is_ended() {
    on_a_host(&sleeper(), |host| async move {
        orphan(&host).await;
        let mut config = host.config();
        config.network.range = "10.99.0.0/24".parse().unwrap();
        let manager = Manager::new(config).await.unwrap();
        let exited = ended(&manager).await;
        assert!(exited.detail.contains("10.88.0.2"), "{exited:?}");
        host.end(manager).await;
    });
}
