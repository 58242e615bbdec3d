use flint_api::guest::{PodDirectory, Rlimit, Tmpfs};

use super::*;

fn request() -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: "web".into(),
        image_id: "image".into(),
        scratch_serial: "scratch".into(),
        process: Some(RequestedProcess {
            args: vec!["/bin/true".into()],
            env: vec!["A=1".into(), "B=x=y".into(), "A=2".into()],
            capabilities: vec!["CHOWN".into(), "NET_BIND_SERVICE".into()],
            ..RequestedProcess::default()
        }),
        ..CreateContainerRequest::default()
    }
}

fn around() -> Surroundings {
    let user = Resolved {
        uid: 5,
        gid: 6,
        additional_gids: vec![7],
        home: "/home/u".into(),
    };
    Surroundings {
        user,
        pid_namespace: None,
        message_queues: true,
        devices: Vec::new(),
    }
}

fn build_with(change: impl FnOnce(&mut CreateContainerRequest)) -> Result<Spec, SpecError> {
    let mut request = request();
    change(&mut request);
    build(&request, &Name::parse("container", "web").unwrap(), around())
}

fn find<'a>(spec: &'a Spec, destination: &str) -> Option<&'a Mount> {
    spec.mounts()
        .as_ref()
        .unwrap()
        .iter()
        .find(|mount| mount.destination().to_str() == Some(destination))
}

fn options<'a>(spec: &'a Spec, destination: &str) -> &'a [String] {
    find(spec, destination).unwrap().options().as_ref().unwrap()
}

#[test]
fn the_last_value_of_a_variable_wins_and_defaults_fill_in() {
    let spec = build_with(|_| {}).unwrap();
    let env = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(env, ["A=2", "B=x=y", &format!("PATH={DEFAULT_PATH}"), "HOME=/home/u"]);
}

#[test]
fn a_pod_s_namespaces_are_shared_and_a_container_s_are_its_own() {
    let kinds = |spec: &Spec| -> Vec<LinuxNamespaceType> {
        spec.linux()
            .as_ref()
            .unwrap()
            .namespaces()
            .as_ref()
            .unwrap()
            .iter()
            .map(LinuxNamespace::typ)
            .collect()
    };
    let spec = build_with(|_| {}).unwrap();
    assert_eq!(spec.hostname(), &None);
    assert_eq!(
        kinds(&spec),
        [
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Cgroup
        ]
    );
    let shared = Surroundings {
        pid_namespace: Some("/proc/9/ns/pid".into()),
        ..around()
    };
    let spec = build(&request(), &Name::parse("container", "web").unwrap(), shared).unwrap();
    let pid = spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap()[0].clone();
    assert_eq!(pid.path().as_deref(), Some(std::path::Path::new("/proc/9/ns/pid")));
}

#[test]
fn limits_become_cgroup_files() {
    let files = limits(ContainerResources {
        cpu_limit_milli: 250,
        cpu_weight: 79,
        memory_limit_bytes: 1 << 20,
        pids_limit: 12,
    });
    assert_eq!(files["cpu.max"], "25000 100000");
    assert_eq!(files["cpu.weight"], "79");
    assert_eq!(files["memory.max"], "1048576");
    assert_eq!(files["pids.max"], "12");
    assert_eq!(files["memory.oom.group"], "1");
    let files = limits(ContainerResources::default());
    assert_eq!(files["pids.max"], "4096");
    assert!(!files.contains_key("cpu.max") && !files.contains_key("memory.max"));
    let tiny = limits(ContainerResources {
        cpu_limit_milli: 1,
        ..ContainerResources::default()
    });
    assert_eq!(tiny["cpu.max"], "1000 100000");
}

#[test]
fn only_a_privileged_container_sees_what_is_masked_and_holds_every_capability() {
    let spec = build_with(|_| {}).unwrap();
    assert!(
        spec.linux()
            .as_ref()
            .unwrap()
            .masked_paths()
            .as_ref()
            .unwrap()
            .contains(&"/proc/kcore".to_owned())
    );
    assert!(options(&spec, "/sys").contains(&"ro".to_owned()));
    let held = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
    assert_eq!(held.bounding().as_ref().unwrap().len(), 2);
    assert!(held.ambient().as_ref().unwrap().is_empty());
    let spec = build_with(|request| request.privileged = true).unwrap();
    assert!(
        spec.linux()
            .as_ref()
            .unwrap()
            .masked_paths()
            .as_ref()
            .unwrap()
            .is_empty()
    );
    assert!(options(&spec, "/sys").contains(&"rw".to_owned()));
    let held = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
    assert!(held.bounding().as_ref().unwrap().contains(&Capability::SysAdmin));
}

