//! The OCI runtime specification of a container, built from what the host asked for.
//!
//! Pure: what has to be looked up in the guest or in the image comes in as [`Surroundings`].

use std::{collections::HashMap, path::PathBuf};

use flint_api::guest::{
    ContainerResources, CreateContainerRequest, Mount as RequestedMount, Process as RequestedProcess, mount::Source,
};
use oci_spec::{
    OciSpecError,
    runtime::{
        Capabilities, Capability, Linux, LinuxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder, LinuxDevice,
        LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, Mount, MountBuilder,
        PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
        User, UserBuilder,
    },
};

use super::user::Resolved;
use crate::paths::{self, BadName, Name};

/// pids.max where the host gives none: a fork bomb must not take the guest's pids.
const DEFAULT_PIDS: u64 = 4096;
/// Period of cpu.max, the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// PATH of a process that has none, as other runtimes set it.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The runtime specification's and other runtimes' list: what shows or changes the machine rather than the container.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A request that no container can be made from.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A field's value.
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
    /// A name in it.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The specification's builder.
    #[error("building the runtime specification")]
    Build(#[from] OciSpecError),
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Invalid {
        field: field.into(),
        problem: problem.into(),
    }
}

/// What the request does not say.
#[derive(Debug)]
pub struct Surroundings {
    /// The user, as the container's files have it.
    pub user: Resolved,
    /// Namespace file to join, if the pod shares one.
    pub pid_namespace: Option<PathBuf>,
    /// Does the kernel have POSIX message queues?
    pub message_queues: bool,
    /// The guest's devices, for a privileged container.
    pub devices: Vec<LinuxDevice>,
}

/// Checks all of a request that can be checked before anything is made. PID 1 calls it, so that errors are the caller's.
pub fn check(request: &CreateContainerRequest) -> Result<(), SpecError> {
    let process = request
        .process
        .as_ref()
        .ok_or_else(|| invalid("process", "is missing"))?;
    check_process(process)?;
    if !request.scratch_serial.is_empty() {
        Name::parse("scratch_serial", &request.scratch_serial)?;
    }
    for (index, mount) in request.mounts.iter().enumerate() {
        let field = format!("mounts[{index}]");
        let destination = std::path::Path::new(&mount.destination);
        let climbs = destination
            .components()
            .any(|part| part == std::path::Component::ParentDir);
        if !destination.is_absolute() || climbs || destination.parent().is_none() || mount.destination.contains('\0') {
            let problem = format!("{:?} is not an absolute path below /", mount.destination);
            return Err(invalid(format!("{field}.destination"), problem));
        }
        match &mount.source {
            None => return Err(invalid(field, "has no source")),
            Some(Source::PodDirectory(directory)) => {
                Name::parse("pod directory", &directory.name)?;
            }
            Some(Source::ProjectedVolume(name)) => {
                Name::parse("volume", name)?;
            }
            Some(Source::Tmpfs(_)) if !mount.sub_path.is_empty() => {
                return Err(invalid(format!("{field}.sub_path"), "a tmpfs of its own has no parts"));
            }
            Some(Source::Tmpfs(_)) => {}
        }
        if !mount.expand_sub_path && !is_below(&mount.sub_path) {
            let problem = format!("{:?} is not a relative path without \"..\"", mount.sub_path);
            return Err(invalid(format!("{field}.sub_path"), problem));
        }
    }
    if let Some(weight) = request
        .resources
        .map(|resources| resources.cpu_weight)
        .filter(|weight| *weight > 10_000)
    {
        return Err(invalid("resources.cpu_weight", format!("{weight} is above 10000")));
    }
    Ok(())
}

/// Whether a path leads to nothing but what is below where it begins, links aside.
fn is_below(path: &str) -> bool {
    !path.starts_with('/') && !path.contains('\0') && path.split('/').all(|part| part != "..")
}

/// Checks a process, of a container or of an exec.
pub fn check_process(process: &RequestedProcess) -> Result<(), SpecError> {
    if process.args.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args", "names no program"));
    }
    for (field, texts) in [("args", &process.args), ("env", &process.env)] {
        if let Some(index) = texts.iter().position(|text| text.contains('\0')) {
            return Err(invalid(format!("process.{field}[{index}]"), "contains a zero byte"));
        }
    }
    for (index, variable) in process.env.iter().enumerate() {
        if variable.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
            return Err(invalid(
                format!("process.env[{index}]"),
                format!("{variable:?} is not NAME=value"),
            ));
        }
    }
    let cwd = &process.working_dir;
    if !cwd.is_empty() && (!cwd.starts_with('/') || cwd.contains('\0')) {
        return Err(invalid(
            "process.working_dir",
            format!("{cwd:?} is not an absolute path"),
        ));
    }
    capabilities(&process.capabilities)?;
    rlimits(process)?;
    Ok(())
}

