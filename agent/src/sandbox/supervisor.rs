//! One task for each sandbox: it owns what the sandbox holds on this host, follows the VMM, says why it ended and removes
//! everything. Whoever starts the sandbox may fail or be cancelled at any step: the task sees that and cleans up alike.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::ExitStatus,
    sync::{Arc, OnceLock},
    time::Duration,
};

use flint_api::{
    guest::PORT,
    vmm::{self, EXIT_CODE_BASE, ExitReason},
};
use nix::sys::signal::Signal;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Exited, SandboxError,
    control::{ControlError, VmmEvent},
    intent::Folder,
    pages::PageServer,
    uids::Uid,
};
use crate::{
    cgroup::Cgroup,
    network::{Lease, Network},
    process::{self, Process},
};

/// How long a VMM that has closed its control connection may take to end by itself, and leave its exit file.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of each log goes into an error.
const LOG_TAIL_BYTES: u64 = 1024;
/// How much of the console is looked through for the words of a panic: the stack traces that follow them are long.
const PANIC_TAIL_BYTES: u64 = 32 << 10;
/// How Linux begins the words of a panic.
const PANIC_WORDS: &str = "Kernel panic - not syncing: ";

/// What a sandbox holds on this host. Scratch disk and tap are not here: they go with the VMM's descriptors.
#[derive(Debug)]
pub(super) struct Held {
    pub folder: Folder,
    pub cgroup: Cgroup,
    pub lease: Option<Lease>,
    pub network: Arc<Network>,
    /// Absent where the intent cannot be read.
    #[expect(dead_code, reason = "held until the sandbox is gone, for no other use")]
    pub uid: Option<Uid>,
    /// Who brings its memory, held so that others may come to it, too. Absent: nobody, or whom an earlier flintd started.
    pub pages: Option<Arc<PageServer>>,
}

impl Held {
    /// Gives everything back. Only when no process of the sandbox is left.
    fn release(self) {
        if let Some(lease) = &self.lease
            && let Err(error) = self.network.unplug(lease.gate())
        {
            tracing::warn!(address = %lease.address(), %error, "a rule for a tap that is gone is still there");
        }
        if let Err(error) = self.folder.remove() {
            tracing::warn!(%error, "a sandbox's folder is still there");
        }
    }
}

/// A VMM that answers.
#[derive(Debug)]
pub(super) struct Attached {
    pub events: mpsc::Receiver<VmmEvent>,
    pub process: Process,
}

/// Tells the supervisor that a VMM answers, or why the sandbox has to end. Dropped unused, it tells that no VMM ever will
/// answer: so whoever may still be making a process holds on to it.
pub(super) type Attach = oneshot::Sender<Result<Attached, Exited>>;

/// The end of a sandbox: to bring it about, and to wait for it.
#[derive(Clone, Debug)]
pub(super) struct End {
    cgroup: Cgroup,
    kill: CancellationToken,
    exited: watch::Receiver<Option<Exited>>,
    dialled: watch::Receiver<bool>,
    log: Arc<OnceLock<String>>,
}

impl End {
    /// Where its processes are.
    pub(super) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(super) fn kill(&self) {
        self.kill.cancel();
    }

    /// Kills the sandbox when it is dropped, unless it is disarmed.
    pub(super) fn kill_on_drop(&self) -> DropGuard {
        self.kill.clone().drop_guard()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<Exited>> {
        self.exited.clone()
    }

    pub(super) async fn wait(&self) -> Exited {
        let mut exited = self.exited.clone();
        let lost = || Exited {
            reason: ExitReason::Unspecified,
            detail: "flintd is shutting down".into(),
        };
        // The task says so before it ends; it is only cut short together with the whole runtime.
        exited
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exited| exited.clone())
            .unwrap_or_else(lost)
    }

    /// Waits until flint-init has dialled; false if the sandbox has ended instead.
    pub(super) async fn dialled(&self) -> bool {
        let mut dialled = self.dialled.clone();
        dialled.wait_for(|dialled| *dialled).await.is_ok()
    }

