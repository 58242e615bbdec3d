//! The thread of a vCPU.
//!
//! ```text
//!            Run                            exits: port and MMIO accesses -> buses
//! [waiting] ------------> [running KVM_RUN] ----+
//!     ^                        |  ^             |
//!     |   Pause (signal)       |  +-------------+
//!     +------------------------+
//! ```
//!
//! A command to a running vCPU is put into its inbox, then a signal takes it out of KVM_RUN. The signal's handler sets
//! `immediate_exit` in the vCPU's shared page, so a signal that comes just before KVM_RUN is not lost (KVM API, 5).

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use flint_api::vmm::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::state::{VcpuState, VcpuTime};
use super::{Error, prefault, registers, state};
use crate::boot::Entry;
use crate::bus::Bus;
use crate::control::commands;
use crate::exit::{Exit, ExitLatch, LOST};
use crate::machine::Start;
use crate::memory::Range;

/// Enough for the deepest call below a device's registers; guest code does not run on it.
const STACK_BYTES: usize = 256 << 10;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// What a vCPU needs from its machine.
#[derive(Clone)]
pub struct Context {
    /// Port bus.
    pub ports: Arc<Bus>,
    /// MMIO bus.
    pub mmio: Arc<Bus>,
    /// Where the end of the sandbox is told.
    pub exit: ExitLatch,
}

type Reply<T> = Sender<Result<T, Error>>;

enum Command {
    /// Comes first, and once.
    Adopt(VcpuFd, Warmth),
    Enter(Entry, Reply<()>),
    Run,
    Claim(VcpuTime),
    Join,
    Pause(Sender<()>),
    Save(Vec<u32>, Reply<Box<VcpuState>>),
    RestoreTime(VcpuTime, Reply<()>),
    Prefault(Vec<Range>, Sender<()>),
}

/// Whether a vCPU that its thread has just got is to be made ready to run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Warmth {
    /// It has no state yet that could run.
    Cold,
    /// KVM_RUN is entered and left before the guest's first instruction: what KVM makes at a vCPU's first run is made now.
    Warm,
}

/// A vCPU in its thread.
pub struct Vcpu {
    id: u8,
    /// It may not run, even to wait for its guest's start signal. The machine's control thread alone looks at this.
    held: AtomicBool,
    /// The vCPU, as long as it is to be given a saved state, which its own thread may not.
    unloaded: Mutex<Option<VcpuFd>>,
    inbox: Sender<Command>,
    thread: JoinHandle<()>,
}

/// Makes the kick signal do its work. Once for the process, before any vCPU runs.
///
/// # Errors
/// The signal cannot be used.
pub fn install_kick() -> io::Result<()> {
    extern "C" fn kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let flag = IMMEDIATE_EXIT.get();
        if !flag.is_null() {
            // SAFETY: the pointer is into the page that the vCPU of this very thread shares with KVM; it is set and cleared by
            // this thread while that page is mapped.
            unsafe { ptr::write_volatile(flag, 1) };
        }
    }
    register_signal_handler(SIGRTMIN(), kick).map_err(Into::into)
}

