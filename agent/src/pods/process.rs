//! What a container runs: the image's configuration and the pod's wishes, made one.

use flint_api::{guest, host};

use super::machine::StepError;
use crate::backend::ImageConfig;

/// What containerd gives a container that asks for nothing (names without `CAP_`).
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// All of Linux 6.12 (include/uapi/linux/capability.h), in the order of their numbers.
pub(super) const ALL_CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The process of a container; an error is a `CreateContainerConfigError`.
pub(super) fn process(
    pod: &host::PodSpec,
    container: &host::Container,
    image: &ImageConfig,
) -> Result<guest::Process, StepError> {
    let security = container.security_context.clone().unwrap_or_default();
    let args = args(container, image)?;
    let user = user(pod, &security, image)?;
    let working_dir = [&container.working_dir, &image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty());
    Ok(guest::Process {
        args,
        // The container's own come over them in the guest (`environment`).
        env: image.env.clone(),
        working_dir: working_dir.map_or_else(|| "/".into(), Clone::clone),
        user: Some(user),
        capabilities: capabilities(&security),
        no_new_privileges: security.allow_privilege_escalation == Some(false),
        terminal: container.tty,
        rlimits: Vec::new(),
    })
}

/// As Kubernetes has it ("Define a Command and Arguments"): a command replaces both the image's parts, args only its cmd.
fn args(container: &host::Container, image: &ImageConfig) -> Result<Vec<String>, StepError> {
    let (entrypoint, cmd) = match (&container.command, &container.args) {
        (command, args) if !command.is_empty() => (command, args),
        (_, args) if !args.is_empty() => (&image.entrypoint, args),
        _ => (&image.entrypoint, &image.cmd),
    };
    let args: Vec<_> = entrypoint.iter().chain(cmd).cloned().collect();
    if args.is_empty() {
        let name = &container.name;
        let message = format!("container {name}: the image has neither entrypoint nor cmd; give a command");
        return Err(StepError::new("CreateContainerConfigError", message));
    }
    Ok(args)
}

/// How many of a container's arguments are the image's, in which nothing is expanded.
pub(super) fn image_args(container: &host::Container, image: &ImageConfig) -> usize {
    match (container.command.is_empty(), container.args.is_empty()) {
        (false, _) => 0,
        (true, false) => image.entrypoint.len(),
        (true, true) => usize::MAX,
    }
}

fn user(pod: &host::PodSpec, security: &host::SecurityContext, image: &ImageConfig) -> Result<guest::User, StepError> {
    let of_pod = pod.security_context.clone().unwrap_or_default();
    let uid = security.run_as_user.or(of_pod.run_as_user);
    let gid = security.run_as_group.or(of_pod.run_as_group);
    if security.run_as_non_root || of_pod.run_as_non_root {
        refuse_root(uid, &image.user)?;
    }
    Ok(guest::User {
        name: image.user.clone(),
        uid,
        gid,
        additional_gids: of_pod.supplemental_groups.into_iter().chain(of_pod.fs_group).collect(),
    })
}

/// As a kubelet checks it: a name cannot be known not to be root before it is looked up in the image.
fn refuse_root(uid: Option<u32>, image_user: &str) -> Result<(), StepError> {
    let name = image_user.split(':').next().unwrap_or_default();
    let problem = match (uid, name.parse::<u32>()) {
        (Some(0), _) => "container has runAsNonRoot and its runAsUser is 0".to_owned(),
        (Some(_), _) => return Ok(()),
        (None, Ok(0)) => "container has runAsNonRoot and image will run as root".to_owned(),
        (None, Ok(_)) => return Ok(()),
        (None, Err(_)) if name.is_empty() || name == "root" => {
            "container has runAsNonRoot and image will run as root".to_owned()
        }
        (None, Err(_)) => format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root: \
             set runAsUser"
        ),
    };
    Err(StepError::new("CreateContainerConfigError", problem))
}

/// The defaults without what is dropped, with what is added; `ALL` stands for every one. Added wins, as in containerd.
fn capabilities(security: &host::SecurityContext) -> Vec<String> {
    let names = |list: &[String]| list.iter().map(|name| capability(name)).collect::<Vec<_>>();
    let (add, drop) = (names(&security.add_capabilities), names(&security.drop_capabilities));
    let all = |list: &[String]| list.iter().any(|name| name == "ALL");
    let begin: &[&str] = match () {
        () if security.privileged || all(&add) => &ALL_CAPABILITIES,
        () if all(&drop) => &[],
        () => &DEFAULT_CAPABILITIES,
    };
    let dropped = |name: &str| !security.privileged && drop.iter().any(|dropped| dropped == name);
    let mut result: Vec<String> = begin
        .iter()
        .filter(|name| !dropped(name))
        .map(|name| (*name).to_owned())
        .collect();
    for name in add {
        if name != "ALL" && !result.contains(&name) {
            result.push(name);
        }
    }
    result
}

/// A capability's name as the guest wants it.
pub(super) fn capability(name: &str) -> String {
    let name = name.to_ascii_uppercase();
    name.strip_prefix("CAP_").map_or_else(|| name.clone(), str::to_owned)
}

