//! `exec`, and what it shares with `run -i`: a session of streams with a program in a pod.

use std::io;

use clap::Args;
use flint_api::host::{
    ExecExit, ExecRequest, ExecResponse, ExecStart, StdinEof, TerminalSize, exec_request, exec_response,
};
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::Client;
use crate::failure::Failure;
use crate::output;
use crate::pods;
use crate::terminal::{self, RawMode};

/// Frames on their way to flintd; small, so that a slow program holds its input back.
const FRAMES: usize = 16;

/// Run a program in a running container.
#[derive(Debug, Args)]
pub struct Exec {
    /// The container; may be left out where the pod has one.
    #[arg(short, long)]
    container: Option<String>,
    /// Pass standard input on.
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the program a terminal.
    #[arg(short = 't', long)]
    tty: bool,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// The pod.
    pod: String,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    pub async fn execute(self, client: Client) -> Result<u8, Failure> {
        let pod = client.pod(&self.pod).await?;
        let start = ExecStart {
            uid: pods::uid(&pod),
            container: self.container.unwrap_or_default(),
            command: self.command,
            tty: self.tty,
            stdin: self.stdin,
            terminal_size: if self.tty { terminal::size() } else { None },
            timeout: self.timeout.map(|seconds| prost_types::Duration {
                seconds: seconds.into(),
                nanos: 0,
            }),
        };
        let raw = if self.tty && self.stdin {
            Some(RawMode::enter()?)
        } else {
            None
        };
        let (frames, requests) = mpsc::channel(FRAMES);
        let _ = frames.try_send(exec_request::Frame::Start(start));
        let requests = tokio_stream::StreamExt::map(ReceiverStream::new(requests), |frame| ExecRequest {
            frame: Some(frame),
        });
        let mut responses = client.streams().exec(requests).await?.into_inner();
        let input = tokio::spawn(send_input(frames, self.stdin, self.tty, ExecFrames));
        let exit = receive(&mut responses).await;
        input.abort();
        drop(raw);
        exit.map(|exit| exit_code(&exit))
    }
}

/// How a session's input frames are spelled on its stream.
pub trait InputFrames: Send + Sync + 'static {
    /// The stream's frame.
    type Frame: Send + 'static;
    fn stdin(&self, data: Vec<u8>) -> Self::Frame;
    fn eof(&self) -> Self::Frame;
    fn resize(&self, size: TerminalSize) -> Self::Frame;
}

struct ExecFrames;

impl InputFrames for ExecFrames {
    type Frame = exec_request::Frame;

    fn stdin(&self, data: Vec<u8>) -> Self::Frame {
        exec_request::Frame::Stdin(data)
    }

    fn eof(&self) -> Self::Frame {
        exec_request::Frame::StdinEof(StdinEof {})
    }

    fn resize(&self, size: TerminalSize) -> Self::Frame {
        exec_request::Frame::Resize(size)
    }
}

/// Sends standard input (or its end at once) and window sizes until the stream is gone. Holding `frames` keeps the stream
/// half open after the input's end, so that output goes on.
pub async fn send_input<F: InputFrames>(frames: mpsc::Sender<F::Frame>, stdin: bool, tty: bool, spell: F) {
    let mut input_open = stdin;
    if !stdin && frames.send(spell.eof()).await.is_err() {
        return;
    }
    // Without the signal there are no window sizes; nothing else is lost.
    let mut resized = if tty {
        signal(SignalKind::window_change()).ok()
    } else {
        None
    };
    let mut input = tokio::io::stdin();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let frame = tokio::select! {
            read = input.read(&mut buffer), if input_open => match read {
                Ok(count) if count > 0 => spell.stdin(buffer[..count].to_vec()),
                _ => {
                    input_open = false;
                    spell.eof()
                }
            },
            Some(()) = next_signal(&mut resized) => match terminal::size() {
                Some(size) => spell.resize(size),
                None => continue,
            },
            () = frames.closed() => return,
        };
        if frames.send(frame).await.is_err() {
            return;
        }
    }
}

async fn next_signal(signal: &mut Option<tokio::signal::unix::Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => std::future::pending().await,
    }
}

/// Copies a session's output to standard output and error until its last frame.
pub async fn receive(responses: &mut tonic::Streaming<ExecResponse>) -> Result<ExecExit, Failure> {
    while let Some(response) = responses.message().await? {
        match response.frame {
            Some(exec_response::Frame::Stdout(data)) => output::write_out(&mut io::stdout().lock(), &data)?,
            Some(exec_response::Frame::Stderr(data)) => output::write_out(&mut io::stderr().lock(), &data)?,
            Some(exec_response::Frame::Exit(exit)) => return Ok(exit),
            None => {}
        }
    }
    Err(Failure::new("the session ended without an exit code").hint("`flint ps -a` says what became of the pod"))
}

fn exit_code(exit: &ExecExit) -> u8 {
    if !exit.error.is_empty() {
        eprintln!("flint: {}", exit.error);
    }
    u8::try_from(exit.exit_code).unwrap_or(u8::MAX)
}
