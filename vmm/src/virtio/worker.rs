//! The thread of a device, and the handle by which the others reach it.
//!
//! Every device has a plain thread of its own, which waits on one epoll for queue notifications, commands, and what the device
//! watches itself. The device lies under a lock that the thread takes once for each event. Others take it for what needs none
//! of the thread's system calls: to bind, save and load a device, and to let a loaded one begin that has nothing to do. That
//! is the way of a claim, on which waking a dozen threads would cost more than all else.
//!
//! System calls that every device thread makes, whatever its kind: `epoll_wait`, `epoll_ctl`, `read` and `write`
//! (eventfds), `futex`, `clock_gettime`, `mmap`, `munmap`, `mprotect`, `madvise`, `mremap`, `brk` (the allocator), `close`,
//! `sched_yield`, `rt_sigreturn`, and at its end `sigaltstack`, `rt_sigprocmask`, `exit`. What a kind needs beyond these is
//! told in its module.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::core::{Core, clear, raise};
use super::device::{Activation, Device, DeviceError};
use crate::memory::GuestMemory;

/// Which system call filter a device's thread gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// virtio-block.
    Block,
    /// virtio-net.
    Net,
    /// virtio-vsock.
    Vsock,
    /// virtio-rng.
    Rng,
    /// virtio-balloon.
    Balloon,
    /// virtio-mem.
    Mem,
}

/// Called first in a new device thread: it puts the system call filter on.
pub type ThreadHook = Arc<dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync>;

/// Enough for the deepest call of any device with room to spare; buffers are on the heap.
const STACK_BYTES: usize = 128 << 10;

/// Tokens from here on are the device's own; below are the queues by index.
pub(crate) const DEVICE_TOKENS: u64 = 1 << 16;
const COMMAND_TOKEN: u64 = u64::MAX;

type Reply<T> = Sender<Result<T, DeviceError>>;

enum Command {
    Activate(Activation, Reply<()>),
    Reset(Reply<()>),
    Pause(Reply<()>),
    Resume(Reply<()>),
    Begin,
    Stop,
}

/// A device and whether it may do anything.
struct Desk<D> {
    device: D,
    paused: bool,
}

type Shared<D> = Arc<Mutex<Desk<D>>>;

/// A device whose thread panicked is gone: nobody knows in which state it is.
fn open<D>(desk: &Mutex<Desk<D>>) -> Result<MutexGuard<'_, Desk<D>>, DeviceError> {
    desk.lock().map_err(|_| DeviceError::Gone)
}