    /// The last lines of the logs; empty until the end.
    pub(super) fn log(&self) -> String {
        self.log.get().cloned().unwrap_or_default()
    }
}

impl From<vmm::Exited> for Exited {
    fn from(exited: vmm::Exited) -> Self {
        Self {
            reason: exited.reason(),
            detail: exited.detail,
        }
    }
}

/// Starts the task. From here on `held` is its business alone.
pub(super) fn supervise(held: Held) -> (End, Attach) {
    let (attach, attached) = oneshot::channel();
    let (exited_sender, exited) = watch::channel(None);
    let (dialled_sender, dialled) = watch::channel(false);
    let end = End {
        cgroup: held.cgroup.clone(),
        kill: CancellationToken::new(),
        exited,
        dialled,
        log: Arc::default(),
    };
    let task_end = (end.kill.clone(), Arc::clone(&end.log));
    tokio::spawn(async move {
        let (kill, log) = task_end;
        let course = match attached.await {
            Ok(Ok(attached)) => follow(attached, &kill, &dialled_sender).await,
            Ok(Err(why)) => Course {
                why_killed: Some(why),
                ..Course::default()
            },
            Err(_) => Course::default(),
        };
        drop(dialled_sender);
        let exited = conclude(held, course, &log).await;
        exited_sender.send_replace(Some(exited));
    });
    (end, attach)
}

/// How it went until somebody has to clean up.
#[derive(Debug, Default)]
struct Course {
    said: Option<Exited>,
    process: Option<Process>,
    /// Known once the process has ended by itself; the inner one is known of children only.
    status: Option<Option<ExitStatus>>,
    why_killed: Option<Exited>,
}

async fn follow(attached: Attached, kill: &CancellationToken, dialled: &watch::Sender<bool>) -> Course {
    let Attached { mut events, process } = attached;
    let mut course = Course::default();
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(VmmEvent::Exited(exited)) => course.said = Some(exited),
                Some(VmmEvent::Dial(PORT, _)) => { dialled.send_replace(true); }
                // Nothing on the host answers on other ports; the stream's end says so to the guest.
                Some(VmmEvent::Dial(..)) => {}
                None => {
                    match tokio::time::timeout(LAST_WORDS_TIMEOUT, process.ended()).await {
                        Ok(status) => course.status = Some(status.unwrap_or(None)),
                        Err(_) => course.why_killed = Some(broke_off()),
                    }
                    break;
                }
            },
            () = kill.cancelled() => {
                course.why_killed = Some(Exited { reason: ExitReason::Stopped, detail: "stopped by flintd".into() });
                break;
            }
            status = process.ended() => {
                course.status = Some(status.unwrap_or(None));
                break;
            }
        }
    }
    course.process = Some(process);
    course
}

fn broke_off() -> Exited {
    let detail = "the VMM closed its control connection, or broke its protocol, and did not end".into();
    Exited {
        reason: ExitReason::VmmError,
        detail,
    }
}

