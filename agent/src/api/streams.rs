//! `flint.host.v1.Streams`: byte streams between a client and a container, bridged with back-pressure on both sides.

use std::{sync::Arc, time::Duration};

use flint_api::{
    guest,
    host::{self, streams_server::Streams},
};
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, async_trait};

use super::{
    Answers, Api,
    fault::{bad_field, fault},
};
use crate::{
    backend::Sandbox,
    pods::{
        RunningContainer,
        attached::{Heard, Subscription},
        duration,
    },
};

/// Frames on their way in one direction.
const WINDOW: usize = 16;
/// Batches of a log on their way: what a reader that is slow costs, at about 64 KiB each.
const LOG_WINDOW: usize = 2;
/// Exit code of a program that was given up, as timeout(1) has it.
const TIMED_OUT: u32 = 124;
const SIGKILL: u32 = 9;

#[async_trait]
impl Streams for Api {
    type LogsStream = Answers<host::LogEntry>;

    async fn logs(&self, request: Request<host::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let entries = self.read_log(request.into_inner())?.flat_map(|batch| {
            let entries = match batch {
                Ok(batch) => batch.entries.into_iter().map(Ok).collect(),
                Err(status) => vec![Err(status)],
            };
            futures::stream::iter(entries)
        });
        Ok(Response::new(Box::pin(entries)))
    }

    type LogBatchesStream = Answers<host::LogBatch>;

    async fn log_batches(
        &self,
        request: Request<host::LogsRequest>,
    ) -> Result<Response<Self::LogBatchesStream>, Status> {
        Ok(Response::new(Box::pin(self.read_log(request.into_inner())?)))
    }

    type ExecStream = Answers<host::ExecResponse>;