/// The container's specification.
pub fn build(request: &CreateContainerRequest, container: &Name, around: Surroundings) -> Result<Spec, SpecError> {
    check(request)?;
    let requested = request
        .process
        .as_ref()
        .ok_or_else(|| invalid("process", "is missing"))?;
    let root = RootBuilder::default()
        .path(paths::rootfs(container))
        .readonly(request.read_only_root)
        .build()?;
    let process = process(requested, &around.user, request.privileged)?;
    let mut spec = SpecBuilder::default()
        .version("1.2.0")
        .root(root)
        .process(process)
        .mounts(mounts(request, container, around.message_queues)?)
        .linux(linux(request, container, around)?)
        .build()?;
    // The builder's default names one; the UTS namespace is the guest's, and its host name the pod's.
    spec.set_hostname(None);
    Ok(spec)
}

fn process(requested: &RequestedProcess, user: &Resolved, privileged: bool) -> Result<Process, SpecError> {
    let capabilities = if privileged {
        all_capabilities()?
    } else {
        capability_sets(capabilities(&requested.capabilities)?)?
    };
    let cwd = if requested.working_dir.is_empty() {
        "/"
    } else {
        &requested.working_dir
    };
    Ok(ProcessBuilder::default()
        .terminal(requested.terminal)
        .user(oci_user(user)?)
        .args(requested.args.clone())
        .env(environment(&[], &requested.env, &user.home, requested.terminal))
        .cwd(cwd)
        .capabilities(capabilities)
        .no_new_privileges(requested.no_new_privileges)
        .rlimits(rlimits(requested)?)
        // PID 1's own -1000 is not theirs.
        .oom_score_adj(0)
        .build()?)
}

/// The process of an exec: what `requested` leaves out is the container's.
pub fn exec_process(
    base: &Process,
    requested: &RequestedProcess,
    user: Option<&Resolved>,
) -> Result<Process, SpecError> {
    check_process(requested)?;
    let mut process = base.clone();
    let inherited = base.env().clone().unwrap_or_default();
    let home = user.map(|user| user.home.as_str());
    let base_env: Vec<String> = inherited
        .into_iter()
        .filter(|variable| home.is_none() || !variable.starts_with("HOME="))
        .collect();
    let env = environment(&base_env, &requested.env, home.unwrap_or("/"), requested.terminal);
    process
        .set_args(Some(requested.args.clone()))
        .set_env(Some(env))
        .set_terminal(Some(requested.terminal));
    if let Some(user) = user {
        process.set_user(oci_user(user)?);
    }
    if !requested.working_dir.is_empty() {
        process.set_cwd(PathBuf::from(&requested.working_dir));
    }
    if !requested.capabilities.is_empty() {
        process.set_capabilities(Some(capability_sets(capabilities(&requested.capabilities)?)?));
    }
    if requested.no_new_privileges {
        process.set_no_new_privileges(Some(true));
    }
    if !requested.rlimits.is_empty() {
        process.set_rlimits(Some(rlimits(requested)?));
    }
    Ok(process)
}

fn oci_user(user: &Resolved) -> Result<User, SpecError> {
    let builder = UserBuilder::default().uid(user.uid).gid(user.gid);
    Ok(builder.additional_gids(user.additional_gids.clone()).build()?)
}

