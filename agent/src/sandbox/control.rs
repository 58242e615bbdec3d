//! Client of the VMM control protocol (`vmm.proto`): requests with descriptors out, responses and events in.
//!
//! One task reads. It hands each response to its waiter and each event to the supervisor. A VMM that breaks the protocol
//! loses its connection: every waiter gets an error that says what was wrong, and the supervisor ends the VMM.

use std::{
    collections::HashMap,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use flint_api::vmm::{
    Event, FromVmm, GetState, MAX_FDS, MAX_PACKET, Ok as Done, Request, Response, SaveSnapshot, Saved, State,
    error::Code, event, from_vmm, request::Command, response,
};
use prost::Message;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::packet::{Packet, PacketSocket};

/// How long a VMM may take to answer. Only a broken one takes longer, even on an emulated host.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Bytes of memory a second that a save writes on the slowest disk.
const SLOWEST_SAVE: u64 = 8 << 20;
/// Events that may wait for the supervisor before reading stops.
const EVENT_BACKLOG: usize = 16;

/// A request to a VMM failed.
#[derive(Clone, Debug, Error)]
pub enum ControlError {
    /// No connection.
    #[error("could not connect to the VMM's control socket")]
    Connect(#[source] Arc<io::Error>),
    /// The request cannot be sent.
    #[error("could not send a request to the VMM")]
    Send(#[source] Arc<io::Error>),
    /// The connection is over.
    #[error("the VMM's control connection is over: {0}")]
    Closed(String),
    /// The VMM says no.
    #[error("the VMM refused ({}): {message}", .code.as_str_name())]
    Refused {
        /// Kind of refusal.
        code: Code,
        /// Its chain of causes.
        message: String,
    },
    /// The VMM answered something else than was asked.
    #[error("the VMM broke the control protocol: {0}")]
    Protocol(&'static str),
    /// The VMM does not answer.
    #[error("the VMM has not answered within {0:?}")]
    Timeout(Duration),
    /// The request breaks the protocol's limits.
    #[error(
        "a request to the VMM would have {bytes} bytes and {fds} descriptors; {MAX_PACKET} and {MAX_FDS} are allowed"
    )]
    TooLarge {
        /// Of the message.
        bytes: usize,
        /// With it.
        fds: usize,
    },
}

/// What a VMM told without being asked.
#[derive(Debug)]
pub enum VmmEvent {
    /// Its last words.
    Exited(super::Exited),
    /// The guest opened a stream to this port of the host.
    Dial(u32, OwnedFd),
}

/// A connection to a VMM. Clones share it.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    socket: PacketSocket,
    next_id: AtomicU64,
    waiters: Mutex<Waiters>,
}

#[derive(Debug)]
enum Waiters {
    Open(HashMap<u64, oneshot::Sender<Answer>>),
    Closed(ControlError),
}

#[derive(Debug)]
struct Answer {
    result: Result<response::Result, ControlError>,
    pid: Option<i32>,
}

impl Control {
    /// Connects to a VMM. Events come from the receiver, which ends with the connection.
    pub fn connect(path: &Path) -> Result<(Self, mpsc::Receiver<VmmEvent>), ControlError> {
        let socket = PacketSocket::connect(path).map_err(|error| ControlError::Connect(Arc::new(error)))?;
        let waiters = Mutex::new(Waiters::Open(HashMap::new()));
        let shared = Arc::new(Shared {
            socket,
            next_id: AtomicU64::new(1),
            waiters,
        });
        let (sender, events) = mpsc::channel(EVENT_BACKLOG);
        tokio::spawn(read(Arc::clone(&shared), sender));
        Ok((Self(shared), events))
    }

    /// The VMM's state, and its process id as this process sees it.
    pub async fn hello(&self) -> Result<(State, i32), ControlError> {
        let answer = self.ask(Command::GetState(GetState {}), &[]).await?;
        let pid = answer
            .pid
            .filter(|pid| *pid > 0)
            .ok_or(ControlError::Protocol("it hides its process id"))?;
        Ok((expect_state(answer.result?)?, pid))
    }

    /// The VMM's state and counters.
    pub async fn state(&self) -> Result<State, ControlError> {
        expect_state(self.ask(Command::GetState(GetState {}), &[]).await?.result?)
    }

    /// Has a command done. The descriptors are in the order that `vmm.proto` says.
    pub async fn command(&self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        match self.ask(command, fds).await?.result? {
            response::Result::Ok(_) => Ok(()),
            _ => Err(ControlError::Protocol("an answer without ok to a command")),
        }
    }

    /// Has a machine saved that has so much memory; it stands still afterwards.
    pub async fn save(&self, memory_bytes: u64, fds: &[BorrowedFd<'_>]) -> Result<Saved, ControlError> {
        let command = Command::SaveSnapshot(SaveSnapshot {
            base: Vec::new(),
            stay_paused: true,
        });
        let patience = ANSWER_TIMEOUT + Duration::from_secs(memory_bytes / SLOWEST_SAVE);
        match self.ask_within(patience, command, fds).await?.result? {
            response::Result::Ok(Done { saved: Some(saved) }) => Ok(saved),
            _ => Err(ControlError::Protocol(
                "an answer to a save that does not say what was saved",
            )),
        }
    }

    async fn ask(&self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<Answer, ControlError> {
        self.ask_within(ANSWER_TIMEOUT, command, fds).await
    }

    async fn ask_within(
        &self,
        patience: Duration,
        command: Command,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, ControlError> {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = Request {
            id,
            command: Some(command),
        }
        .encode_to_vec();
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(ControlError::TooLarge {
                bytes: bytes.len(),
                fds: fds.len(),
            });
        }
        let answer = self.0.wait_for(id)?;
        let _forget = Forget(&self.0, id);
        let exchange = async {
            self.0
                .socket
                .send(&bytes, fds)
                .await
                .map_err(|error| ControlError::Send(Arc::new(error)))?;
            answer.await.map_err(|_| self.0.why_closed())
        };
        tokio::time::timeout(patience, exchange)
            .await
            .map_err(|_| ControlError::Timeout(patience))?
    }
}

fn expect_state(result: response::Result) -> Result<State, ControlError> {
    match result {
        response::Result::State(state) => Ok(state),
        _ => Err(ControlError::Protocol("an answer without state to a question for it")),
    }
}

/// Takes a waiter out again when its caller gives up.
struct Forget<'a>(&'a Shared, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Waiters::Open(waiters) = &mut *self.0.lock() {
            waiters.remove(&self.1);
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiters> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&self, id: u64) -> Result<oneshot::Receiver<Answer>, ControlError> {
        match &mut *self.lock() {
            Waiters::Open(waiters) => {
                let (sender, receiver) = oneshot::channel();
                waiters.insert(id, sender);
                Ok(receiver)
            }
            Waiters::Closed(reason) => Err(reason.clone()),
        }
    }

    fn why_closed(&self) -> ControlError {
        match &*self.lock() {
            Waiters::Closed(reason) => reason.clone(),
            Waiters::Open(_) => ControlError::Closed("no answer".into()),
        }
    }

    /// The waiters' senders are dropped with the map; each waiter then asks `why_closed`.
    fn close(&self, reason: ControlError) {
        *self.lock() = Waiters::Closed(reason);
    }

    fn answer(&self, response: Response, pid: Option<i32>) -> Result<(), ControlError> {
        let result = match response.result {
            Some(response::Result::Error(error)) => Err(ControlError::Refused {
                code: error.code(),
                message: error.message,
            }),
            Some(result) => Ok(result),
            None => return Err(ControlError::Protocol("a response without a result")),
        };
        if response.id == 0 || response.id >= self.next_id.load(Ordering::Relaxed) {
            return Err(ControlError::Protocol("a response to what nobody asked"));
        }
        if let Waiters::Open(waiters) = &mut *self.lock()
            && let Some(waiter) = waiters.remove(&response.id)
        {
            // A caller that has given up meanwhile is fine.
            let _ = waiter.send(Answer { result, pid });
        }
        Ok(())
    }
}

async fn read(shared: Arc<Shared>, events: mpsc::Sender<VmmEvent>) {
    let reason = loop {
        let packet = match shared.socket.receive().await {
            Ok(Some(packet)) => packet,
            Ok(None) => break ControlError::Closed("the VMM closed it".into()),
            Err(error) => break ControlError::Closed(error.to_string()),
        };
        match understand(&shared, packet) {
            Ok(None) => {}
            Ok(Some(event)) => {
                if events.send(event).await.is_err() {
                    break ControlError::Closed("nobody listens to the VMM any more".into());
                }
            }
            Err(error) => break error,
        }
    };
    shared.close(reason);
}

fn understand(shared: &Shared, packet: Packet) -> Result<Option<VmmEvent>, ControlError> {
    let message = FromVmm::decode(packet.bytes.as_slice())
        .ok()
        .and_then(|message| message.message);
    match message.ok_or(ControlError::Protocol("a packet that is no message"))? {
        from_vmm::Message::Response(response) if packet.fds.is_empty() => {
            shared.answer(response, packet.pid).map(|()| None)
        }
        from_vmm::Message::Event(Event { event: Some(event) }) => understand_event(event, packet.fds).map(Some),
        _ => Err(ControlError::Protocol(
            "an empty event, or descriptors where none belong",
        )),
    }
}

fn understand_event(event: event::Event, mut fds: Vec<OwnedFd>) -> Result<VmmEvent, ControlError> {
    match (event, fds.pop(), fds.is_empty()) {
        (event::Event::Exited(exited), None, true) => Ok(VmmEvent::Exited(exited.into())),
        (event::Event::Dial(dial), Some(stream), true) => Ok(VmmEvent::Dial(dial.port, stream)),
        _ => Err(ControlError::Protocol("an event with a wrong number of descriptors")),
    }
}