/// Ends what is left, finds out why it ended, and removes what the sandbox held.
async fn conclude(mut held: Held, mut course: Course, log: &OnceLock<String>) -> Exited {
    let cgroup = held.cgroup.clone();
    let attached = course.process.is_some();
    let destroyed = tokio::task::spawn_blocking(move || {
        let destroyed = cgroup.destroy();
        // Nobody has them by pidfd: launcher and VMM of a start that broke off on its way.
        let reaped = match (&destroyed, attached) {
            (Ok(()), false) => process::reap_children_in(&cgroup),
            _ => Vec::new(),
        };
        (destroyed, reaped)
    });
    let (destroyed, reaped) = match destroyed.await {
        Ok((destroyed, reaped)) => (Ok(destroyed), reaped),
        Err(panicked) => (Err(panicked), Vec::new()),
    };
    match (&course.process, course.status) {
        // Reaps it, if it is a child of ours. Its cgroup is empty, so this does not wait.
        (Some(process), None) => course.status = Some(process.ended().await.unwrap_or(None)),
        (None, None) => course.status = most_telling(&reaped).map(Some),
        (_, Some(_)) => {}
    }
    let exited = with_words_of_panic(verdict(course, read_exit_file(&held.folder)), &held.folder);
    let tails = log_tails(&held.folder);
    if !matches!(exited.reason, ExitReason::Poweroff | ExitReason::Stopped) {
        // The folder goes, and with it what VMM and guest said last.
        tracing::warn!(?exited, folder = %held.folder.path("").display(), %tails, "a sandbox failed");
    }
    let _ = log.set(tails);
    match destroyed {
        Ok(Ok(())) => {
            let pages = held.pages.take();
            held.release();
            if let Some(server) = pages.and_then(Arc::into_inner) {
                server.end().await;
            }
        }
        failure => {
            // Never hand out again what a process that may live still uses. The folder stays: the next flintd tries again.
            tracing::error!(folder = %held.folder.path("").display(), ?failure, "a sandbox's processes cannot be ended");
            std::mem::forget(held);
        }
    }
    exited
}

/// The VMM's own word first, then ours, then what its process status tells.
fn verdict(course: Course, from_file: Option<Exited>) -> Exited {
    course
        .said
        .or(from_file)
        .or(course.why_killed)
        .unwrap_or_else(|| from_status(course.status.flatten()))
}

/// Of a launcher and its VMM: each may end because the other did, but a signal comes from outside.
fn most_telling(statuses: &[ExitStatus]) -> Option<ExitStatus> {
    let rank = |status: &&ExitStatus| (status.signal().is_some(), !status.success());
    statuses.iter().max_by_key(rank).copied()
}

/// Why a VMM that said nothing has ended.
pub(super) fn from_status(status: Option<ExitStatus>) -> Exited {
    let Some(status) = status else {
        let detail = "the VMM ended without a word while no flintd was there to see it".into();
        return Exited {
            reason: ExitReason::Killed,
            detail,
        };
    };
    match (status.signal(), status.code()) {
        (Some(libc::SIGSYS), _) => Exited {
            reason: ExitReason::Seccomp,
            detail: "the VMM made a system call outside its filter".into(),
        },
        (Some(signal), _) => {
            let name = Signal::try_from(signal).map_or("a signal without a name", Signal::as_str);
            Exited {
                reason: ExitReason::Killed,
                detail: format!("the VMM was killed by signal {signal} ({name})"),
            }
        }
        (None, Some(code)) => {
            let detail = format!("the VMM exited with status {code}");
            let reason = ExitReason::try_from(code.saturating_sub(EXIT_CODE_BASE)).ok();
            let reason = reason
                .filter(|reason| *reason != ExitReason::Unspecified)
                .unwrap_or(ExitReason::VmmError);
            Exited { reason, detail }
        }
        (None, None) => Exited {
            reason: ExitReason::Unspecified,
            detail: format!("the VMM ended with {status}"),
        },
    }
}

pub(super) fn read_exit_file(folder: &Folder) -> Option<Exited> {
    let bytes = fs::read(folder.path("exit")).ok().filter(|bytes| !bytes.is_empty())?;
    vmm::Exited::decode(bytes.as_slice()).ok().map(Exited::from)
}

/// The last lines of the VMM's log and of the guest's console.
pub(super) fn log_tails(folder: &Folder) -> String {
    let labelled = |name| match tail(&folder.path(name), LOG_TAIL_BYTES) {
        text if text.is_empty() => text,
        text => format!("\n{name}: {text}"),
    };
    ["vmm.log", "serial.log"].map(labelled).concat()
}

/// A panic's detail, with what the guest's kernel said about it on its console.
fn with_words_of_panic(mut exited: Exited, folder: &Folder) -> Exited {
    if exited.reason == ExitReason::Panic {
        let console = tail(&folder.path("serial.log"), PANIC_TAIL_BYTES);
        let words = console
            .lines()
            .rev()
            .find_map(|line| Some(line.split_once(PANIC_WORDS)?.1));
        if let Some(words) = words {
            exited.detail = format!("{}: {}", exited.detail, words.trim_end());
        }
    }
    exited
}