/// The signal that asks a container to end: SIGTERM, unless the image says otherwise.
pub(super) fn stop_signal(image: &ImageConfig) -> u32 {
    let name = image.stop_signal.trim();
    let number = name.parse::<u32>().ok().filter(|number| (1..=64).contains(number));
    number.or_else(|| signal_by_name(name)).unwrap_or(15)
}

fn signal_by_name(name: &str) -> Option<u32> {
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(offset) = name.strip_prefix("RTMIN+") {
        return offset
            .parse::<u32>()
            .ok()
            .map(|offset| 34 + offset)
            .filter(|number| *number <= 64);
    }
    nix::sys::signal::Signal::iterator()
        .find(|signal| signal.as_str().strip_prefix("SIG") == Some(name))
        .and_then(|signal| u32::try_from(signal as i32).ok())
}

/// cgroup v2 weight for a CPU request, by Kubernetes' formula: shares of 1024 a CPU, mapped from 2..262144 to 1..10000.
pub(super) fn cpu_weight(request_milli: u64) -> u64 {
    if request_milli == 0 {
        return 0;
    }
    let shares = (request_milli.saturating_mul(1024) / 1000).clamp(2, 262_144);
    1 + ((shares - 2) * 9999) / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["default"]),
            env: strings(&["PATH=/image", "MODE=image"]),
            ..Default::default()
        }
    }

    fn made(container: &host::Container, image: &ImageConfig) -> Result<guest::Process, StepError> {
        process(&host::PodSpec::default(), container, image)
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd_as_kubernetes_documents() {
        let cases = [
            (&[][..], &[][..], &["/entry", "default"][..]),
            (&["/own"], &[], &["/own"]),
            (&[], &["x"], &["/entry", "x"]),
            (&["/own"], &["x"], &["/own", "x"]),
        ];
        for (command, args, expected) in cases {
            let container = host::Container {
                command: strings(command),
                args: strings(args),
                ..Default::default()
            };
            assert_eq!(made(&container, &image()).unwrap().args, expected);
        }
        let error = made(&host::Container::default(), &ImageConfig::default()).unwrap_err();
        assert_eq!(error.reason, "CreateContainerConfigError");
    }

    #[test]
    fn only_arguments_of_the_pod_are_expanded() {
        let container = |command: &[&str], args: &[&str]| host::Container {
            command: strings(command),
            args: strings(args),
            ..Default::default()
        };
        assert_eq!(image_args(&container(&["/own"], &["x"]), &image()), 0);
        assert_eq!(image_args(&container(&[], &["x"]), &image()), 1);
        assert_eq!(image_args(&container(&[], &[]), &image()), usize::MAX);
    }

    #[test]
    fn run_as_non_root_refuses_root_and_names_that_cannot_be_checked() {
        let cases = [
            (None, "", false),
            (None, "0:0", false),
            (None, "root", false),
            (None, "www-data", false),
            (None, "1000:0", true),
            (Some(1), "root", true),
            (Some(0), "1000", false),
        ];
        for (run_as_user, user, allowed) in cases {
            let security = host::SecurityContext {
                run_as_user,
                run_as_non_root: true,
                ..Default::default()
            };
            let container = host::Container {
                security_context: Some(security),
                ..Default::default()
            };
            let image = ImageConfig {
                user: user.into(),
                ..image()
            };
            assert_eq!(made(&container, &image).is_ok(), allowed, "{run_as_user:?} {user}");
        }
    }

    #[test]
    fn capabilities_are_the_defaults_less_the_dropped_plus_the_added() {
        let of = |add: &[&str], drop: &[&str], privileged| {
            capabilities(&host::SecurityContext {
                add_capabilities: strings(add),
                drop_capabilities: strings(drop),
                privileged,
                ..Default::default()
            })
        };
        assert_eq!(of(&[], &[], false), DEFAULT_CAPABILITIES);
        assert_eq!(of(&["CAP_NET_ADMIN"], &["ALL"], false), ["NET_ADMIN"]);
        assert!(!of(&[], &["chown"], false).contains(&"CHOWN".to_owned()));
        assert_eq!(of(&["ALL"], &[], false).len(), ALL_CAPABILITIES.len());
        assert_eq!(of(&[], &["ALL"], true).len(), ALL_CAPABILITIES.len());
    }

    #[test]
    fn stop_signals_are_understood_by_name_and_number() {
        for (name, number) in [
            ("", 15),
            ("SIGQUIT", 3),
            ("int", 2),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("99", 15),
            ("x", 15),
        ] {
            assert_eq!(
                stop_signal(&ImageConfig {
                    stop_signal: name.into(),
                    ..image()
                }),
                number,
                "{name}"
            );
        }
    }

    #[test]
    fn cpu_weights_follow_kubernetes_formula() {
        assert_eq!([0, 1, 1000, 4000, u64::MAX].map(cpu_weight), [0, 1, 39, 157, 10_000]);
    }
}