impl Vcpu {
    /// Starts the thread of a vCPU, which then waits. `confine` runs first in it and puts the system call filter on. A vCPU that
    /// is to be given a saved state first does not get to its thread before [`Self::hand_over`].
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn spawn(
        id: u8,
        fd: VcpuFd,
        start: Start,
        context: Context,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (inbox, commands) = channel();
        let (ready, confined) = channel();
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let outcome = confine();
                let failed = outcome.is_err();
                // Whoever waits for this waits until it is sent.
                let _ = ready.send(outcome);
                if !failed {
                    let guard = PanicGuard(context.exit.clone(), id);
                    if let Some(runner) = Runner::wait(id, context, commands) {
                        runner.serve();
                    }
                    drop(guard);
                }
            })?;
        confined
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the vCPU's thread ended before it began")))?;
        let vcpu = Self {
            id,
            held: AtomicBool::new(false),
            unloaded: Mutex::new(Some(fd)),
            inbox,
            thread,
        };
        if start == Start::Boot {
            // A thread that has ended already is found gone by whoever wants something of it.
            let _ = vcpu.adopted(Warmth::Cold);
        }
        Ok(vcpu)
    }

    /// Puts the vCPU to a kernel's entry.
    ///
    /// # Errors
    /// KVM refuses, or the thread is gone.
    pub fn enter(&self, entry: Entry) -> Result<(), Error> {
        self.ask(|reply| Command::Enter(entry, reply))?.wait()?
    }

    /// Lets it run, unless it is held.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn run(&self) -> Result<(), Error> {
        if self.is_held() {
            return Ok(());
        }
        self.inbox.send(Command::Run).map_err(|_| self.gone())
    }

    /// Keeps it from running, or no longer, from the next time on that it would begin to.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
    }

    /// Whether it is kept from running.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Lets a vCPU that was held run beside those that do already, with their time. A KVM that refuses that ends the sandbox.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn join(&self) -> Result<(), Error> {
        self.inbox.send(Command::Join).map_err(|_| self.gone())?;
        self.hold(false);
        Ok(())
    }

    /// Lets a restored vCPU run, its time going on where it stood. A KVM that refuses that ends the sandbox.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn claim(&self, time: VcpuTime) -> Result<(), Error> {
        self.inbox.send(Command::Claim(time)).map_err(|_| self.gone())
    }

    /// Takes it out of the guest; returns when it is out.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn pause(&self) -> Result<(), Error> {
        let answer = self.ask(Command::Pause)?;
        // SAFETY: the handle is not joined, so the thread's id is valid even if it has ended.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), SIGRTMIN()) };
        answer.wait()
    }

    /// Saves it; it must not run.
    ///
    /// # Errors
    /// KVM refuses, or the thread is gone.
    pub fn save(&self, msrs: &[u32]) -> Result<Box<VcpuState>, Error> {
        if let Some(fd) = &*self.unloaded() {
            return state::save(fd, msrs)
                .map(Box::new)
                .map_err(|failure| self.error(failure));
        }
        self.ask(|reply| Command::Save(msrs.to_vec(), reply))?.wait()?
    }

    /// Gives it a saved state, but for its time, and the pace of its time stamp counter if it is another than the host's. Before
    /// it is handed over to its thread.
    ///
    /// # Errors
    /// KVM refuses, or it was handed over.
    pub fn restore(&self, state: &VcpuState, khz: Option<u32>) -> Result<(), Error> {
        match &*self.unloaded() {
            Some(fd) => state::restore(fd, state, khz).map_err(|failure| self.error(failure)),
            None => Err(self.error(("restoring it: its thread has it", kvm_ioctls::Error::new(libc::EBUSY)))),
        }
    }

    /// Gives a vCPU that was restored to its thread, which makes it ready to run. Once.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn hand_over(&self) -> Result<(), Error> {
        self.adopted(Warmth::Warm)
    }

    fn adopted(&self, warmth: Warmth) -> Result<(), Error> {
        let Some(fd) = self.unloaded().take() else {
            return Ok(());
        };
        let sent = self.inbox.send(Command::Adopt(fd, warmth));
        sent.map_err(|_| self.gone())
    }

    fn unloaded(&self) -> MutexGuard<'_, Option<VcpuFd>> {
        // There is a vCPU in it or there is none, whoever panicked.
        self.unloaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets its time; it must not run.
    ///
    /// # Errors
    /// The thread is gone; the answer tells what KVM refused.
    pub fn restore_time(&self, time: VcpuTime) -> Result<Answer<'_, Result<(), Error>>, Error> {
        self.ask(|reply| Command::RestoreTime(time, reply))
    }

    /// Has KVM map guest memory before the guest asks for it, as far as it can; the vCPU must not run.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn prefault(&self, ranges: Vec<Range>) -> Result<Answer<'_, ()>, Error> {
        self.ask(|reply| Command::Prefault(ranges, reply))
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<Answer<'_, T>, Error> {
        let (reply, answer) = channel();
        self.inbox.send(command(reply)).map_err(|_| self.gone())?;
        Ok(Answer { vcpu: self, answer })
    }

    fn gone(&self) -> Error {
        self.error(("its thread has ended", kvm_ioctls::Error::new(libc::ESRCH)))
    }

    fn error(&self, (what, source): state::Failure) -> Error {
        let vcpu = self.id;
        Error { vcpu, what, source }
    }
}

/// What a vCPU was asked for: several can work at it at once.
#[must_use]
pub struct Answer<'a, T> {
    vcpu: &'a Vcpu,
    answer: Receiver<T>,
}

impl<T> Answer<'_, T> {
    /// Waits for it.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn wait(self) -> Result<T, Error> {
        self.answer.recv().map_err(|_| self.vcpu.gone())
    }
}

/// Ends the sandbox if a vCPU's thread panics.
struct PanicGuard(ExitLatch, u8);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.set(Exit::new(
                ExitReason::VmmError,
                format!("the thread of vCPU {} panicked", self.1),
            ));
        }
    }
}

enum Next {
    Run,
    Wait,
    End,
}

struct Runner {
    id: u8,
    fd: VcpuFd,
    context: Context,
    commands: Receiver<Command>,
}

impl Runner {
    /// Waits for the vCPU.
    fn wait(id: u8, context: Context, commands: Receiver<Command>) -> Option<Self> {
        let Ok(Command::Adopt(fd, warmth)) = commands.recv() else {
            return None;
        };
        let mut runner = Self {
            id,
            fd,
            context,
            commands,
        };
        if warmth == Warmth::Warm {
            runner.warm_up();
        }
        Some(runner)
    }