/// What the transport needs of a device's thread.
pub trait DeviceControl: Send + Sync {
    /// The driver said DRIVER_OK.
    ///
    /// # Errors
    /// When what it set up cannot be used.
    fn activate(&self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops the device and forgets its driver. After this, nothing of the device touches guest memory.
    ///
    /// # Errors
    /// When the device's thread has ended.
    fn reset(&self) -> Result<(), DeviceError>;
}

/// A device in its thread. Dropping the handle stops the thread and waits for it.
pub struct DeviceHandle<D: Device> {
    desk: Shared<D>,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl<D: Device> DeviceHandle<D> {
    /// Starts a device's thread. `hook` runs first in it; this returns when that has succeeded.
    ///
    /// # Errors
    /// When the thread cannot be started or the hook fails.
    pub fn start(name: &str, device: D, hook: ThreadHook) -> io::Result<Self> {
        let core = device.core().clone();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        core.watch(wake.as_raw_fd(), EventSet::IN, COMMAND_TOKEN)?;
        for (token, notify) in (0..).zip(core.notify()) {
            core.watch(notify.as_raw_fd(), EventSet::IN, token)?;
        }
        let (commands, inbox) = mpsc::channel();
        let (ready, hooked) = mpsc::channel();
        let desk = Arc::new(Mutex::new(Desk { device, paused: false }));
        let mut worker = Worker {
            desk: desk.clone(),
            inbox,
            wake: wake.clone(),
            core: core.clone(),
            stopped: false,
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let outcome = hook(D::KIND);
                let failed = outcome.is_err();
                // The one who waits for this may have gone; then the inbox is closed too and the loop ends at once.
                let _ = ready.send(outcome);
                if !failed {
                    worker.run();
                }
            })?;
        // A hook that panics drops its sender.
        hooked
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("device thread ended before it began")))?;
        Ok(Self {
            desk,
            commands,
            wake,
            core,
            thread: Some(thread),
        })
    }

    /// The part that is shared with the device.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Puts something behind the slot; a running driver is told.
    ///
    /// # Errors
    /// When it does not fit, or there is something already.
    pub fn bind(&self, resource: D::Resource) -> Result<(), DeviceError> {
        open(&self.desk)?.device.bind(resource)
    }

    /// Does something to the device, beside its thread.
    ///
    /// # Errors
    /// As that says; when the device's thread has ended.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut D) -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        act(&mut open(&self.desk)?.device)
    }

    /// Waits for what is in flight, then leaves guest memory and the outside world alone until [`Self::resume`].
    ///
    /// # Errors
    /// When the host fails.
    pub fn pause(&self) -> Result<(), DeviceError> {
        self.ask(Command::Pause)
    }

    /// Goes on after [`Self::pause`].
    ///
    /// # Errors
    /// When the device cannot go on.
    pub fn resume(&self) -> Result<(), DeviceError> {
        self.ask(Command::Resume)
    }

    /// Lets a loaded device go on that has nothing to do until its driver or somebody outside says something. False: it has,
    /// and waits for [`Self::begin`].
    ///
    /// # Errors
    /// When the device's thread has ended.
    pub fn begin_idle(&self) -> Result<bool, DeviceError> {
        let mut desk = open(&self.desk)?;
        let idle = !desk.device.has_work();
        if idle {
            desk.paused = false;
        }
        Ok(idle)
    }

    /// As [`Self::resume`], without waiting for it: a device that cannot go on asks its driver for a reset, as it does at any
    /// other time.
    ///
    /// # Errors
    /// When the device's thread has ended.
    pub fn begin(&self) -> Result<(), DeviceError> {
        self.commands.send(Command::Begin).map_err(|_| DeviceError::Gone)?;
        raise(&self.wake);
        Ok(())
    }

    /// Saves the device, which must be paused.
    ///
    /// # Errors
    /// When it is not.
    pub fn save(&self) -> Result<D::State, DeviceError> {
        let desk = open(&self.desk)?;
        if desk.paused {
            Ok(desk.device.save())
        } else {
            Err(DeviceError::State(
                "the device must be paused before it is saved".to_owned(),
            ))
        }
    }

    /// Gives the device a saved state and leaves it paused.
    ///
    /// # Errors
    /// When the state does not fit the device.
    pub fn restore(&self, state: D::State, memory: GuestMemory) -> Result<(), DeviceError> {
        let mut desk = open(&self.desk)?;
        desk.paused = true;
        desk.device.restore(state, memory)
    }

    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, DeviceError> {
        let (reply, answer) = mpsc::channel();
        self.commands.send(command(reply)).map_err(|_| DeviceError::Gone)?;
        raise(&self.wake);
        answer.recv().map_err(|_| DeviceError::Gone)?
    }
}

impl<D: Device> DeviceControl for DeviceHandle<D> {
    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        self.ask(|reply| Command::Activate(activation, reply))
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.ask(Command::Reset)
    }
}

impl<D: Device> Drop for DeviceHandle<D> {
    fn drop(&mut self) {
        // A thread that has ended already has closed its inbox.
        let _ = self.commands.send(Command::Stop);
        raise(&self.wake);
        if let Some(thread) = self.thread.take() {
            // It panicked: that was reported by its panic hook.
            let _ = thread.join();
        }
    }
}

struct Worker<D: Device> {
    desk: Shared<D>,
    inbox: Receiver<Command>,
    wake: Arc<EventFd>,
    core: Arc<Core>,
    stopped: bool,
}

impl<D: Device> Worker<D> {
    fn run(&mut self) {
        let desk = self.desk.clone();
        let mut events = [EpollEvent::default(); 16];
        while !self.stopped {
            let waited = self.core.epoll().wait(-1, &mut events);
            // Who panics while he holds the lock ends the device.
            let Ok(mut desk) = desk.lock() else { return };
            let count = match waited {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return self.fail(&mut desk, "epoll_failed"),
            };
            for event in &events[..count] {
                self.dispatch(&mut desk, event.data(), event.event_set());
            }
            if self.stopped {
                desk.device.reset();
            }
        }
    }