    async fn exec(&self, request: Request<Streaming<host::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut frames = request.into_inner();
        let first = frames.message().await?.and_then(|message| message.frame);
        let Some(host::exec_request::Frame::Start(start)) = first else {
            return Err(bad_field("frame", "must be start in the first message"));
        };
        if start.command.is_empty() || start.command.iter().any(|word| word.contains('\0')) {
            return Err(bad_field("start.command", "must name a program, without NUL"));
        }
        let container = self.pods.running(&start.uid, &start.container)?;
        let limit = start.timeout.map(duration);
        let (input, guest_input) = mpsc::channel(WINDOW);
        // The channel is new and holds more than one.
        let _ = input.send(exec_frame(exec_start(&container, &start))).await;
        let exec = container.sandbox.guest().exec(ReceiverStream::new(guest_input)).await;
        let output = exec.map_err(|status| from_guest(&status))?.into_inner();
        let (out, answers) = mpsc::channel(WINDOW);
        tokio::spawn(feed(frames, input.clone(), start.stdin));
        tokio::spawn(drain(output, input, out, limit));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    type AttachStream = Answers<host::ExecResponse>;

    async fn attach(
        &self,
        request: Request<Streaming<host::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut frames = request.into_inner();
        let first = frames.message().await?.and_then(|message| message.frame);
        let Some(host::attach_request::Frame::Start(start)) = first else {
            return Err(bad_field("frame", "must be start in the first message"));
        };
        let container = self.pods.running(&start.uid, &start.container)?;
        if start.stdin && !container.spec.stdin {
            let name = &container.spec.name;
            let message = format!("container {name} was made without standard input: set stdin in its spec");
            return Err(fault(Code::FailedPrecondition, "NO_STDIN", message));
        }
        let (out, answers) = mpsc::channel(WINDOW);
        if start.stdin || container.spec.tty {
            let (input, guest_input) = mpsc::channel(WINDOW);
            let mut guest = container.sandbox.guest();
            tokio::spawn(async move { guest.write_input(ReceiverStream::new(guest_input)).await });
            tokio::spawn(feed_attached(frames, input, container.guest_id.clone(), start.stdin));
        }
        let output = container.output.subscribe(container.run);
        tokio::spawn(follow(container.sandbox, output, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl Api {
    fn read_log(
        &self,
        request: host::LogsRequest,
    ) -> Result<impl Stream<Item = Result<host::LogBatch, Status>> + Send + use<>, Status> {
        let (container, query) = self.pods.log(&request)?;
        let (out, batches) = mpsc::channel(LOG_WINDOW);
        let logs = self.pods.context().logs.clone();
        tokio::spawn(async move { logs.read(&request.uid, &container, query, out).await });
        let failed = |error| fault(Code::Internal, "LOGS", format!("reading the log: {error}"));
        Ok(ReceiverStream::new(batches).map(move |batch| batch.map_err(failed)))
    }
}

fn exec_frame(frame: guest::exec_request::Frame) -> guest::ExecRequest {
    guest::ExecRequest { frame: Some(frame) }
}

fn exec_start(container: &RunningContainer, start: &host::ExecStart) -> guest::exec_request::Frame {
    guest::exec_request::Frame::Start(guest::ExecStart {
        container_id: container.guest_id.clone(),
        process: Some(guest::Process {
            args: start.command.clone(),
            terminal: start.tty,
            ..guest::Process::default()
        }),
        terminal_size: start.terminal_size.map(size),
    })
}

fn size(size: host::TerminalSize) -> guest::TerminalSize {
    guest::TerminalSize {
        rows: size.rows,
        columns: size.columns,
    }
}

/// The guest's word on why it did not work, under this API's domain.
fn from_guest(status: &Status) -> Status {
    let code = match status.code() {
        code @ (Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition | Code::ResourceExhausted) => code,
        _ => Code::Unavailable,
    };
    fault(code, "GUEST", status.message())
}

/// Carries a client's input to the guest. Without standard input its end is told at once, so that a program that reads
/// does not wait for ever.
async fn feed(mut frames: Streaming<host::ExecRequest>, input: mpsc::Sender<guest::ExecRequest>, stdin: bool) {
    use guest::exec_request::Frame as To;
    use host::exec_request::Frame;
    if !stdin && input.send(exec_frame(To::StdinEof(guest::StdinEof {}))).await.is_err() {
        return;
    }
    loop {
        let frame = match frames.message().await {
            Ok(Some(message)) => message.frame,
            // Half-closed: no more input; the output goes on.
            Ok(None) if stdin => {
                let _ = input.send(exec_frame(To::StdinEof(guest::StdinEof {}))).await;
                return;
            }
            Ok(None) => return,
            Err(_) => {
                // The client is gone: nobody wants the program any more.
                let _ = input.send(exec_frame(To::Signal(SIGKILL))).await;
                return;
            }
        };
        let to = match frame {
            Some(Frame::Stdin(bytes)) if stdin => To::Stdin(bytes),
            Some(Frame::StdinEof(_)) if stdin => To::StdinEof(guest::StdinEof {}),
            Some(Frame::Resize(to)) => To::Resize(size(to)),
            Some(Frame::Start(_) | Frame::Stdin(_) | Frame::StdinEof(_)) | None => continue,
        };
        if input.send(exec_frame(to)).await.is_err() {
            return;
        }
    }
}

/// Carries a program's output and end to the client.
async fn drain(
    mut output: Streaming<guest::ExecResponse>,
    input: mpsc::Sender<guest::ExecRequest>,
    out: mpsc::Sender<Result<host::ExecResponse, Status>>,
    limit: Option<Duration>,
) {
    use guest::exec_response::Frame as From;
    use host::exec_response::Frame;
    let deadline = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(deadline);
    loop {
        let message = tokio::select! {
            message = output.message() => message,
            () = &mut deadline => {
                let _ = input.send(exec_frame(guest::exec_request::Frame::Signal(SIGKILL))).await;
                let error = "the program did not end within its timeout and was killed".to_owned();
                let _ = out.send(Ok(exit(TIMED_OUT, error))).await;
                return;
            }
            () = out.closed() => {
                let _ = input.send(exec_frame(guest::exec_request::Frame::Signal(SIGKILL))).await;
                return;
            }
        };
        let answer = match message {
            Ok(Some(guest::ExecResponse {
                frame: Some(From::Stdout(bytes)),
            })) => Ok(frame(Frame::Stdout(bytes))),
            Ok(Some(guest::ExecResponse {
                frame: Some(From::Stderr(bytes)),
            })) => Ok(frame(Frame::Stderr(bytes))),
            Ok(Some(guest::ExecResponse {
                frame: Some(From::Exit(end)),
            })) => Ok(exit(end.exit_code, end.start_error)),
            Ok(Some(guest::ExecResponse { frame: None })) => continue,
            Ok(None) => Err(fault(
                Code::Unavailable,
                "GUEST",
                "the guest ended the stream without an exit code",
            )),
            Err(status) => Err(from_guest(&status)),
        };
        let last = !matches!(
            &answer,
            Ok(host::ExecResponse {
                frame: Some(Frame::Stdout(_) | Frame::Stderr(_))
            })
        );
        if out.send(answer).await.is_err() || last {
            return;
        }
    }
}

fn frame(frame: host::exec_response::Frame) -> host::ExecResponse {
    host::ExecResponse { frame: Some(frame) }
}

fn exit(exit_code: u32, error: String) -> host::ExecResponse {
    frame(host::exec_response::Frame::Exit(host::ExecExit { exit_code, error }))
}

async fn feed_attached(
    mut frames: Streaming<host::AttachRequest>,
    input: mpsc::Sender<guest::InputFrame>,
    container_id: String,
    stdin: bool,
) {
    use host::attach_request::Frame;
    let mut next = guest::InputFrame {
        container_id,
        ..guest::InputFrame::default()
    };
    loop {
        if input.send(next).await.is_err() {
            return;
        }
        next = guest::InputFrame::default();
        // A client that is gone, or half-closed, only lets go: another may attach later.
        let Ok(Some(message)) = frames.message().await else {
            return;
        };
        match message.frame {
            Some(Frame::Stdin(data)) if stdin => next.data = data,
            Some(Frame::StdinEof(_)) if stdin => next.eof = true,
            Some(Frame::Resize(to)) => next.resize = Some(size(to)),
            Some(Frame::Start(_) | Frame::Stdin(_) | Frame::StdinEof(_)) | None => {}
        }
    }
}

/// Carries a run's output to an attached client until it is over.
async fn follow(
    sandbox: Arc<dyn Sandbox>,
    mut output: Subscription,
    out: mpsc::Sender<Result<host::ExecResponse, Status>>,
) {
    use host::exec_response::Frame;
    let gone = |why: &str| Err(fault(Code::Unavailable, "SANDBOX_GONE", why));
    let last = loop {
        let heard = tokio::select! {
            biased;
            heard = output.next() => heard,
            exit = sandbox.exited() => break gone(&format!("the pod's sandbox has ended: {exit}")),
            () = out.closed() => return,
        };
        let answer = match heard {
            Heard::Piece(piece) if piece.stream == host::OutputStream::Stderr => Frame::Stderr(piece.data.to_vec()),
            Heard::Piece(piece) => Frame::Stdout(piece.data.to_vec()),
            Heard::Ended(Some(end)) => break Ok(exit(end.exit_code, end.start_error)),
            Heard::Ended(None) => break gone("the container's run has ended, and nobody knows how"),
            Heard::TooSlow => {
                let message = "the client is slower than the container's output: read its log instead";
                break Err(fault(Code::ResourceExhausted, "TOO_SLOW", message));
            }
        };
        if out.send(Ok(frame(answer))).await.is_err() {
            return;
        }
    };
    // Whoever has hung up does not need to know.
    let _ = out.send(last).await;
}
