//! The last step in a container's process: find the program and execute it, or say why not.
//!
//! Runs where libcontainer left off: inside the namespaces, as the user, in the working directory. It replaces
//! libcontainer's own executor, which refuses a container whose program is missing before it is created and with words
//! that no user knows; here it is created, and ends as a shell would end: 127 not found, 126 not executable.

use std::{
    ffi::{CString, NulError},
    path::Path,
};

use libcontainer::{
    oci_spec::runtime::Spec,
    workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError},
};
use nix::{errno::Errno, unistd};

use super::report::{Report, send};
use crate::sys;

/// Where a failure is reported, and how large the terminal is.
#[derive(Debug, Clone)]
pub struct FlintExecutor {
    /// Number of the report pipe, which libcontainer has marked close-on-exec.
    pub report: i32,
    /// Rows and columns of the terminal on standard input.
    pub window: Option<(u16, u16)>,
}

impl Executor for FlintExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let args = process.args().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let env = process.env().clone().unwrap_or_default();
        if let (Some((rows, columns)), Some(terminal)) = (self.window, sys::borrowed_fd(0)) {
            // A terminal of an odd size is still a terminal.
            let _ = sys::set_window_size(terminal, rows, columns);
        }
        sys::reset_signals();
        let Failure { code, message } = execute(args, &env);
        // If PID 1 cannot be told why, the exit code still says what.
        let _ = send(self.report, &Report::ExecFailed { code, message });
        std::process::exit(i32::from(code));
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn setup_envs(&self, _envs: std::collections::HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // `exec` hands the environment to the program; this process needs none.
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Failure {
    code: u8,
    message: String,
}

const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// execvpe(3) with an answer. Returns only on failure.
fn execute(args: &[String], env: &[String]) -> Failure {
    let Some(program) = args.first() else {
        return Failure {
            code: NOT_FOUND,
            message: "exec: no program".to_owned(),
        };
    };
    let (Ok(arguments), Ok(environment)) = (c_strings(args), c_strings(env)) else {
        return failure(program, Errno::EINVAL);
    };
    if program.contains('/') {
        return failure(program, try_execute(program, &arguments, &environment));
    }
    let path = env
        .iter()
        .find_map(|variable| variable.strip_prefix("PATH="))
        .unwrap_or(super::spec::DEFAULT_PATH);
    let mut refused = None;
    for folder in path.split(':') {
        // POSIX: an empty entry is the working directory.
        let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(program);
        match try_execute(&candidate.to_string_lossy(), &arguments, &environment) {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG => {}
            error @ Errno::EACCES => refused = Some(error),
            error => return failure(program, error),
        }
    }
    match refused {
        Some(error) => failure(program, error),
        None => Failure {
            code: NOT_FOUND,
            message: format!("exec {program}: executable file not found in $PATH"),
        },
    }
}

fn try_execute(path: &str, arguments: &[CString], environment: &[CString]) -> Errno {
    match CString::new(path) {
        Ok(path) => match unistd::execve(&path, arguments, environment) {
            Ok(never) => match never {},
            Err(error) => error,
        },
        Err(_) => Errno::EINVAL,
    }
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, NulError> {
    texts.iter().map(|text| CString::new(text.as_str())).collect()
}

fn failure(program: &str, error: Errno) -> Failure {
    let code = match error {
        Errno::ENOENT | Errno::ENOTDIR => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    Failure {
        code,
        message: format!("exec {program}: {}", describe(error)),
    }
}

/// As strerror(3) has it, in lower case.
fn describe(error: Errno) -> String {
    error.desc().to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    // `execute` returns only when nothing could be executed, which is all that these tests ask for.

    fn run(program: &str, path: &str) -> Failure {
        execute(&[program.to_owned()], &[format!("PATH={path}")])
    }

    #[test]
    fn a_missing_program_is_127() {
        let gone = run("/bin/nope", "");
        assert_eq!(
            gone,
            Failure {
                code: 127,
                message: "exec /bin/nope: no such file or directory".into()
            }
        );
        let gone = run("nope", "/bin:/usr/bin");
        assert_eq!(
            gone,
            Failure {
                code: 127,
                message: "exec nope: executable file not found in $PATH".into()
            }
        );
        assert_eq!(run("/etc/passwd/x", "").code, 127);
    }

    #[test]
    fn what_cannot_be_executed_is_126() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("data");
        fs::write(&file, "text").unwrap();
        assert_eq!(run(file.to_str().unwrap(), "").code, 126);
        assert_eq!(
            run("data", folder.path().to_str().unwrap()).message,
            "exec data: permission denied"
        );
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(run(file.to_str().unwrap(), "").code, 126, "neither ELF nor a script");
        assert_eq!(run(folder.path().to_str().unwrap(), "").code, 126, "a directory");
    }

    #[test]
    fn a_script_whose_interpreter_is_missing_is_127() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("script");
        fs::write(&file, "#!/no/such/interpreter\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(run(file.to_str().unwrap(), "").code, 127);
    }

    #[test]
    fn zero_bytes_and_no_program_are_failures() {
        assert_eq!(execute(&[], &[]).code, 127);
        assert_eq!(run("a\0b", "/bin").code, 126);
    }
}