/// Later variables win over earlier ones; PATH, HOME and a terminal's TERM are there in any case.
fn environment(base: &[String], own: &[String], home: &str, terminal: bool) -> Vec<String> {
    let mut order: Vec<&str> = Vec::new();
    let mut values: HashMap<&str, &str> = HashMap::new();
    for variable in base.iter().chain(own) {
        let Some((name, value)) = variable.split_once('=') else {
            continue;
        };
        if values.insert(name, value).is_none() {
            order.push(name);
        }
    }
    let mut environment: Vec<String> = order
        .iter()
        .filter_map(|name| Some(format!("{name}={}", values.get(name)?)))
        .collect();
    let mut default = |name: &str, value: &str| {
        if !values.contains_key(name) {
            environment.push(format!("{name}={value}"));
        }
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", home);
    if terminal {
        default("TERM", "xterm");
    }
    environment
}

fn capabilities(names: &[String]) -> Result<Capabilities, SpecError> {
    let parse = |(index, name): (usize, &String)| {
        name.parse::<Capability>().map_err(|_| {
            invalid(
                format!("process.capabilities[{index}]"),
                format!("{name:?} is no capability"),
            )
        })
    };
    names.iter().enumerate().map(parse).collect()
}

fn all_capabilities() -> Result<LinuxCapabilities, SpecError> {
    let last: u32 = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        // CAP_CHECKPOINT_RESTORE, the newest since Linux 5.9.
        .unwrap_or(40);
    capability_sets(CAPABILITIES_BY_NUMBER.iter().take(last as usize + 1).copied().collect())
}

fn capability_sets(set: Capabilities) -> Result<LinuxCapabilities, SpecError> {
    let builder = LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone());
    Ok(builder
        .permitted(set.clone())
        .inheritable(set)
        .ambient(Capabilities::new())
        .build()?)
}

fn rlimits(process: &RequestedProcess) -> Result<Vec<PosixRlimit>, SpecError> {
    let mut limits = Vec::with_capacity(process.rlimits.len());
    for (index, limit) in process.rlimits.iter().enumerate() {
        let field = format!("process.rlimits[{index}]");
        let kind: PosixRlimitType = limit
            .r#type
            .parse()
            .map_err(|_| invalid(&field, format!("{:?} is no resource limit", limit.r#type)))?;
        if limit.soft > limit.hard {
            return Err(invalid(
                &field,
                format!("soft limit {} is above hard limit {}", limit.soft, limit.hard),
            ));
        }
        limits.push(
            PosixRlimitBuilder::default()
                .typ(kind)
                .soft(limit.soft)
                .hard(limit.hard)
                .build()?,
        );
    }
    Ok(limits)
}

fn linux(request: &CreateContainerRequest, container: &Name, around: Surroundings) -> Result<Linux, SpecError> {
    let paths_unless_privileged = |paths: &[&str]| {
        if request.privileged {
            Vec::new()
        } else {
            paths.iter().map(ToString::to_string).collect()
        }
    };
    let resources = LinuxResourcesBuilder::default()
        .unified(limits(request.resources.unwrap_or_default()))
        .build()?;
    let builder = LinuxBuilder::default()
        .cgroups_path(paths::cgroup_path(container))
        .resources(resources)
        .namespaces(namespaces(around.pid_namespace)?)
        .masked_paths(paths_unless_privileged(&MASKED))
        .readonly_paths(paths_unless_privileged(&READ_ONLY));
    Ok(if around.devices.is_empty() {
        builder.build()?
    } else {
        builder.devices(around.devices).build()?
    })
}

/// Network, IPC and UTS are absent: those of the guest are the pod's.
fn namespaces(pid: Option<PathBuf>) -> Result<Vec<LinuxNamespace>, SpecError> {
    let own = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
    let pid = match pid {
        Some(path) => LinuxNamespaceBuilder::default()
            .typ(LinuxNamespaceType::Pid)
            .path(path)
            .build()?,
        None => own(LinuxNamespaceType::Pid)?,
    };
    Ok(vec![
        pid,
        own(LinuxNamespaceType::Mount)?,
        own(LinuxNamespaceType::Cgroup)?,
    ])
}

/// By cgroup v2 file, with nothing translated on the way.
fn limits(resources: ContainerResources) -> HashMap<String, String> {
    let pids = if resources.pids_limit == 0 {
        DEFAULT_PIDS
    } else {
        resources.pids_limit
    };
    let mut files = HashMap::from([("pids.max", pids.to_string())]);
    if resources.cpu_limit_milli > 0 {
        // The kernel refuses quotas below 1 ms.
        let quota = resources.cpu_limit_milli.saturating_mul(CPU_PERIOD_US / 1000).max(1000);
        files.insert("cpu.max", format!("{quota} {CPU_PERIOD_US}"));
    }
    if resources.cpu_weight > 0 {
        files.insert("cpu.weight", resources.cpu_weight.to_string());
    }
    if resources.memory_limit_bytes > 0 {
        files.insert("memory.max", resources.memory_limit_bytes.to_string());
    }
    // One process of a container that ran out of memory is no container: all of it ends.
    files.insert("memory.oom.group", "1".to_owned());
    files
        .into_iter()
        .map(|(file, value)| (file.to_owned(), value))
        .collect()
}

fn mounts(request: &CreateContainerRequest, container: &Name, message_queues: bool) -> Result<Vec<Mount>, SpecError> {
    let sys = if request.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        )?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount(
            "/dev/shm",
            "bind",
            paths::SHM,
            &["rbind", "rw", "nosuid", "noexec", "nodev"],
        )?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys])?,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", sys],
        )?,
    ];
    if message_queues {
        mounts.push(mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        )?);
    }
    for (file, access) in [
        ("resolv.conf", "rw"),
        ("hosts", "rw"),
        ("hostname", "ro"),
        ("machine-id", "ro"),
    ] {
        let overridden = request
            .mounts
            .iter()
            .any(|mount| mount.destination.trim_end_matches('/') == format!("/etc/{file}"));
        if !overridden {
            mounts.push(mount(
                &format!("/etc/{file}"),
                "bind",
                &format!("{}/{file}", paths::ETC),
                &["bind", access],
            )?);
        }
    }
    // One within another's destination comes after it.
    let mut in_order: Vec<_> = request.mounts.iter().enumerate().collect();
    in_order.sort_by_key(|(_, mount)| std::path::Path::new(&mount.destination).components().count());
    for (index, requested) in in_order {
        mounts.push(requested_mount(request, container, index, requested)?);
    }
    Ok(mounts)
}

