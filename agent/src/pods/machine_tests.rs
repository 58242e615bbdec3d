//! The state machine, driven by hand.

use flint_api::{host::pod_status::Phase, vmm::ExitReason};

use super::*;

/// A machine with a clock of its own.
#[derive(Clone)]
struct Script {
    machine: Machine,
    now: SystemTime,
}

impl Script {
    fn new(policy: host::RestartPolicy, containers: &[&str]) -> Self {
        let containers = containers
            .iter()
            .map(|name| host::Container {
                name: (*name).into(),
                image: "busybox".into(),
                ..Default::default()
            })
            .collect();
        let spec = host::PodSpec {
            containers,
            restart_policy: policy.into(),
            ..Default::default()
        };
        Self {
            machine: Machine::new(&spec),
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
        }
    }

    /// A pod of one container whose program runs.
    fn running(policy: host::RestartPolicy) -> Self {
        let mut script = Self::new(policy, &["web"]);
        script.up();
        script.on(Event::Started { container: 0, run: 0 });
        script
    }

    fn up(&mut self) -> Vec<Action> {
        self.on(Event::Start);
        for container in 0..self.machine.containers.len() {
            self.on(Event::Pulled {
                container,
                result: Ok("sha256:1".into()),
            });
        }
        self.on(Event::Launched(Ok(vec!["10.0.0.2".into()])))
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.machine.handle(event, self.now)
    }

    fn exit(&mut self, run: u32, exit_code: u32) -> Vec<Action> {
        self.on(Event::Exited {
            container: 0,
            run,
            exit: guest::ContainerExit {
                exit_code,
                ..Default::default()
            },
        })
    }

    fn gone(&mut self, reason: ExitReason) -> Vec<Action> {
        self.on(Event::SandboxGone(SandboxExit {
            reason,
            detail: String::new(),
        }))
    }

    fn wait(&mut self, pause: Duration) {
        self.now += pause;
    }

    fn phase(&self) -> Phase {
        self.machine.phase()
    }

    fn waiting(&self, index: usize) -> String {
        match self.machine.status().containers[index].state.clone() {
            Some(host::container_status::State::Waiting(waiting)) => waiting.reason,
            other => panic!("not waiting: {other:?}"),
        }
    }

    fn terminated(&self, index: usize) -> host::Terminated {
        match self.machine.status().containers[index].state.clone() {
            Some(host::container_status::State::Terminated(terminated)) => terminated,
            other => panic!("not terminated: {other:?}"),
        }
    }
}

#[test]
fn images_come_in_parallel_and_the_sandbox_is_launched_when_the_last_is_here() {
    let mut pod = Script::new(host::RestartPolicy::Always, &["a", "b"]);
    assert_eq!(pod.on(Event::Start), [Action::Pull(0), Action::Pull(1)]);
    assert_eq!(
        pod.on(Event::Pulled {
            container: 1,
            result: Ok("sha256:b".into())
        }),
        []
    );
    assert_eq!(
        pod.on(Event::Pulled {
            container: 0,
            result: Ok("sha256:a".into())
        }),
        [Action::Launch]
    );
    assert_eq!(pod.phase(), Phase::Pending);
    let actions = pod.on(Event::Launched(Ok(vec!["10.0.0.2".into()])));
    assert_eq!(actions, [Action::Run(0, 0), Action::Run(1, 0)]);
    pod.on(Event::Started { container: 0, run: 0 });
    assert_eq!(pod.phase(), Phase::Running);
}

#[test]
fn a_failed_pull_is_shown_as_kubernetes_shows_it_and_tried_again() {
    let mut pod = Script::new(host::RestartPolicy::Always, &["web"]);
    pod.on(Event::Start);
    for seconds in [10, 20, 40] {
        let error = StepError::new("ErrImagePull", "registry is down");
        let actions = pod.on(Event::Pulled {
            container: 0,
            result: Err(error),
        });
        assert!(
            actions.contains(&Action::Arm(Timer::Pull(0), Duration::from_secs(seconds))),
            "{actions:?}"
        );
        assert_eq!(pod.waiting(0), "ErrImagePull");
        pod.on(Event::Timer(Timer::PullFailed(0)));
        assert_eq!(pod.waiting(0), "ImagePullBackOff");
        assert_eq!(pod.on(Event::Timer(Timer::Pull(0))), [Action::Pull(0)]);
    }
    assert_eq!(
        pod.on(Event::Pulled {
            container: 0,
            result: Ok("sha256:1".into())
        }),
        [Action::Launch]
    );
}

#[test]
fn an_image_that_may_not_be_pulled_is_not_tried_again() {
    let mut pod = Script::new(host::RestartPolicy::Always, &["web"]);
    pod.on(Event::Start);
    let error = StepError::new("ErrImageNeverPull", "not here");
    assert_eq!(
        pod.on(Event::Pulled {
            container: 0,
            result: Err(error)
        }),
        []
    );
    assert_eq!(pod.waiting(0), "ErrImageNeverPull");
}

