//! Programs of a pod's own that are run when it is saved and when it is made of what was saved.

use std::{fmt, time::Duration};

use flint_api::{
    guest::{self, exec_request, exec_response, guest_client::GuestClient},
    host,
};
use thiserror::Error;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

/// Of a hook that does not say.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a killed program may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// So much of what a program that failed has printed is told.
const LAST_WORDS: usize = 512;
const SIGKILL: u32 = 9;

/// A program to be run in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The container's id in the guest.
    pub container: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// How long it may take.
    pub timeout: Duration,
}

/// Why a hook has failed.
#[derive(Debug, Error)]
#[error("its program {program:?} in container {container} {failure}")]
pub struct HookError {
    container: String,
    program: String,
    failure: Failure,
}

#[derive(Debug)]
enum Failure {
    Guest(Box<Status>),
    NoEnd,
    NotStarted(String),
    Timeout(Duration),
    Exit { code: u32, words: String },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(status) => write!(f, "could not be run: {}", status.message()),
            Self::NoEnd => f.write_str("was given up by the guest"),
            Self::NotStarted(why) => write!(f, "could not be started: {why}"),
            Self::Timeout(limit) => write!(f, "did not end within {limit:?} and was killed"),
            Self::Exit { code, words } if words.is_empty() => write!(f, "ended with exit code {code}"),
            Self::Exit { code, words } => write!(f, "ended with exit code {code}: {words}"),
        }
    }
}

impl Hook {
    /// What a pod asks for, in a container whose id in the guest is given.
    pub fn of(hook: &host::Hook, container: String) -> Self {
        let timeout = hook.timeout.and_then(|timeout| timeout.try_into().ok());
        Self {
            container,
            command: hook.command.clone(),
            timeout: timeout.unwrap_or(TIMEOUT),
        }
    }

    /// Runs it to its end.
    pub async fn run(&self, guest: GuestClient<Channel>) -> Result<(), HookError> {
        self.attempt(guest).await.map_err(|failure| HookError {
            container: self.container.clone(),
            program: self.command.first().cloned().unwrap_or_default(),
            failure,
        })
    }

    async fn attempt(&self, mut guest: GuestClient<Channel>) -> Result<(), Failure> {
        let refused = |status: Status| Failure::Guest(Box::new(status));
        let (input, frames) = mpsc::channel(3);
        let send = async |frame| {
            // The guest may have ended the call already: its answer says why.
            let _ = input.send(guest::ExecRequest { frame: Some(frame) }).await;
        };
        send(exec_request::Frame::Start(guest::ExecStart {
            container_id: self.container.clone(),
            process: Some(guest::Process {
                args: self.command.clone(),
                ..guest::Process::default()
            }),
            terminal_size: None,
        }))
        .await;
        send(exec_request::Frame::StdinEof(guest::StdinEof {})).await;
        let call = async {
            let mut words = Vec::new();
            let answers = guest.exec(ReceiverStream::new(frames)).await.map_err(refused)?;
            let mut answers = answers.into_inner();
            while let Some(answer) = answers.message().await.map_err(refused)? {
                match answer.frame {
                    Some(exec_response::Frame::Stdout(bytes) | exec_response::Frame::Stderr(bytes)) => {
                        words.extend(bytes);
                        words.drain(..words.len().saturating_sub(LAST_WORDS));
                    }
                    Some(exec_response::Frame::Exit(end)) => return judge(&end, &words),
                    None => {}
                }
            }
            Err(Failure::NoEnd)
        };
        tokio::pin!(call);
        if let Ok(outcome) = timeout(self.timeout, &mut call).await {
            return outcome;
        }
        send(exec_request::Frame::Signal(SIGKILL)).await;
        // A guest that does not even do that has had its time.
        let _ = timeout(KILL_PATIENCE, call).await;
        Err(Failure::Timeout(self.timeout))
    }
}

fn judge(end: &guest::ContainerExit, words: &[u8]) -> Result<(), Failure> {
    if !end.start_error.is_empty() {
        return Err(Failure::NotStarted(end.start_error.clone()));
    }
    if end.exit_code == 0 {
        return Ok(());
    }
    // It is printed to terminals, and is the guest's.
    let words = String::from_utf8_lossy(words).trim().escape_debug().to_string();
    Err(Failure::Exit {
        code: end.exit_code,
        words,
    })
}