#[test]
fn mounts_come_from_where_the_pod_keeps_them() {
    let directory = |memory| {
        Some(Source::PodDirectory(PodDirectory {
            name: "data".into(),
            memory,
            size_bytes: 0,
        }))
    };
    let spec = build_with(|request| {
        request.mounts = vec![
            RequestedMount {
                destination: "/disk".into(),
                read_only: true,
                source: directory(false),
                ..Default::default()
            },
            RequestedMount {
                destination: "/mem".into(),
                read_only: false,
                source: directory(true),
                ..Default::default()
            },
            RequestedMount {
                destination: "/own".into(),
                read_only: false,
                source: Some(Source::Tmpfs(Tmpfs { size_bytes: 4096 })),
                ..Default::default()
            },
            RequestedMount {
                destination: "/etc/hosts".into(),
                read_only: false,
                source: directory(true),
                ..Default::default()
            },
        ];
    })
    .unwrap();
    let source = |destination| find(&spec, destination).unwrap().source().clone().unwrap();
    assert_eq!(source("/disk"), PathBuf::from("/run/flint/scratch/scratch/pods/data"));
    assert_eq!(source("/mem"), PathBuf::from("/run/flint/memory/data"));
    assert!(options(&spec, "/disk").contains(&"ro".to_owned()));
    assert!(options(&spec, "/own").contains(&"size=4096".to_owned()));
    let hosts = spec
        .mounts()
        .as_ref()
        .unwrap()
        .iter()
        .filter(|m| m.destination().ends_with("hosts"))
        .count();
    assert_eq!(hosts, 1, "the pod's own mount replaces ours");
}

#[test]
fn each_bad_field_is_named() {
    let message = |change: fn(&mut CreateContainerRequest)| build_with(change).unwrap_err().to_string();
    let process = |request: &mut CreateContainerRequest| request.process.take().unwrap();
    assert_eq!(
        build_with(|r| drop(process(r))).unwrap_err().to_string(),
        "process: is missing"
    );
    assert!(message(|r| r.process.as_mut().unwrap().args.clear()).starts_with("process.args:"));
    assert!(message(|r| r.process.as_mut().unwrap().args.push("a\0".into())).starts_with("process.args[1]:"));
    assert!(message(|r| r.process.as_mut().unwrap().env.push("=x".into())).starts_with("process.env[3]:"));
    assert!(message(|r| r.process.as_mut().unwrap().env.push("x".into())).starts_with("process.env[3]:"));
    assert!(message(|r| r.process.as_mut().unwrap().working_dir = "tmp".into()).starts_with("process.working_dir:"));
    assert!(message(|r| r.process.as_mut().unwrap().capabilities.push("CAP_CHOWN".into())).contains("capabilities[2]"));
    assert!(
        message(|r| r.mounts.push(RequestedMount {
            destination: "/x".into(),
            ..Default::default()
        }))
        .contains("mounts[0]")
    );
    for destination in ["", "/", "x", "/a/../../b"] {
        let result = build_with(|request| {
            let source = Some(Source::Tmpfs(Tmpfs::default()));
            request.mounts.push(RequestedMount {
                destination: destination.into(),
                read_only: false,
                source,
                ..Default::default()
            });
        });
        assert!(
            result.unwrap_err().to_string().starts_with("mounts[0].destination:"),
            "{destination:?}"
        );
    }
    let limit = |kind: &str, soft, hard| {
        build_with(|request| {
            let rlimits = vec![Rlimit {
                r#type: kind.into(),
                soft,
                hard,
            }];
            request.process.as_mut().unwrap().rlimits = rlimits;
        })
    };
    assert!(limit("RLIMIT_NOFILE", 10, 20).is_ok());
    assert!(limit("RLIMIT_NOFILE", 20, 10).is_err());
    assert!(limit("NOFILE", 1, 1).is_err());
}

#[test]
fn an_exec_takes_what_it_does_not_say_from_the_container() {
    let spec = build_with(|request| request.process.as_mut().unwrap().working_dir = "/srv".into()).unwrap();
    let base = spec.process().as_ref().unwrap();
    let requested = RequestedProcess {
        args: vec!["sh".into()],
        env: vec!["A=3".into()],
        ..RequestedProcess::default()
    };
    let process = exec_process(base, &requested, None).unwrap();
    assert_eq!(process.cwd(), &PathBuf::from("/srv"));
    assert_eq!(process.user().uid(), 5);
    let env = process.env().clone().unwrap();
    assert!(
        env.contains(&"A=3".to_owned()) && env.contains(&"HOME=/home/u".to_owned()) && !env.contains(&"A=2".to_owned())
    );
    assert_eq!(process.capabilities(), base.capabilities());

    let root = Resolved {
        uid: 0,
        gid: 0,
        additional_gids: vec![],
        home: "/root".into(),
    };
    let process = exec_process(base, &requested, Some(&root)).unwrap();
    assert_eq!(process.user().uid(), 0);
    assert!(process.env().clone().unwrap().contains(&"HOME=/root".to_owned()));
}