    fn serve(mut self) {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        while let Ok(command) = self.commands.recv() {
            let next = match self.obey(command) {
                Next::Run => self.run(),
                other => other,
            };
            if matches!(next, Next::End) {
                break;
            }
        }
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }

    fn obey(&mut self, command: Command) -> Next {
        // Whoever asked may have stopped waiting: answers are sent without looking.
        match command {
            Command::Run => return Next::Run,
            Command::Claim(time) => return self.run_if(state::restore_time(&self.fd, time)),
            Command::Join => return self.run_if(state::join_time(&self.fd)),
            Command::Pause(reply) => drop(reply.send(())),
            Command::Enter(entry, reply) => drop(reply.send(self.told(registers::set_entry(&self.fd, entry)))),
            Command::Save(msrs, reply) => drop(reply.send(self.told(state::save(&self.fd, &msrs).map(Box::new)))),
            Command::RestoreTime(time, reply) => drop(reply.send(self.told(state::restore_time(&self.fd, time)))),
            Command::Prefault(ranges, reply) => {
                prefault::map(&self.fd, &ranges);
                let _ = reply.send(());
            }
            // It is here.
            Command::Adopt(..) => {}
        }
        Next::Wait
    }

    fn run_if(&self, ready: Result<(), state::Failure>) -> Next {
        match ready {
            Ok(()) => Next::Run,
            Err(failure) => {
                let detail = commands::chain(&self.error(failure));
                self.context.exit.set(Exit::new(ExitReason::KvmError, detail));
                Next::Wait
            }
        }
    }

    fn warm_up(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // EINTR, as was asked for; whatever else there is comes again when it is to run.
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn told<T>(&self, outcome: Result<T, state::Failure>) -> Result<T, Error> {
        outcome.map_err(|failure| self.error(failure))
    }

    fn error(&self, (what, source): state::Failure) -> Error {
        Error {
            vcpu: self.id,
            what,
            source,
        }
    }

    /// Runs the guest until somebody wants something else.
    fn run(&mut self) -> Next {
        loop {
            // Cleared before the inbox is looked at: a command that comes later brings a signal that sets it again.
            self.fd.set_kvm_immediate_exit(0);
            match self.commands.try_recv() {
                Ok(command) => match self.obey(command) {
                    Next::Run => {}
                    other => return other,
                },
                Err(TryRecvError::Disconnected) => return Next::End,
                Err(TryRecvError::Empty) => {}
            }
            while let Step::Guest = self.step() {}
            if self.context.exit.get().is_some() {
                return Next::Wait;
            }
        }
    }

    /// Enters the guest once and does what it came out for.
    fn step(&mut self) -> Step {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                for byte in data {
                    self.context.ports.read(port.into(), std::slice::from_mut(byte));
                }
                return Step::Guest;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                // All registers on the port bus are a byte wide; KVM hands a string instruction over as one run of bytes.
                for byte in data {
                    self.context.ports.write(port.into(), std::slice::from_ref(byte));
                }
                return if self.context.exit.get().is_some() {
                    Step::Look
                } else {
                    Step::Guest
                };
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.context.mmio.read(address, data);
                return Step::Guest;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.context.mmio.write(address, data);
                return Step::Guest;
            }
            Ok(VcpuExit::Intr) => return Step::Look,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Step::Look,
            Ok(VcpuExit::Shutdown) => Exit::new(ExitReason::TripleFault, format!("triple fault on vCPU {}", self.id)),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::new(
                ExitReason::KvmError,
                format!(
                    "vCPU {}: the processor refused the guest's state: reason {reason:#x} on host CPU {cpu}",
                    self.id
                ),
            ),
            Ok(VcpuExit::InternalError) => Exit::new(ExitReason::KvmError, self.internal_error()),
            Ok(other) => Exit::new(
                ExitReason::KvmError,
                format!("vCPU {}: unexpected exit {other:?}", self.id),
            ),
            Err(error) if error.errno() == libc::EFAULT => {
                Exit::new(ExitReason::MemoryLost, format!("vCPU {}: KVM_RUN: {LOST}", self.id))
            }
            Err(error) => Exit::new(ExitReason::KvmError, format!("vCPU {}: KVM_RUN: {error}", self.id)),
        };
        self.context.exit.set(exit);
        Step::Look
    }

    fn internal_error(&mut self) -> String {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: KVM has just left with KVM_EXIT_INTERNAL_ERROR, for which this member of the union is valid.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        format!("vCPU {}: KVM internal error {suberror} at {rip:#x}", self.id)
    }
}

enum Step {
    /// Back into the guest.
    Guest,
    /// Look at the inbox and the latch first.
    Look,
}