#[test]
fn never_lets_a_pod_end_with_its_container_and_shuts_the_sandbox_down() {
    for (code, phase, reason) in [(0, Phase::Succeeded, "Completed"), (3, Phase::Failed, "Error")] {
        let mut pod = Script::running(host::RestartPolicy::Never);
        assert_eq!(
            pod.exit(0, code),
            [Action::Shutdown, Action::Arm(Timer::Patience, SHUTDOWN_PATIENCE)]
        );
        assert_eq!(pod.phase(), Phase::Running);
        assert_eq!(pod.gone(ExitReason::Poweroff), []);
        assert_eq!(pod.phase(), phase);
        assert_eq!(
            (pod.terminated(0).exit_code, pod.terminated(0).reason.as_str()),
            (code, reason)
        );
        assert!(pod.machine.status().pod_ips.is_empty());
    }
}

#[test]
fn the_sandbox_stays_until_the_last_container_has_ended() {
    let mut pod = Script::new(host::RestartPolicy::Never, &["a", "b"]);
    pod.up();
    pod.on(Event::Started { container: 0, run: 0 });
    pod.on(Event::Started { container: 1, run: 0 });
    assert_eq!(pod.exit(0, 0), []);
    let exit = guest::ContainerExit {
        exit_code: 137,
        signal: 9,
        oom_killed: true,
        ..Default::default()
    };
    assert!(
        pod.on(Event::Exited {
            container: 1,
            run: 0,
            exit
        })
        .contains(&Action::Shutdown)
    );
    assert_eq!(pod.terminated(1).reason, "OOMKilled");
}

#[test]
fn on_failure_restarts_only_what_failed() {
    let mut pod = Script::running(host::RestartPolicy::OnFailure);
    assert_eq!(pod.exit(0, 1), [Action::Run(0, 1)]);
    pod.on(Event::Started { container: 0, run: 1 });
    assert!(pod.exit(1, 0).contains(&Action::Shutdown));
    let status = &pod.machine.status().containers[0];
    assert_eq!(status.restart_count, 1);
    assert_eq!(status.last_termination.as_ref().map(|last| last.exit_code), Some(1));
}

#[test]
fn a_crash_loop_backs_off_and_a_long_run_ends_it() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    assert_eq!(pod.exit(0, 1), [Action::Run(0, 1)]);
    for (run, seconds) in [(1, 10), (2, 20), (3, 40)] {
        pod.on(Event::Started { container: 0, run });
        assert_eq!(
            pod.exit(run, 1),
            [Action::Arm(Timer::Restart(0), Duration::from_secs(seconds))]
        );
        assert_eq!(pod.waiting(0), "CrashLoopBackOff");
        assert_eq!(pod.phase(), Phase::Running);
        assert_eq!(pod.on(Event::Timer(Timer::Restart(0))), [Action::Run(0, run + 1)]);
    }
    pod.on(Event::Started { container: 0, run: 4 });
    pod.wait(Duration::from_secs(601));
    assert_eq!(pod.exit(4, 1), [Action::Run(0, 5)]);
}

#[test]
fn a_late_word_about_an_earlier_run_changes_nothing() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    pod.exit(0, 1);
    pod.on(Event::Started { container: 0, run: 1 });
    let before = pod.machine.status();
    assert_eq!(pod.exit(0, 1), []);
    assert_eq!(pod.on(Event::Started { container: 0, run: 0 }), []);
    assert_eq!(
        pod.on(Event::Exited {
            container: 7,
            run: 0,
            exit: Default::default()
        }),
        []
    );
    assert_eq!(pod.machine.status(), before);
}

#[test]
fn termination_is_term_then_grace_then_kill_then_shutdown() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    let grace = Duration::from_secs(30);
    assert_eq!(
        pod.on(Event::Terminate(grace)),
        [Action::Stop(0), Action::Arm(Timer::Grace, grace)]
    );
    assert!(pod.machine.status().terminating);
    assert!(pod.on(Event::Timer(Timer::Grace)).contains(&Action::Kill(0)));
    assert!(pod.exit(0, 137).contains(&Action::Shutdown));
    pod.gone(ExitReason::Poweroff);
    assert_eq!(pod.phase(), Phase::Failed);
    assert_eq!(pod.terminated(0).exit_code, 137);
    assert_eq!(pod.machine.status().reason, "");
}

#[test]
fn grace_of_zero_kills_at_once_and_a_second_call_can_only_shorten_it() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    pod.on(Event::Terminate(Duration::from_secs(30)));
    assert!(pod.on(Event::Terminate(Duration::ZERO)).contains(&Action::Kill(0)));
    let actions = pod.on(Event::Terminate(Duration::from_secs(60)));
    assert!(
        actions.contains(&Action::Arm(Timer::Grace, Duration::ZERO)),
        "{actions:?}"
    );
}

