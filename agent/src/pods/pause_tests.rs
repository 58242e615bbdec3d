//! The state machine of a pod that is paused.

use flint_api::vmm::ExitReason;

use super::{Script, *};

fn paused(policy: host::RestartPolicy) -> Script {
    let mut pod = Script::running(policy);
    assert_eq!(pod.on(Event::Paused), []);
    pod
}

#[test]
fn a_paused_pod_is_shown_as_one_and_its_containers_are_not_ready() {
    let mut pod = paused(host::RestartPolicy::Never);
    let status = pod.machine.status();
    assert_eq!(status.paused_at, Some(timestamp(pod.now)));
    assert!(!status.containers[0].ready);
    assert_eq!(pod.phase(), host::pod_status::Phase::Running);

    pod.wait(Duration::from_secs(60));
    pod.on(Event::Paused);
    assert_eq!(
        pod.machine.status().paused_at,
        status.paused_at,
        "since the first pause"
    );

    assert_eq!(pod.on(Event::Resumed), []);
    let status = pod.machine.status();
    assert_eq!(status.paused_at, None);
    assert!(status.containers[0].ready);
}

#[test]
fn a_restart_that_comes_due_in_the_pause_waits_for_its_end() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    pod.exit(0, 1);
    pod.on(Event::Started { container: 0, run: 1 });
    pod.exit(1, 1);
    pod.on(Event::Paused);
    assert_eq!(pod.on(Event::Timer(Timer::Restart(0))), []);
    assert_eq!(pod.on(Event::Resumed), [Action::Run(0, 2)]);
    assert_eq!(pod.on(Event::Resumed), [], "once");
}

#[test]
fn an_exit_that_is_heard_in_the_pause_ends_the_pod_after_it() {
    let mut pod = paused(host::RestartPolicy::Never);
    assert_eq!(pod.exit(0, 3), [], "a guest that stands still cannot shut down");
    assert_eq!(
        pod.on(Event::Resumed),
        [Action::Shutdown, Action::Arm(Timer::Patience, SHUTDOWN_PATIENCE)]
    );
}

#[test]
fn the_end_of_a_paused_pod_begins_with_its_going_on() {
    let grace = Duration::from_secs(30);
    let mut pod = paused(host::RestartPolicy::Always);
    assert_eq!(
        pod.on(Event::Terminate(grace)),
        [Action::Resume, Action::Stop(0), Action::Arm(Timer::Grace, grace)]
    );
    pod.on(Event::Resumed);
    assert_eq!(pod.machine.status().paused_at, None);
    assert!(pod.exit(0, 143).contains(&Action::Shutdown));
}

#[test]
fn without_a_grace_period_a_paused_pod_is_killed_where_it_stands() {
    let mut pod = paused(host::RestartPolicy::Always);
    assert_eq!(pod.on(Event::Terminate(Duration::ZERO)), [Action::KillSandbox]);
    pod.gone(ExitReason::Stopped);
    assert_eq!(pod.machine.life(), Life::Ended);
    assert_eq!(pod.terminated(0).exit_code, 137);
    assert_eq!(pod.machine.status().paused_at, None);
}

#[test]
fn a_pause_that_comes_about_when_the_pod_is_to_end_is_undone() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    pod.on(Event::Terminate(Duration::from_secs(30)));
    assert_eq!(pod.on(Event::Paused), [Action::Resume]);
    assert!(!pod.machine.is_paused());
}

#[test]
fn a_paused_pod_whose_sandbox_dies_is_not_paused_any_more() {
    let mut pod = paused(host::RestartPolicy::Always);
    pod.gone(ExitReason::Killed);
    assert_eq!(pod.machine.status().paused_at, None);
    assert_eq!(pod.on(Event::Timer(Timer::Relaunch)), [Action::Launch]);
}
