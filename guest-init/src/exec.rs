//! Exec: a further program in a running container, with its streams on one gRPC call.
//!
//! ```text
//! client --ExecRequest--> input: stdin, end of it, window sizes, signals --> program
//!        <--ExecResponse-- pumps: stdout, stderr <-------------------------- program
//!        <--exit---------- the reaper, after the pumps have emptied the pipes
//! ```

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use flint_api::guest::{
    ContainerExit, ExecRequest, ExecResponse, ExecStart, exec_request::Frame, exec_response::Frame as Answer,
};
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tonic::{Status, Streaming};

use crate::{
    container::{
        Container, ContainerError, Containers, State, exit_of,
        helper::window_size,
        launch::{Launch, Launched},
        runtime::{Pipes, write_private},
        spec,
    },
    paths,
    stream_fd::{Read, StreamFd},
    sys,
};

/// Execs since boot; tells their files apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);
/// Most bytes in one answer.
const FRAME: usize = 16 << 10;
/// What a terminal takes for the end of input: Ctrl-D (termios' VEOF).
const END_OF_TRANSMISSION: &[u8] = &[4];

/// Where answers go.
pub type Answers = mpsc::Sender<Result<ExecResponse, Status>>;

/// Makes bytes a frame of one of the streams.
type Wrap = fn(Vec<u8>) -> Answer;

/// Serves one call from its first frame to the program's end.
pub async fn serve(containers: Containers, mut requests: Streaming<ExecRequest>, answers: Answers) {
    let outcome = match first_frame(&mut requests).await {
        Ok(start) => run(&containers, start, requests, &answers).await,
        Err(status) => Err(status),
    };
    let last = outcome.map(|exit| ExecResponse {
        frame: Some(Answer::Exit(exit)),
    });
    // The client may have gone.
    let _ = answers.send(last).await;
}

async fn first_frame(requests: &mut Streaming<ExecRequest>) -> Result<ExecStart, Status> {
    match requests.message().await?.and_then(|request| request.frame) {
        Some(Frame::Start(start)) => Ok(start),
        _ => Err(Status::invalid_argument("the first frame of an exec has to be start")),
    }
}

async fn run(
    containers: &Containers,
    start: ExecStart,
    requests: Streaming<ExecRequest>,
    answers: &Answers,
) -> Result<ContainerExit, Status> {
    let container = containers.get(&start.container_id)?;
    let (launched, pipes) = launch(containers, &container, &start).await?;
    let Launched {
        pid,
        end,
        mut reports,
        mut exec_failed,
        terminal,
    } = launched;
    let started = std::time::SystemTime::now();
    let (stop, stopped) = watch::channel(false);
    let mut pumps = JoinSet::new();
    let stdin = connect(terminal, pipes, answers, &stopped, &mut pumps).map_err(container.io("connecting an exec"))?;
    let kills_before = container.cgroup.keyed("memory.events", "oom_kill");
    let ended = until_end(pid, end, requests, stdin, answers).await?;
    // All that it wrote is in the pipes now. A child that it left behind may hold them open: that one is not waited for.
    stop.send_replace(true);
    while pumps.join_next().await.is_some() {}
    while let Some(report) = reports.next().await {
        exec_failed = report.exec_failed().or(exec_failed);
    }
    let mut exit = exit_of(ended, Some(started));
    exit.oom_killed = exit.signal == 9 && container.cgroup.keyed("memory.events", "oom_kill") > kills_before;
    if let Some((code, message)) = exec_failed {
        exit.exit_code = u32::from(code);
        exit.start_error = message;
    }
    Ok(exit)
}

async fn launch(
    containers: &Containers,
    container: &Arc<Container>,
    start: &ExecStart,
) -> Result<(Launched, Pipes), ContainerError> {
    let process = start.process.as_ref().cloned().unwrap_or_default();
    spec::check_process(&process)?;
    if !matches!(container.state(), State::Running { .. }) {
        return Err(container.not_running());
    }
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = paths::bundle(&container.id).join(format!("exec-{number}"));
    write_private(&path, &start.encode_to_vec()).map_err(container.io("passing an exec on"))?;
    let mut pipes = if process.terminal {
        Pipes::default()
    } else {
        Pipes::new(true).map_err(container.io("making an exec's pipes"))?
    };
    let launch = Launch {
        container: &container.id,
        exec: Some(number),
        stdio: std::mem::take(&mut pipes.theirs),
        terminal: process.terminal,
        pause: None,
    };
    let launched = launch.run(containers.reaper()).await;
    // The helper takes it away; if it did not come so far, nobody else would.
    let _ = std::fs::remove_file(&path);
    let failed = |source| ContainerError::Launch {
        id: container.id.to_string(),
        source,
    };
    Ok((launched.map_err(failed)?, pipes))
}

