//! The helper's side: `flint-init container create|exec <id> report=N ...`, started by PID 1 for one task.
//!
//! libcontainer forks, unshares and changes directory; all of that wants a process with one thread and nothing to lose.
//! So it happens here, and PID 1 keeps running whatever an image or a request does to it.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use flint_api::guest::{CreateContainerRequest, ExecStart, User, mount::Source};
use libcontainer::{
    container::{Container, ContainerStatus, builder::ContainerBuilder},
    error::LibcontainerError,
    syscall::syscall::SyscallType,
};
use nix::mount::MsFlags;
use oci_spec::{
    OciSpecError,
    runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Spec},
};
use prost::Message;

use super::{
    executor::FlintExecutor,
    report::{Report, send_to},
    root::{ContainerRoot, RootError},
    spec::{self, SpecError, Surroundings},
    subpath::{self, SubPathError},
    user::{self, Resolved, UserError},
};
use crate::{
    error_chain::chain,
    paths::{self, BadName, Name},
    sys,
};

#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("command line: {0}")]
    CommandLine(String),
    #[error(transparent)]
    Name(#[from] BadName),
    #[error("{step} {path}", path = .path.display())]
    File {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("decoding the request")]
    Decode(#[from] prost::DecodeError),
    #[error("the container's process")]
    Process(#[from] SpecError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    SubPath(#[from] SubPathError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("reading or writing the runtime specification")]
    Oci(#[from] OciSpecError),
    #[error("container runtime")]
    Runtime(#[from] LibcontainerError),
}

type Result<T> = std::result::Result<T, HelperError>;

/// What stands on the command line.
#[derive(Debug, Default)]
struct Arguments {
    report: Option<OwnedFd>,
    stdio: [Option<OwnedFd>; 3],
    pause: Option<u32>,
    exec: Option<u32>,
}

impl Arguments {
    fn parse(words: &[&str]) -> Result<Self> {
        let mut arguments = Self::default();
        for word in words {
            let bad = |why: &str| HelperError::CommandLine(format!("{word:?}: {why}"));
            let (key, value) = word.split_once('=').ok_or_else(|| bad("is not KEY=NUMBER"))?;
            let number: u32 = value.parse().map_err(|_| bad("is not KEY=NUMBER"))?;
            let fd = || {
                let number = i32::try_from(number).map_err(|_| bad("is no descriptor"))?;
                sys::inherited_fd(number)
                    .map(Some)
                    .map_err(|error| bad(&error.to_string()))
            };
            match key {
                "report" => arguments.report = fd()?,
                "stdin" => arguments.stdio[0] = fd()?,
                "stdout" => arguments.stdio[1] = fd()?,
                "stderr" => arguments.stdio[2] = fd()?,
                "pause" => arguments.pause = Some(number),
                "exec" => arguments.exec = Some(number),
                _ => return Err(bad("is unknown")),
            }
        }
        Ok(arguments)
    }
}

/// Does one task and reports how it went.
pub fn main(words: &[&str]) -> ExitCode {
    let [verb, container, rest @ ..] = words else {
        eprintln!("flint-init container: usage: create|exec ID report=FD ...");
        return ExitCode::from(2);
    };
    let mut arguments = match Arguments::parse(rest) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("flint-init container {verb} {container}: {error}");
            return ExitCode::from(2);
        }
    };
    let Some(report) = arguments.report.take() else {
        eprintln!("flint-init container {verb} {container}: no report pipe");
        return ExitCode::from(2);
    };
    let outcome = match *verb {
        "create" => create(container, arguments, &report),
        "exec" => exec(container, arguments, &report),
        _ => Err(HelperError::CommandLine(format!("{verb:?} is neither create nor exec"))),
    };
    let (line, code) = match outcome {
        Ok(pid) => (Report::Created { pid }, ExitCode::SUCCESS),
        Err(error) => (Report::Failed { message: chain(&error) }, ExitCode::FAILURE),
    };
    // PID 1 has gone away only if the machine has.
    let _ = send_to(&report, &line);
    code
}

fn create(id: &str, arguments: Arguments, report: &OwnedFd) -> Result<i32> {
    let id = Name::parse("container", id)?;
    let request = CreateContainerRequest::decode(take_file(&paths::bundle(&id).join("request"))?.as_slice())?;
    mount_overlay(&id, &request)?;
    subpath::bind_all(&id, &request)?;
    let root = ContainerRoot::open(&paths::rootfs(&id))?;
    let process = request.process.clone().unwrap_or_default();
    let user = resolve(&root, &process.user.clone().unwrap_or_default())?;
    create_working_dir(&root, &id, &request, &process.working_dir)?;
    let surroundings = Surroundings {
        user,
        pid_namespace: arguments.pause.map(|pid| format!("/proc/{pid}/ns/pid").into()),
        message_queues: has_message_queues(),
        devices: if request.privileged {
            guest_devices()?
        } else {
            Vec::new()
        },
    };
    spec::build(&request, &id, surroundings)?.save(paths::bundle(&id).join("config.json"))?;
    let console = process.terminal.then(|| console_socket(&id, None));
    let executor = FlintExecutor {
        report: report.as_raw_fd(),
        window: None,
    };
    let builder = builder(&id, arguments.stdio, console, executor)?;
    let built = builder
        .as_init(paths::bundle(&id))
        .with_systemd(false)
        .with_detach(true)
        .build();
    let mut container = built.inspect_err(|_| {
        // libcontainer leaves its folder behind on some paths; with it the id could not be used again.
        let _ = fs::remove_dir_all(paths::oci_state(&id));
    })?;
    say_running(&mut container)?;
    let pid = container.pid().map(nix_pid);
    pid.ok_or_else(|| HelperError::CommandLine("the runtime made no process".to_owned()))
}

/// libcontainer's own Pid type is of another version of nix.
fn nix_pid(pid: impl std::fmt::Display) -> i32 {
    // It displays as its number.
    pid.to_string().parse().unwrap_or(-1)
}

/// PID 1 starts the container by its notify socket and needs no further helper for it, so nobody will write the state
/// file again; exec reads it and wants it to say "running".
fn say_running(container: &mut Container) -> Result<()> {
    container.set_status(ContainerStatus::Running).save()?;
    Ok(())
}

fn exec(id: &str, arguments: Arguments, report: &OwnedFd) -> Result<i32> {
    let id = Name::parse("container", id)?;
    let number = arguments
        .exec
        .ok_or_else(|| HelperError::CommandLine("exec=NUMBER is missing".to_owned()))?;
    let start = ExecStart::decode(take_file(&paths::bundle(&id).join(format!("exec-{number}")))?.as_slice())?;
    let requested = start.process.unwrap_or_default();
    let root = ContainerRoot::open(&paths::rootfs(&id))?;
    let user = requested.user.as_ref().map(|user| resolve(&root, user)).transpose()?;
    let container_spec = Spec::load(paths::bundle(&id).join("config.json"))?;
    let base = container_spec.process().clone().unwrap_or_default();
    let process = spec::exec_process(&base, &requested, user.as_ref())?;
    let path = paths::bundle(&id).join(format!("process-{number}.json"));
    let json = serde_json::to_vec(&process).map_err(io::Error::from);
    let written = json.and_then(|json| fs::write(&path, json));
    written.map_err(|source| HelperError::File {
        step: "writing",
        path: path.clone(),
        source,
    })?;
    let window = start.terminal_size.map(window_size);
    let console = requested.terminal.then(|| console_socket(&id, Some(number)));
    let executor = FlintExecutor {
        report: report.as_raw_fd(),
        window,
    };
    let builder = builder(&id, arguments.stdio, console, executor)?;
    let pid = builder.as_tenant().with_process(Some(&path)).with_detach(true).build();
    let _ = fs::remove_file(&path);
    Ok(nix_pid(pid?))
}

/// A request's size, bounded by what the kernel can hold.
pub fn window_size(size: flint_api::guest::TerminalSize) -> (u16, u16) {
    (
        u16::try_from(size.rows).unwrap_or(u16::MAX),
        u16::try_from(size.columns).unwrap_or(u16::MAX),
    )
}

/// Where PID 1 listens for the terminal of a container, or of one of its execs.
pub fn console_socket(id: &Name, exec: Option<u32>) -> PathBuf {
    paths::bundle(id).join(exec.map_or("tty.sock".to_owned(), |number| format!("tty-{number}.sock")))
}

fn builder(
    id: &Name,
    stdio: [Option<OwnedFd>; 3],
    console: Option<PathBuf>,
    executor: FlintExecutor,
) -> Result<ContainerBuilder> {
    let mut builder = ContainerBuilder::new(id.to_string(), SyscallType::default())
        .with_executor(executor)
        .with_root_path(paths::OCI)?
        .with_console_socket(console)
        .validate_id()?;
    [builder.stdin, builder.stdout, builder.stderr] = stdio;
    Ok(builder)
}

/// Reads a request and removes it: it may hold secrets in its environment.
fn take_file(path: &Path) -> Result<Vec<u8>> {
    let failed = |step| {
        move |source| HelperError::File {
            step,
            path: path.to_owned(),
            source,
        }
    };
    let bytes = fs::read(path).map_err(failed("reading"))?;
    fs::remove_file(path).map_err(failed("removing"))?;
    Ok(bytes)
}

fn resolve(root: &ContainerRoot, user: &User) -> Result<Resolved> {
    Ok(user::resolve(
        user,
        &root.read_text("/etc/passwd")?,
        &root.read_text("/etc/group")?,
    )?)
}

/// Names are checked to hold no comma and no colon, so the option string needs no escapes.
fn mount_overlay(id: &Name, request: &CreateContainerRequest) -> Result<()> {
    let image = paths::image(&Name::parse("image", &request.image_id)?);
    let scratch = paths::container_scratch(spec::scratch_serial(request)?.as_ref(), id);
    let (upper, work, target) = (scratch.join("upper"), scratch.join("work"), paths::rootfs(id));
    for path in [&upper, &work, &target] {
        fs::create_dir_all(path).map_err(|source| HelperError::File {
            step: "creating",
            path: path.clone(),
            source,
        })?;
    }
    // The root directory's owner and mode are the upper's: they have to be the image's.
    let mode = fs::metadata(&image).and_then(|metadata| {
        fs::set_permissions(&upper, metadata.permissions())?;
        std::os::unix::fs::chown(&upper, Some(metadata.uid()), Some(metadata.gid()))
    });
    mode.map_err(|source| HelperError::File {
        step: "copying the mode of",
        path: image.clone(),
        source,
    })?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        upper.display(),
        work.display()
    );
    nix::mount::mount(
        Some("overlay"),
        &target,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .map_err(|error| HelperError::File {
        step: "mounting the overlay on",
        path: target,
        source: error.into(),
    })
}

/// In the directory that is mounted where the working directory lies, or in the root.
fn create_working_dir(
    root: &ContainerRoot,
    id: &Name,
    request: &CreateContainerRequest,
    working_dir: &str,
) -> Result<()> {
    let working_dir = Path::new(working_dir);
    let mounts = request.mounts.iter().enumerate();
    let covering = mounts.filter(|(_, mount)| working_dir.starts_with(&mount.destination));
    let innermost = covering.max_by_key(|(_, mount)| mount.destination.len());
    let Some((index, mount)) = innermost else {
        return Ok(root.create_dir_all(working_dir)?);
    };
    match &mount.source {
        Some(Source::PodDirectory(_)) => {
            let path = spec::mount_source(id, request, index, mount)?.unwrap_or_default();
            // starts_with above makes the prefix sure.
            let inside = working_dir.strip_prefix(&mount.destination).unwrap_or(Path::new(""));
            if path.is_file() {
                return Ok(());
            }
            Ok(ContainerRoot::open(&path)?.create_dir_all(inside)?)
        }
        // Nothing can be made in it.
        Some(Source::ProjectedVolume(_)) => Ok(()),
        Some(Source::Tmpfs(_)) | None => Ok(root.create_dir_all(working_dir)?),
    }
}

fn has_message_queues() -> bool {
    fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.lines().any(|line| line.ends_with("\tmqueue")))
}

/// What a privileged container may open: the guest's devices, less those that libcontainer makes or links itself.
fn guest_devices() -> Result<Vec<LinuxDevice>> {
    const MADE_ANYWAY: [&str; 8] = ["null", "zero", "full", "tty", "urandom", "random", "console", "ptmx"];
    let failed = |source| HelperError::File {
        step: "listing",
        path: "/dev".into(),
        source,
    };
    let mut devices = Vec::new();
    for entry in fs::read_dir("/dev").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = fs::symlink_metadata(entry.path()).map_err(failed)?;
        let kind = match metadata.file_type() {
            kind if kind.is_block_device() => LinuxDeviceType::B,
            kind if kind.is_char_device() => LinuxDeviceType::C,
            _ => continue,
        };
        if MADE_ANYWAY.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        let builder = LinuxDeviceBuilder::default().path(entry.path()).typ(kind);
        let builder = builder
            .major(i64::from(major))
            .minor(i64::from(minor))
            .file_mode(metadata.mode() & 0o7777);
        devices.push(builder.uid(metadata.uid()).gid(metadata.gid()).build()?);
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_command_line_is_an_error_and_not_a_guess() {
        for words in [
            ["report"],
            ["report=x"],
            ["report=1"],
            ["report=77777"],
            ["colour=3"],
            ["stdin=-1"],
        ] {
            assert!(Arguments::parse(&words).is_err(), "{words:?}");
        }
        assert_eq!(Arguments::parse(&["pause=7", "exec=9"]).unwrap().pause, Some(7));
    }

    #[test]
    fn a_request_is_gone_once_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("request");
        fs::write(&path, "secret").unwrap();
        assert_eq!(take_file(&path).unwrap(), b"secret");
        assert!(take_file(&path).unwrap_err().to_string().contains("request"));
    }

    #[test]
    fn absurd_window_sizes_are_bounded() {
        assert_eq!(
            window_size(flint_api::guest::TerminalSize {
                rows: 70_000,
                columns: 80
            }),
            (u16::MAX, 80)
        );
    }

    #[test]
    fn devices_of_the_machine_are_found_by_kind_and_number() {
        // /dev/null exists everywhere and is left out; nothing else is sure to be there.
        assert!(
            guest_devices()
                .unwrap()
                .iter()
                .all(|device| device.path() != Path::new("/dev/null"))
        );
    }
}