    fn dispatch(&mut self, desk: &mut Desk<D>, token: u64, events: EventSet) {
        let outcome = match token {
            COMMAND_TOKEN => {
                clear(&self.wake);
                return self.commands(desk);
            }
            // A driver that has to reset its device gets nothing done before; a paused device keeps still. Level-triggered
            // sources of the device itself are taken out of the epoll by `quiesce`.
            _ if desk.paused || self.core.needs_reset() => {
                self.silence(token);
                return;
            }
            _ if token < DEVICE_TOKENS => self.queue_event(&mut desk.device, token),
            _ => desk.device.device_event(token, events),
        };
        if outcome.is_err() {
            self.fail(desk, "guest_error");
        }
    }

    fn silence(&self, token: u64) {
        if let Some(notify) = usize::try_from(token)
            .ok()
            .and_then(|index| self.core.notify().get(index))
        {
            clear(notify);
        }
    }

    fn queue_event(&self, device: &mut D, token: u64) -> Result<(), DeviceError> {
        let Ok(index) = usize::try_from(token) else {
            return Ok(());
        };
        let Some(notify) = self.core.notify().get(index) else {
            return Ok(());
        };
        clear(notify);
        device.queue_event(index)
    }

    /// The device cannot go on: it lets go of guest memory and asks for a reset.
    fn fail(&self, desk: &mut Desk<D>, counter: &'static str) {
        self.core.counters.bump(counter);
        desk.device.reset();
        self.core.demand_reset();
    }

    fn commands(&mut self, desk: &mut Desk<D>) {
        while let Ok(command) = self.inbox.try_recv() {
            // Whoever asked may have stopped waiting: answers are sent without looking.
            match command {
                Command::Activate(activation, reply) => {
                    let outcome = desk.device.activate(activation);
                    let _ = reply.send(outcome);
                }
                Command::Reset(reply) => {
                    desk.device.reset();
                    self.core.reset();
                    let _ = reply.send(Ok(()));
                }
                Command::Pause(reply) => {
                    desk.paused = true;
                    let _ = reply.send(desk.device.quiesce());
                }
                Command::Resume(reply) => {
                    desk.paused = false;
                    let _ = reply.send(desk.device.resume());
                }
                Command::Begin => {
                    desk.paused = false;
                    if desk.device.resume().is_err() {
                        self.fail(desk, "guest_error");
                    }
                }
                Command::Stop => self.stopped = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rate_limit::RateLimit;
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::{TestQueue, WRITE, activation, memory};

    fn wait_readable(fd: i32) {
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, -1) }, 1);
    }

    #[test]
    fn a_thread_serves_a_driver_until_it_is_reset_and_refuses_a_broken_ring() {
        let memory = memory();
        let mut queue = TestQueue::new(&memory, 0x1000, 16);
        let hook: ThreadHook = Arc::new(|kind| {
            assert_eq!(kind, ThreadKind::Rng);
            Ok(())
        });
        let handle = DeviceHandle::start("rng", Rng::new(RateLimit::default()).unwrap(), hook).unwrap();
        let core = handle.core().clone();
        core.driver_ready();
        handle.activate(activation(&memory, 0, &[&queue])).unwrap();
        queue.add(&[(0x10000, 16, WRITE)]);
        raise(&core.notify()[0]);
        wait_readable(core.interrupt.irq().as_raw_fd());
        assert_eq!(queue.used(), [(0, 16)]);
        assert!(handle.save().is_err(), "saved while it runs");
        handle.pause().unwrap();
        assert!(handle.save().unwrap().guest.is_some());
        handle.resume().unwrap();

        clear(core.interrupt.irq());
        queue.set_available(100);
        raise(&core.notify()[0]);
        wait_readable(core.interrupt.irq().as_raw_fd());
        assert!(core.needs_reset());
        handle.reset().unwrap();
        assert!(!core.needs_reset());
    }

    #[test]
    fn a_hook_that_fails_keeps_the_device_from_starting() {
        let hook: ThreadHook = Arc::new(|_| Err(io::ErrorKind::PermissionDenied.into()));
        assert!(DeviceHandle::start("rng", Rng::new(RateLimit::default()).unwrap(), hook).is_err());
    }
}