/// The last `bytes` of a file, fit to be shown; empty if there are none.
fn tail(path: &Path, bytes: u64) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let mut text = Vec::new();
    let read = fs::File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        file.take(bytes).read_to_end(&mut text)
    });
    read.map(|_| printable(&text)).unwrap_or_default()
}

/// A guest chooses what is on its console: no control characters reach a terminal by this way.
fn printable(text: &[u8]) -> String {
    let keep = |c: char| if c == '\n' || !c.is_control() { c } else { ' ' };
    let text: String = String::from_utf8_lossy(text).chars().map(keep).collect();
    text.trim_end().to_owned()
}

/// The error of a start that failed: what the VMM died of, where it did; else what the start met.
pub(super) async fn explain(end: &End, error: SandboxError) -> SandboxError {
    let lost = is_loss(&error);
    if lost {
        // Killed now, it would be said to have been stopped.
        let _ = tokio::time::timeout(LAST_WORDS_TIMEOUT, end.wait()).await;
    }
    end.kill();
    let exited = end.wait().await;
    if lost && exited.reason != ExitReason::Stopped {
        return SandboxError::Ended { exited, log: end.log() };
    }
    error
}

/// Whether an error is what the end of a VMM looks like to the one who is talking to it or its guest.
fn is_loss(error: &SandboxError) -> bool {
    match error {
        SandboxError::Died | SandboxError::Connect(_) => true,
        SandboxError::Control(error) => matches!(
            error,
            ControlError::Connect(_) | ControlError::Send(_) | ControlError::Closed(_)
        ),
        // What tonic makes of a connection that broke.
        SandboxError::Identity(status) => {
            use tonic::Code::{Cancelled, Internal, Unavailable, Unknown};
            matches!(status.code(), Cancelled | Internal | Unavailable | Unknown)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(raw: i32) -> ExitReason {
        from_status(Some(ExitStatus::from_raw(raw))).reason
    }

    #[test]
    fn the_process_status_tells_why_a_silent_vmm_ended() {
        assert_eq!(reason(libc::SIGSYS), ExitReason::Seccomp);
        assert_eq!(reason(libc::SIGSYS | 0x80), ExitReason::Seccomp, "with a core dump");
        assert_eq!(reason(libc::SIGKILL), ExitReason::Killed);
        assert_eq!(
            reason((EXIT_CODE_BASE + ExitReason::Panic as i32) << 8),
            ExitReason::Panic
        );
        assert_eq!(
            reason(EXIT_CODE_BASE << 8),
            ExitReason::VmmError,
            "unspecified is no reason"
        );
        assert_eq!(reason(101 << 8), ExitReason::VmmError, "a Rust panic");
        assert_eq!(from_status(None).reason, ExitReason::Killed);
    }

    #[test]
    fn a_panic_is_told_in_the_words_of_the_guests_kernel() {
        let sandboxes = tempfile::tempdir().unwrap();
        let folder = Folder::of(sandboxes.path(), "panicked");
        fs::create_dir(folder.path("")).unwrap();
        let exited = |reason| Exited {
            reason,
            detail: "ended".into(),
        };
        assert_eq!(
            with_words_of_panic(exited(ExitReason::Panic), &folder).detail,
            "ended",
            "no console"
        );
        let console = "[    1.2] Kernel panic - not syncing: Attempted to kill init!\r\n[    1.3] CPU: 0\r\n";
        fs::write(folder.path("serial.log"), console).unwrap();
        assert_eq!(
            with_words_of_panic(exited(ExitReason::Panic), &folder).detail,
            "ended: Attempted to kill init!"
        );
        assert_eq!(with_words_of_panic(exited(ExitReason::Reset), &folder).detail, "ended");
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal_of_who_reads_an_error() {
        assert_eq!(printable(b"\x1b[31mboot\r\nfail\x07\n\n"), " [31mboot \nfail");
    }
}