#[test]
fn a_guest_that_does_not_shut_down_is_killed() {
    let mut pod = Script::running(host::RestartPolicy::Never);
    pod.exit(0, 0);
    assert_eq!(pod.on(Event::Timer(Timer::Patience)), [Action::KillSandbox]);
    pod.gone(ExitReason::Killed);
    assert_eq!(pod.phase(), Phase::Succeeded, "the container had ended well before");
}

#[test]
fn termination_before_the_sandbox_is_there_ends_the_pod_without_running_anything() {
    let mut pulling = Script::new(host::RestartPolicy::Always, &["web"]);
    pulling.on(Event::Start);
    assert_eq!(pulling.on(Event::Terminate(Duration::from_secs(1))), []);
    assert_eq!(pulling.phase(), Phase::Failed);

    let mut launching = Script::new(host::RestartPolicy::Always, &["web"]);
    launching.on(Event::Start);
    launching.on(Event::Pulled {
        container: 0,
        result: Ok("sha256:1".into()),
    });
    let mut abandoned = launching.clone();
    assert_eq!(
        abandoned.on(Event::Terminate(Duration::from_secs(1))),
        [Action::Abandon]
    );
    abandoned.on(Event::Launched(Err(StepError::new("Terminated", "it was terminated"))));
    assert_eq!(abandoned.phase(), Phase::Failed);

    launching.on(Event::Terminate(Duration::from_secs(1)));
    let actions = launching.on(Event::Launched(Ok(Vec::new())));
    assert!(
        actions.contains(&Action::Shutdown) && !actions.contains(&Action::Run(0, 0)),
        "{actions:?}"
    );
    launching.gone(ExitReason::Poweroff);
    assert_eq!(launching.phase(), Phase::Failed);
}

#[test]
fn a_container_that_starts_after_the_wish_to_end_is_stopped() {
    let mut pod = Script::new(host::RestartPolicy::Always, &["web"]);
    pod.up();
    pod.on(Event::Terminate(Duration::from_secs(5)));
    assert_eq!(pod.on(Event::Started { container: 0, run: 0 }), [Action::Stop(0)]);
}

#[test]
fn a_dead_sandbox_is_made_anew_unless_the_policy_is_never() {
    let mut pod = Script::running(host::RestartPolicy::Always);
    assert_eq!(
        pod.gone(ExitReason::Panic),
        [Action::Arm(Timer::Relaunch, Duration::ZERO)]
    );
    let status = &pod.machine.status().containers[0];
    let last = status.last_termination.clone().expect("it ran");
    assert_eq!((last.exit_code, last.reason.as_str()), (137, "SandboxKilled"));
    assert!(last.message.contains("panicked"), "{}", last.message);
    assert_eq!(pod.on(Event::Timer(Timer::Relaunch)), [Action::Launch]);
    assert_eq!(pod.on(Event::Launched(Ok(Vec::new()))), [Action::Run(0, 1)]);
    pod.on(Event::Started { container: 0, run: 1 });
    assert_eq!(
        pod.gone(ExitReason::Panic),
        [Action::Arm(Timer::Relaunch, Duration::from_secs(10))]
    );

    let mut never = Script::running(host::RestartPolicy::Never);
    assert_eq!(never.gone(ExitReason::Killed), []);
    assert_eq!(never.phase(), Phase::Failed);
    assert_eq!(never.terminated(0).reason, "SandboxKilled");
    assert_eq!(never.machine.status().reason, "SandboxKilled");
}

#[test]
fn with_on_failure_a_new_sandbox_does_not_run_again_what_had_succeeded() {
    let mut pod = Script::new(host::RestartPolicy::OnFailure, &["job", "web"]);
    pod.up();
    pod.on(Event::Started { container: 0, run: 0 });
    pod.on(Event::Started { container: 1, run: 0 });
    pod.exit(0, 0);
    pod.gone(ExitReason::Killed);
    pod.on(Event::Timer(Timer::Relaunch));
    assert_eq!(pod.on(Event::Launched(Ok(Vec::new()))), [Action::Run(1, 1)]);
}

