//! The control thread: one epoll over the listening socket, the connection, the exit latch and the guest's dials.
//!
//! Requests are answered in their order, one at a time. A newer connection replaces the older. A peer that does not read
//! what is sent to it is cut off: nothing here ever waits for it. The end of a connection ends nothing else.

pub mod commands;
pub mod packet;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use flint_api::vmm::{
    Dial, Error as WireError, Event, FromVmm, Ok as WireOk, Request, Response, Saved, State, event, from_vmm, response,
    state,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{SockFlag, accept4};
use prost::Message;

use self::commands::{Answer, Failure, Phase};
use self::packet::Received;
use crate::dial::Dials;
use crate::exit::{Exit, ExitLatch};
use crate::jail::Confine;
use crate::machine::Shell;
use crate::machine::snapshot::Report;
use flint_api::vmm::ExitReason;

const LISTENER: u64 = 0;
const CONNECTION: u64 = 1;
const EXIT: u64 = 2;
const DIALS: u64 = 3;

/// A loaded machine of which nobody wants anything for so many milliseconds has time to become small; nobody waits for that.
const LONG_MS: u8 = 20;

/// The end of a sandbox, with its machine: to be kept until the process exits, because taking a running machine apart first
/// would only cost time.
pub struct End {
    /// Why.
    pub exit: Exit,
    _machine: Option<Phase>,
}

/// The control thread's state.
pub struct Server {
    listener: OwnedFd,
    connection: Option<OwnedFd>,
    epoll: Epoll,
    exit: ExitLatch,
    dials: Dials,
    confine: Confine,
    born: Instant,
    /// The request that is being worked at step by step, if whoever sent it still waits for the answer.
    unanswered: Option<u64>,
    /// What only loading needed was given back.
    trimmed: bool,
}

impl Server {
    /// Prepares to serve connections that come to `listener`.
    ///
    /// # Errors
    /// The descriptor is none that can be listened on, or the process is out of descriptors.
    pub fn new(listener: OwnedFd, exit: ExitLatch, dials: Dials, confine: Confine, born: Instant) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&listener, FcntlArg::F_GETFL)?) | OFlag::O_NONBLOCK;
        fcntl(&listener, FcntlArg::F_SETFL(flags))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        epoll.add(&listener, readable(LISTENER))?;
        epoll.add(&exit, readable(EXIT))?;
        epoll.add(&dials, readable(DIALS))?;
        Ok(Self {
            listener,
            connection: None,
            epoll,
            exit,
            dials,
            confine,
            born,
            unanswered: None,
            trimmed: false,
        })
    }

    /// Serves until the sandbox ends, and tells the peer of the end.
    pub fn serve(mut self, shell: Shell) -> End {
        let mut phase = Phase::Shell(shell);
        let (exit, machine) = loop {
            if let Some(exit) = self.exit.get() {
                break (exit.clone(), Some(phase));
            }
            phase = match self.turn(phase) {
                Ok(phase) => phase,
                Err(error) => break (Exit::new(ExitReason::VmmError, format!("control loop: {error}")), None),
            };
        };
        // What the guest opened before its end is told before its end.
        self.forward_dials();
        let event = Event {
            event: Some(event::Event::Exited(exit.to_message())),
        };
        self.send(from_vmm::Message::Event(event), &[]);
        End {
            exit,
            _machine: machine,
        }
    }

    fn turn(&mut self, mut phase: Phase) -> io::Result<Phase> {
        if phase.is_busy() {
            phase = self.step(phase);
        }
        let busy = phase.is_busy();
        let mut events = [EpollEvent::empty(); 4];
        let unsettled = phase.is_unsettled() || phase.is_parked() && !self.trimmed;
        let patience = match (busy || phase.has_spare_work(), unsettled) {
            (true, _) => EpollTimeout::ZERO,
            (false, true) => LONG_MS.into(),
            (false, false) => EpollTimeout::NONE,
        };
        let count = match self.epoll.wait(&mut events, patience) {
            Err(Errno::EINTR) => return Ok(phase),
            outcome => outcome?,
        };
        if count == 0 && unsettled {
            phase.settle();
            trim_heap();
            self.trimmed = true;
        }
        if count == 0 {
            phase.do_spare_work();
        }
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept()?,
                // Requests are answered in their order: the next one waits.
                CONNECTION if busy => {}
                CONNECTION => phase = self.receive(phase),
                DIALS => self.forward_dials(),
                _ => {}
            }
        }
        Ok(phase)
    }

    fn accept(&mut self) -> io::Result<()> {
        let fd = match accept4(
            self.listener.as_raw_fd(),
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        ) {
            Ok(fd) => fd,
            // Gone again before it was accepted, or taken by an earlier turn.
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // SAFETY: accept4 has just made this descriptor for us.
        let connection = unsafe { OwnedFd::from_raw_fd(fd) };
        // Closing the older connection takes it out of the epoll.
        self.connection = None;
        self.unanswered = None;
        self.epoll
            .add(&connection, EpollEvent::new(EpollFlags::EPOLLIN, CONNECTION))?;
        self.connection = Some(connection);
        self.forward_dials();
        Ok(())
    }

    fn receive(&mut self, phase: Phase) -> Phase {
        let Some(connection) = &self.connection else {
            return phase;
        };
        match packet::receive(connection.as_fd()) {
            Ok(Received::Packet { bytes, fds }) => self.request(phase, &bytes, fds),
            Ok(Received::Oversized { bytes }) => {
                let id = Request::decode(&bytes[..]).map_or(0, |request| request.id);
                self.respond(
                    id,
                    Err(Failure::invalid(
                        "the packet has more than 64 KiB or more than 64 file descriptors",
                    )),
                );
                phase
            }
            Ok(Received::End) => self.disconnect(phase),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => phase,
            Err(_) => self.disconnect(phase),
        }
    }

    fn disconnect(&mut self, phase: Phase) -> Phase {
        self.connection = None;
        phase
    }

    fn request(&mut self, phase: Phase, bytes: &[u8], fds: Vec<OwnedFd>) -> Phase {
        let request = match Request::decode(bytes) {
            Ok(request) => request,
            Err(error) => {
                self.respond(0, Err(Failure::invalid(format!("the packet is no Request: {error}"))));
                return phase;
            }
        };
        let Some(command) = request.command else {
            self.respond(
                request.id,
                Err(Failure::invalid(
                    "the request has no command, or one that this VMM does not know",
                )),
            );
            return phase;
        };
        let had_machine = phase.has_machine();
        let (phase, outcome) = phase.handle(command, fds);
        // Whatever it was, it may have taken something of the heap.
        self.trimmed = false;
        if phase.has_machine() && !had_machine {
            // All threads are there; nobody needs the filters any more.
            let confine = std::mem::replace(&mut self.confine, Confine::off());
            if let Err(error) = confine.control() {
                let detail = format!("narrowing the control thread's filter: {error}");
                self.exit.set(Exit::new(ExitReason::VmmError, detail));
            }
        }
        match outcome {
            Ok(Answer::Later) => self.unanswered = Some(request.id),
            outcome => self.respond(request.id, outcome),
        }
        phase
    }

    fn step(&mut self, phase: Phase) -> Phase {
        let (phase, outcome) = phase.step();
        if let Some((outcome, id)) = outcome.and_then(|outcome| Some((outcome, self.unanswered.take()?))) {
            self.respond(id, outcome);
        }
        phase
    }

    fn respond(&mut self, id: u64, outcome: Result<Answer, Failure>) {
        let stop = matches!(outcome, Ok(Answer::Stop));
        let result = match outcome {
            Ok(Answer::Ok | Answer::Later | Answer::Stop) => response::Result::Ok(WireOk::default()),
            Ok(Answer::Saved(report)) => response::Result::Ok(WireOk {
                saved: Some(saved(&report)),
            }),
            Ok(Answer::State(phase, counters, about)) => {
                let (memory, machine) = about.map(|about| (about.memory, about.machine)).unzip();
                response::Result::State(State {
                    memory,
                    machine,
                    ..self.state(phase, counters)
                })
            }
            Err(Failure { code, message }) => response::Result::Error(WireError {
                code: code.into(),
                message,
            }),
        };
        self.send(
            from_vmm::Message::Response(Response {
                id,
                result: Some(result),
            }),
            &[],
        );
        if stop {
            self.exit.set(Exit::new(ExitReason::Stopped, "Stop was asked for"));
        }
    }

    fn state(&self, phase: state::Phase, counters: Vec<(String, u64)>) -> State {
        let uptime_us = u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX);
        State {
            phase: phase.into(),
            uptime_us,
            counters: counters.into_iter().collect(),
            memory: None,
            machine: None,
        }
    }

    /// Sends what the guest dialled, as long as there is somebody to send it to.
    fn forward_dials(&mut self) {
        self.dials.clear();
        while self.connection.is_some() {
            let Some(dialled) = self.dials.next() else { return };
            let event = Event {
                event: Some(event::Event::Dial(Dial { port: dialled.port })),
            };
            self.send(from_vmm::Message::Event(event), &[dialled.stream.as_fd()]);
        }
    }

    fn send(&mut self, message: from_vmm::Message, fds: &[BorrowedFd<'_>]) {
        let Some(connection) = &self.connection else { return };
        let bytes = FromVmm { message: Some(message) }.encode_to_vec();
        if packet::send(connection.as_fd(), &bytes, fds).is_err() {
            self.connection = None;
        }
    }
}

/// Gives back what loading took of the heap: each vCPU's state, decoded, is some 20 KiB.
fn trim_heap() {
    // SAFETY: it takes a number, and may be called at any time (malloc_trim(3)).
    unsafe { libc::malloc_trim(0) };
}

fn saved(report: &Report) -> Saved {
    let paused = report.paused.unwrap_or_default().as_micros();
    Saved {
        id: report.id.to_vec(),
        paused_us: u64::try_from(paused).unwrap_or(u64::MAX),
        written_bytes: report.written,
        written_paused_bytes: report.written_paused,
        rounds: report.rounds,
    }
}