fn requested_mount(
    request: &CreateContainerRequest,
    container: &Name,
    index: usize,
    requested: &RequestedMount,
) -> Result<Mount, SpecError> {
    let projected = matches!(requested.source, Some(Source::ProjectedVolume(_)));
    let access = if requested.read_only || projected { "ro" } else { "rw" };
    if let Some(Source::Tmpfs(tmpfs)) = &requested.source {
        let size = (tmpfs.size_bytes > 0).then(|| format!("size={}", tmpfs.size_bytes));
        let mut options = vec!["nosuid", "nodev", "mode=1777", access];
        options.extend(size.as_deref());
        return mount(&requested.destination, "tmpfs", "tmpfs", &options);
    }
    let source = mount_source(container, request, index, requested)?;
    let source = source.ok_or_else(|| invalid("mounts", "has no source"))?;
    mount(
        &requested.destination,
        "bind",
        &source.display().to_string(),
        &["rbind", access],
    )
}

/// What is mounted: the volume, or where a part of it is bound. `None`: a tmpfs of its own.
pub fn mount_source(
    container: &Name,
    request: &CreateContainerRequest,
    index: usize,
    requested: &RequestedMount,
) -> Result<Option<PathBuf>, SpecError> {
    let volume = volume(request, requested)?;
    Ok(volume.map(|volume| match requested.sub_path.as_str() {
        "" => volume,
        _ => paths::sub_path(container, index),
    }))
}

/// Folder of the volume that a mount shows, or shows a part of.
pub fn volume(request: &CreateContainerRequest, requested: &RequestedMount) -> Result<Option<PathBuf>, SpecError> {
    Ok(match &requested.source {
        Some(Source::PodDirectory(directory)) => {
            let name = Name::parse("pod directory", &directory.name)?;
            let serial = scratch_serial(request)?;
            Some(paths::pod_directory(serial.as_ref(), &name, directory.memory))
        }
        Some(Source::ProjectedVolume(name)) => Some(paths::projected_volume(&Name::parse("volume", name)?)),
        Some(Source::Tmpfs(_)) | None => None,
    })
}

/// The scratch disk's serial; `None` for a tmpfs.
pub fn scratch_serial(request: &CreateContainerRequest) -> Result<Option<Name>, BadName> {
    let serial = &request.scratch_serial;
    (!serial.is_empty())
        .then(|| Name::parse("scratch_serial", serial))
        .transpose()
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, SpecError> {
    let options: Vec<String> = options.iter().map(ToString::to_string).collect();
    Ok(MountBuilder::default()
        .destination(destination)
        .typ(kind)
        .source(source)
        .options(options)
        .build()?)
}

/// linux/capability.h, by number.
const CAPABILITIES_BY_NUMBER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