#[test]
fn a_sandbox_that_cannot_be_made_is_tried_again_but_with_never_fails_the_pod() {
    let error = || StepError::new("FailedCreatePodSandBox", "open /dev/kvm: No such file or directory");
    let mut pod = Script::new(host::RestartPolicy::Always, &["web"]);
    pod.on(Event::Start);
    pod.on(Event::Pulled {
        container: 0,
        result: Ok("sha256:1".into()),
    });
    assert_eq!(
        pod.on(Event::Launched(Err(error()))),
        [Action::Arm(Timer::Relaunch, Duration::from_secs(10))]
    );
    assert_eq!(pod.phase(), Phase::Pending);
    assert!(pod.machine.status().message.contains("/dev/kvm"));
    assert_eq!(pod.on(Event::Timer(Timer::Relaunch)), [Action::Launch]);
    pod.on(Event::Launched(Ok(Vec::new())));
    assert_eq!(pod.machine.status().message, "", "what is over is not shown any more");

    let mut never = Script::new(host::RestartPolicy::Never, &["web"]);
    never.on(Event::Start);
    never.on(Event::Pulled {
        container: 0,
        result: Ok("sha256:1".into()),
    });
    assert_eq!(never.on(Event::Launched(Err(error()))), []);
    assert_eq!(never.phase(), Phase::Failed);
    assert_eq!(never.machine.status().reason, "FailedCreatePodSandBox");
}

#[test]
fn a_container_that_cannot_be_made_waits_with_the_reason_or_ends_the_pod() {
    let error = || StepError::new("CreateContainerConfigError", "image runs as root");
    let mut pod = Script::new(host::RestartPolicy::Always, &["web"]);
    pod.up();
    pod.on(Event::StartFailed {
        container: 0,
        run: 0,
        error: error(),
    });
    assert_eq!(pod.waiting(0), "CreateContainerConfigError");
    assert_eq!(pod.on(Event::Timer(Timer::Restart(0))), [Action::Run(0, 1)]);

    let mut never = Script::new(host::RestartPolicy::Never, &["web"]);
    never.up();
    let actions = never.on(Event::StartFailed {
        container: 0,
        run: 0,
        error: error(),
    });
    assert!(actions.contains(&Action::Shutdown));
    assert_eq!(never.terminated(0).exit_code, 128);
}

#[test]
fn a_program_that_is_missing_is_a_start_error() {
    let mut pod = Script::running(host::RestartPolicy::Never);
    let exit = guest::ContainerExit {
        exit_code: 127,
        start_error: "exec /nope: not found".into(),
        ..Default::default()
    };
    pod.on(Event::Exited {
        container: 0,
        run: 0,
        exit,
    });
    let end = pod.terminated(0);
    assert_eq!(
        (end.reason.as_str(), end.exit_code, end.message.as_str()),
        ("StartError", 127, "exec /nope: not found")
    );
}

/// Whatever comes, in whatever order: no panic, an ended pod stays ended, and a terminating pod starts nothing.
#[test]
fn any_order_of_events_is_survived() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |bound: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % bound
    };
    for _ in 0..2000 {
        let policy = [
            host::RestartPolicy::Always,
            host::RestartPolicy::OnFailure,
            host::RestartPolicy::Never,
        ];
        let mut pod = Script::new(policy[usize::try_from(next(3)).unwrap()], &["a", "b"]);
        pod.on(Event::Start);
        for _ in 0..40 {
            let index = usize::try_from(next(3)).unwrap();
            let run = u32::try_from(next(3)).unwrap();
            let was = (pod.machine.life(), pod.machine.terminating.is_some());
            let actions = match next(14) {
                0 | 1 => pod.on(Event::Pulled {
                    container: index,
                    result: Ok("sha256:1".into()),
                }),
                2 => pod.on(Event::Pulled {
                    container: index,
                    result: Err(StepError::new("ErrImagePull", "x")),
                }),
                3 | 4 => pod.on(Event::Launched(Ok(Vec::new()))),
                5 => pod.on(Event::Launched(Err(StepError::new("FailedCreatePodSandBox", "x")))),
                6 => pod.on(Event::Started { container: index, run }),
                7 => pod.on(Event::StartFailed {
                    container: index,
                    run,
                    error: StepError::new("E", "x"),
                }),
                8 => pod.on(Event::Exited {
                    container: index,
                    run,
                    exit: Default::default(),
                }),
                9 => pod.gone(ExitReason::Killed),
                11 => pod.on(Event::Paused),
                12 => pod.on(Event::Resumed),
                10 if next(4) == 0 => pod.on(Event::Terminate(Duration::from_secs(next(3)))),
                _ => pod.on(Event::Timer(match next(6) {
                    0 => Timer::Pull(index),
                    1 => Timer::PullFailed(index),
                    2 => Timer::Restart(index),
                    3 => Timer::Relaunch,
                    4 => Timer::Grace,
                    _ => Timer::Patience,
                })),
            };
            if was.0 == Life::Ended {
                assert_eq!((actions.as_slice(), pod.machine.life()), (&[][..], Life::Ended));
            }
            if was.1 {
                assert!(
                    !actions.iter().any(|action| matches!(action, Action::Run(..))),
                    "{actions:?}"
                );
            }
        }
    }
}

#[path = "pause_tests.rs"]
mod pause_tests;