/// Starts the pumps; gives the way in.
fn connect(
    terminal: Option<std::os::fd::OwnedFd>,
    pipes: Pipes,
    answers: &Answers,
    stopped: &watch::Receiver<bool>,
    pumps: &mut JoinSet<()>,
) -> io::Result<Stdin> {
    let mut sources: Vec<(StreamFd, Wrap)> = Vec::new();
    let stdin = match terminal {
        Some(master) => {
            let writer = StreamFd::writing(master.try_clone()?)?;
            sources.push((StreamFd::reading(master)?, Answer::Stdout));
            Stdin {
                stream: Some(writer),
                terminal: true,
            }
        }
        None => Stdin {
            stream: pipes.stdin,
            terminal: false,
        },
    };
    if let Some((stdout, stderr)) = pipes.outputs {
        sources.push((stdout, Answer::Stdout));
        sources.push((stderr, Answer::Stderr));
    }
    for (source, wrap) in sources {
        pumps.spawn(pump(source, wrap, answers.clone(), stopped.clone()));
    }
    Ok(stdin)
}

/// Carries one stream to the client, no faster than it takes it.
async fn pump(source: StreamFd, wrap: Wrap, answers: Answers, mut stopped: watch::Receiver<bool>) {
    let mut buffer = vec![0; FRAME];
    loop {
        let read = tokio::select! {
            biased;
            read = source.read(&mut buffer) => read.map(Read::from_count),
            _ = stopped.wait_for(|stopped| *stopped) => source.try_read(&mut buffer),
        };
        let Ok(Read::Bytes(count)) = read else { return };
        let frame = wrap(buffer.get(..count).unwrap_or_default().to_vec());
        if answers.send(Ok(ExecResponse { frame: Some(frame) })).await.is_err() {
            return;
        }
    }
}

/// Serves the client's frames until the program ends; kills it if the client goes away.
async fn until_end(
    pid: i32,
    mut end: crate::reaper::EndReceiver,
    requests: Streaming<ExecRequest>,
    stdin: Stdin,
    answers: &Answers,
) -> Result<crate::reaper::Ended, Status> {
    let input = serve_input(pid, requests, stdin);
    tokio::pin!(input);
    let (mut listening, mut abandoned) = (true, false);
    loop {
        tokio::select! {
            biased;
            ended = &mut end => return ended.map_err(|_| Status::internal("the program's end was lost")),
            gone = &mut input, if listening => {
                listening = false;
                abandoned |= gone;
            }
            () = answers.closed(), if !abandoned => abandoned = true,
        }
        if abandoned {
            listening = false;
            // It may just have ended; then its end comes next.
            let _ = sys::kill(pid, libc::SIGKILL);
        }
    }
}

/// True if the client is gone; false if it merely has nothing more to say.
async fn serve_input(pid: i32, mut requests: Streaming<ExecRequest>, mut stdin: Stdin) -> bool {
    loop {
        let frame = match requests.message().await {
            Ok(Some(request)) => request.frame,
            Ok(None) => return false,
            Err(_) => return true,
        };
        match frame {
            Some(Frame::Stdin(data)) => stdin.write(&data).await,
            Some(Frame::StdinEof(_)) => stdin.end().await,
            Some(Frame::Resize(size)) => stdin.resize(size),
            Some(Frame::Signal(signal)) => {
                // Numbers that are no signals have no effect, like signals to a program that has just ended.
                let _ = i32::try_from(signal).map(|signal| sys::kill(pid, signal));
            }
            Some(Frame::Start(_)) | None => {}
        }
    }
}

/// A program's input: a pipe or a terminal.
#[derive(Debug)]
pub struct Stdin {
    stream: Option<StreamFd>,
    terminal: bool,
}

impl Stdin {
    async fn write(&mut self, data: &[u8]) {
        if let Some(stream) = &self.stream
            && stream.write_all(data).await.is_err()
        {
            // The program has closed its input, as `head` does: what else comes goes nowhere.
            self.stream = None;
        }
    }

    async fn end(&mut self) {
        if self.terminal {
            self.write(END_OF_TRANSMISSION).await;
        } else {
            self.stream = None;
        }
    }

    fn resize(&self, size: flint_api::guest::TerminalSize) {
        if let Some(stream) = self.stream.as_ref().filter(|_| self.terminal) {
            let (rows, columns) = window_size(size);
            let _ = sys::set_window_size(stream.as_fd(), rows, columns);
        }
    }
}

/// Writes what a WriteInput call brings to a container's own input.
pub async fn write_input(
    containers: &Containers,
    mut frames: Streaming<flint_api::guest::InputFrame>,
) -> Result<(), Status> {
    let mut target: Option<Arc<Container>> = None;
    while let Some(frame) = frames.message().await? {
        let container = match &target {
            Some(container) => Arc::clone(container),
            None => Arc::clone(target.insert(containers.get(&frame.container_id)?)),
        };
        let mut stdin = container.stdin.lock().await;
        let Some(stream) = stdin.as_ref() else {
            return Err(Status::failed_precondition(format!(
                "container {} takes no input: it was created without, was given its end, or has ended",
                container.id
            )));
        };
        if let Some(size) = frame.resize.filter(|_| container.terminal) {
            let (rows, columns) = window_size(size);
            sys::set_window_size(stream.as_fd(), rows, columns).map_err(container.io("setting its window size"))?;
        }
        if !frame.data.is_empty() && stream.write_all(&frame.data).await.is_err() {
            *stdin = None;
            return Err(Status::failed_precondition(format!(
                "container {} has closed its input",
                container.id
            )));
        }
        if frame.eof && container.terminal {
            stream
                .write_all(END_OF_TRANSMISSION)
                .await
                .map_err(container.io("ending its input"))?;
        } else if frame.eof {
            *stdin = None;
        }
    }
    Ok(())
}
