//! From the kernel's jump to user space to a machine that can run containers.
//!
//! The order matters: devices and /proc first (they make errors visible), then modules (they make file systems and vsock
//! exist), then the root.

mod modules;
mod root;

use std::{fs::OpenOptions, io, path::PathBuf};

use nix::{errno::Errno, mount::MsFlags, sys::prctl};

/// What went wrong while the machine came up; all of it is fatal.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A folder could not be made.
    #[error("creating {path}", path = .path.display())]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file system could not be mounted.
    #[error("mounting {file_system} on {target}")]
    Mount {
        file_system: &'static str,
        target: &'static str,
        #[source]
        source: Errno,
    },
    /// A kernel module could not be loaded.
    #[error("loading kernel module {path}", path = .path.display())]
    Module {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The initramfs could not be left.
    #[error("{step} while leaving the initramfs")]
    SwitchRoot {
        step: &'static str,
        #[source]
        source: Errno,
    },
    /// cgroup v2 lacks something.
    #[error("setting up cgroup v2: {step}")]
    Cgroup {
        step: String,
        #[source]
        source: io::Error,
    },
}

/// Controllers that containers' limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Makes the bare kernel a machine that can run containers.
pub fn bring_up() -> Result<(), BootError> {
    root::mount_early()?;
    open_console();
    modules::load()?;
    root::switch_to_tmpfs()?;
    root::mount_rest()?;
    enable_controllers()?;
    protect_from_oom();
    Ok(())
}

/// The kernel opens /dev/console for PID 1 only if the initramfs has that node. Standard streams have to exist in any case,
/// or the first file that is opened becomes one.
fn open_console() {
    let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") else {
        // No serial line and no screen: what is printed goes nowhere, and that is no reason not to run.
        return;
    };
    for dup in [
        nix::unistd::dup2_stdin::<&std::fs::File>,
        nix::unistd::dup2_stdout,
        nix::unistd::dup2_stderr,
    ] {
        let _ = dup(&console);
    }
}

fn enable_controllers() -> Result<(), BootError> {
    let root = PathBuf::from(crate::paths::CGROUP_ROOT);
    let parent = root.join(crate::paths::CGROUP_PARENT.trim_start_matches('/'));
    std::fs::create_dir_all(&parent).map_err(|source| BootError::Create {
        path: parent.clone(),
        source,
    })?;
    for folder in [&root, &parent] {
        for controller in CONTROLLERS {
            let file = folder.join("cgroup.subtree_control");
            std::fs::write(&file, format!("+{controller}")).map_err(|source| BootError::Cgroup {
                step: format!("enabling controller {controller} in {}", file.display()),
                source,
            })?;
        }
    }
    Ok(())
}

/// The guest's memory is the containers' to fill; PID 1's end would be the machine's.
fn protect_from_oom() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("flint-init: cannot protect itself from the OOM killer: {error}");
    }
    let _ = prctl::set_name(c"flint-init");
}

/// mount(2) with an error that says what.
fn mount(
    file_system: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: Option<&'static str>,
) -> Result<(), BootError> {
    std::fs::create_dir_all(target).map_err(|source| BootError::Create {
        path: target.into(),
        source,
    })?;
    nix::mount::mount(Some(file_system), target, Some(file_system), flags, options).map_err(|source| BootError::Mount {
        file_system,
        target,
        source,
    })
}
