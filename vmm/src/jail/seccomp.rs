//! The system calls that each kind of thread may make. Any other one kills the process with SIGSYS.
//!
//! ```text
//! main thread:  Setup -- CreateMachine, ReserveMachine --> Control       filters only ever narrow
//!                 |  starts                                            (a thread inherits its maker's)
//!                 +--> vCPU threads: Vcpu
//!                 +--> device threads: Device(kind)
//!                 +--> of a machine that is reserved: Loader, which ends when that is loaded; if it is paged, Watcher
//!
//! a page server's one thread: PageServer
//! ```

use std::io;

use libc::c_long;
use seccompiler::BpfProgram;

use super::filter::{self, Rules};
use crate::virtio::ThreadKind;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The main thread until there is a machine: all that the others may, and making threads and a VM.
    Setup,
    /// The main thread from then on.
    Control,
    /// That which loads a snapshot.
    Loader,
    /// A vCPU's.
    Vcpu,
    /// That which listens to the page server.
    Watcher,
    /// A device's.
    Device(ThreadKind),
    /// That of a page server, another program.
    PageServer,
}

impl Kind {
    /// All kinds of a VMM's threads.
    pub const ALL: [Self; 11] = [
        Self::Setup,
        Self::Control,
        Self::Loader,
        Self::Vcpu,
        Self::Watcher,
        Self::Device(ThreadKind::Block),
        Self::Device(ThreadKind::Net),
        Self::Device(ThreadKind::Vsock),
        Self::Device(ThreadKind::Rng),
        Self::Device(ThreadKind::Balloon),
        Self::Device(ThreadKind::Mem),
    ];
}

/// Every thread: memory, locks, eventfds, its end, a panic's message.
const COMMON: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime, // where the vDSO cannot tell the time
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getrandom, // seeds of hash maps
    libc::SYS_gettid,    // named by a panic's message
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield, // channels that wait for a sender in the middle of its work
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Threads that wait for events: all but the vCPUs'.
const EVENTS: &[c_long] = &[libc::SYS_epoll_ctl, libc::SYS_epoll_wait];

/// The control thread: packets, kicks, and what a disk, tap or socket needs to be looked at and made ready.
const CONTROL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_fallocate, // a snapshot's files
    libc::SYS_fcntl,     // F_GETFL and F_SETFL of what is bound
    libc::SYS_ftruncate, // a snapshot's files
    libc::SYS_getpid,    // a part of pthread_kill
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_lseek,
    libc::SYS_pread64,  // an image's device table, a snapshot's files
    libc::SYS_pwrite64, // a snapshot's files
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_timerfd_create,
];

/// Making threads and confining them, and the eventfds and epolls of devices.
const SETUP: &[c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_uname, // a snapshot's passport
];

/// The loader: a snapshot's files, what devices do as they are loaded, and the introduction to a page server.
const LOADING: &[c_long] = &[
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_statx,
    libc::SYS_timerfd_settime,
];

const BLOCK: &[c_long] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_pread64, // packs of an image
    libc::SYS_recvmsg, // the chunk server, on a socket that is there already
    libc::SYS_sendmsg,
    libc::SYS_timerfd_settime,
];
const NET: &[c_long] = &[libc::SYS_timerfd_settime];
const VSOCK: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom, // the line that names a port
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_socketpair, // a stream that the guest opens
];
const RNG: &[c_long] = &[libc::SYS_timerfd_settime];

/// Request numbers of KVM's ioctls without size and direction (linux/kvm.h): those of the making of a machine.
const KVM_SETUP: &[u32] = &[
    0xae01, // KVM_CREATE_VM
    0xae02, // KVM_GET_MSR_INDEX_LIST
    0xae03, // KVM_CHECK_EXTENSION
    0xae04, // KVM_GET_VCPU_MMAP_SIZE
    0xae05, // KVM_GET_SUPPORTED_CPUID
    0xae41, // KVM_CREATE_VCPU
    0xae46, // KVM_SET_USER_MEMORY_REGION
    0xae47, // KVM_SET_TSS_ADDR
    0xae48, // KVM_SET_IDENTITY_MAP_ADDR
    0xae60, // KVM_CREATE_IRQCHIP
    0xae62, // KVM_GET_IRQCHIP
    0xae63, // KVM_SET_IRQCHIP
    0xae76, // KVM_IRQFD
    0xae79, // KVM_IOEVENTFD
    0xae8c, // KVM_GET_FPU
    0xae8d, // KVM_SET_FPU
    0xae8f, // KVM_SET_LAPIC
    0xae90, // KVM_SET_CPUID2
    0xaea3, // KVM_GET_TSC_KHZ
];

/// Those of a vCPU that runs, enters a kernel, or is saved.
const KVM_VCPU: &[u32] = &[
    0xae80, // KVM_RUN
    0xae81, // KVM_GET_REGS
    0xae82, // KVM_SET_REGS
    0xae83, // KVM_GET_SREGS
    0xae84, // KVM_SET_SREGS
    0xae88, // KVM_GET_MSRS
    0xae89, // KVM_SET_MSRS
    0xae8e, // KVM_GET_LAPIC
    0xae91, // KVM_GET_CPUID2
    0xae98, // KVM_GET_MP_STATE
    0xae9f, // KVM_GET_VCPU_EVENTS
    0xaea1, // KVM_GET_DEBUGREGS
    0xaea4, // KVM_GET_XSAVE
    0xaea6, // KVM_GET_XCRS
    0xaed5, // KVM_PRE_FAULT_MEMORY
];

/// Those that give a vCPU a saved state.
const KVM_VCPU_LOAD: &[u32] = &[
    0xae82, // KVM_SET_REGS
    0xae84, // KVM_SET_SREGS
    0xae89, // KVM_SET_MSRS
    0xae8f, // KVM_SET_LAPIC
    0xae90, // KVM_SET_CPUID2
    0xae91, // KVM_GET_CPUID2
    0xae99, // KVM_SET_MP_STATE
    0xaea0, // KVM_SET_VCPU_EVENTS
    0xaea2, // KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ
    0xaea5, // KVM_SET_XSAVE
    0xaea7, // KVM_SET_XCRS
    0xaead, // KVM_KVMCLOCK_CTRL
];

/// Those of a whole machine that is saved or claimed.
const KVM_SAVE: &[u32] = &[
    0xae42, // KVM_GET_DIRTY_LOG
    0xae46, // KVM_SET_USER_MEMORY_REGION: turns the dirty log on and off
    0xae62, // KVM_GET_IRQCHIP
    0xae7b, // KVM_SET_CLOCK
    0xae7c, // KVM_GET_CLOCK
];

/// Those of a whole machine that is given a saved state.
const KVM_LOAD: &[u32] = &[
    0xae63, // KVM_SET_IRQCHIP
];

/// What the control thread asks of disks and taps: BLKGETSIZE64, BLKSSZGET, TUNGETIFF, TUNGETFEATURES, TUNSETOFFLOAD,
/// TUNSETVNETHDRSZ, FIONBIO.
const BINDING: &[u32] = &[0x1272, 0x1268, 0x54d2, 0x54cf, 0x54d0, 0x54d8, 0x5421];

/// Hearing of faults in guest memory: USERFAULTFD_IOC_NEW and UFFDIO_REGISTER, which have the same number, and UFFDIO_API.
const PAGING: &[u32] = &[0xaa00, 0xaa3f];

/// UFFDIO_UNREGISTER.
const UNPAGING: &[u32] = &[0xaa01];

/// Waiting for the page server.
const POLL: &[c_long] = &[libc::SYS_poll];

/// TUNSETOFFLOAD.
const OFFLOADING: &[u32] = &[0x54d0];

/// The page server: sandboxes that come and go, chunks in packs, the memory file.
const PAGE_SERVER: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_lseek, // whether a page has anything in it
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_statx,
];

/// Commands of fcntl: it seals the memory file, and sees to it that no descriptor has it wait. F_ADD_SEALS is linux/fcntl.h's.
const PAGE_SERVER_FCNTL: &[i32] = &[libc::F_GETFL, libc::F_SETFL, libc::F_ADD_SEALS];

/// UFFDIO_WAKE and UFFDIO_ZEROPAGE: of other processes' faults.
const ANSWERING: &[u32] = &[0xaa02, 0xaa04];

/// FIONBIO.
const NONBLOCKING: &[u32] = &[0x5421];

/// All filters, built once.
pub struct Filters([(Kind, BpfProgram); Kind::ALL.len()]);

impl Default for Filters {
    fn default() -> Self {
        Self(Kind::ALL.map(|kind| (kind, filter::program(&rules(kind)))))
    }
}

impl Filters {
    /// Puts a filter on the calling thread, on top of those that it has.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn apply(&self, kind: Kind) -> io::Result<()> {
        self.0
            .iter()
            .filter(|(other, _)| *other == kind)
            .try_for_each(|(_, program)| seccompiler::apply_filter(program).map_err(io::Error::other))
    }
}

/// Confines the calling thread, the only one of a page server.
///
/// # Errors
/// The kernel refuses.
pub fn confine_page_server() -> io::Result<()> {
    seccompiler::apply_filter(&filter::program(&rules(Kind::PageServer))).map_err(io::Error::other)
}

pub(super) fn rules(kind: Kind) -> Rules {
    let mut rules = Rules::default();
    add(&mut rules, kind);
    rules
}

fn add(rules: &mut Rules, kind: Kind) {
    rules.allow(COMMON);
    no_code(rules);
    // Debug builds of the standard library look whether a descriptor is open before they close it.
    rules.allow_with(libc::SYS_fcntl, 1, u32::MAX, &[libc::F_GETFD.cast_unsigned()]);
    match kind {
        Kind::Setup => {
            rules.allow(SETUP);
            ioctls(rules, KVM_SETUP);
            for kind in &Kind::ALL[1..] {
                add(rules, *kind);
            }
        }
        Kind::Loader => {
            rules.allow(LOADING);
            // The serial line's interrupt and the userfaultfd device are shared with what is loaded.
            rules.allow_with(libc::SYS_fcntl, 1, u32::MAX, &[libc::F_DUPFD_CLOEXEC.cast_unsigned()]);
            ioctls(rules, KVM_LOAD);
            ioctls(rules, KVM_VCPU_LOAD);
            ioctls(rules, PAGING);
            ioctls(rules, UNPAGING);
        }
        Kind::Control => {
            rules.allow(EVENTS);
            rules.allow(CONTROL);
            ioctls(rules, BINDING);
            ioctls(rules, KVM_SAVE);
        }
        Kind::Vcpu => ioctls(rules, KVM_VCPU),
        Kind::Watcher => {
            rules.allow(POLL);
            rules.allow(&[libc::SYS_recvmsg]);
            ioctls(rules, UNPAGING);
        }
        Kind::Device(ThreadKind::Block) => {
            rules.allow(EVENTS);
            rules.allow(BLOCK);
        }
        Kind::Device(ThreadKind::Net) => {
            rules.allow(EVENTS);
            rules.allow(NET);
            ioctls(rules, OFFLOADING);
        }
        Kind::Device(ThreadKind::Vsock) => {
            rules.allow(EVENTS);
            rules.allow(VSOCK);
            ioctls(rules, NONBLOCKING);
        }
        Kind::Device(ThreadKind::Rng) => {
            rules.allow(EVENTS);
            rules.allow(RNG);
        }
        // Giving memory back is in COMMON.
        Kind::Device(ThreadKind::Balloon | ThreadKind::Mem) => rules.allow(EVENTS),
        Kind::PageServer => {
            rules.allow(EVENTS);
            rules.allow(PAGE_SERVER);
            let commands: Vec<_> = PAGE_SERVER_FCNTL
                .iter()
                .map(|command| command.cast_unsigned())
                .collect();
            rules.allow_with(libc::SYS_fcntl, 1, u32::MAX, &commands);
            ioctls(rules, ANSWERING);
        }
    }
}

/// Allows ioctls by the low 16 bits of their request.
fn ioctls(rules: &mut Rules, requests: &[u32]) {
    const REQUEST: u32 = 0xffff;
    rules.allow_with(libc::SYS_ioctl, 1, REQUEST, requests);
}

/// Memory that is never executable: no new code comes into the process.
fn no_code(rules: &mut Rules) {
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.allow_with(call, 2, libc::PROT_EXEC.cast_unsigned(), &[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Runs system calls under a filter in a process of its own.
    fn under(kind: Kind, calls: &[(c_long, [c_long; 3])]) -> WaitStatus {
        let program = filter::program(&rules(kind));
        // SAFETY: the child only makes system calls, with everything they need made before.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            ForkResult::Child => {
                if seccompiler::apply_filter(&program).is_err() {
                    // SAFETY: ends the process.
                    unsafe { libc::_exit(1) };
                }
                for (number, [a, b, c]) in calls {
                    // SAFETY: the calls of these tests take no pointers, or null.
                    unsafe { libc::syscall(*number, *a, *b, *c) };
                }
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) };
            }
        }
    }

    fn all() -> impl Iterator<Item = Kind> {
        Kind::ALL.into_iter().chain([Kind::PageServer])
    }

    fn killed(status: WaitStatus) -> bool {
        matches!(status, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSYS, _))
    }

    #[test]
    fn a_forbidden_call_kills_the_process_whatever_the_thread_is_for() {
        for kind in all() {
            for call in [
                libc::SYS_openat,
                libc::SYS_socket,
                libc::SYS_execve,
                libc::SYS_ptrace,
                libc::SYS_kill,
            ] {
                assert!(
                    killed(under(kind, &[(call, [-1, 0, 0])])),
                    "{kind:?}, system call {call}"
                );
            }
        }
    }

    #[test]
    fn an_allowed_call_goes_through() {
        for kind in all() {
            let status = under(kind, &[(libc::SYS_close, [-1, 0, 0]), (libc::SYS_mmap, [0, 4096, 1])]);
            assert!(matches!(status, WaitStatus::Exited(_, 0)), "{kind:?}: {status:?}");
        }
    }

    #[test]
    fn no_thread_gets_new_code_and_only_the_first_makes_threads() {
        for kind in all() {
            let code = libc::c_long::from(libc::PROT_EXEC | libc::PROT_READ);
            assert!(killed(under(kind, &[(libc::SYS_mmap, [0, 4096, code])])), "{kind:?}");
            assert!(
                killed(under(kind, &[(libc::SYS_mprotect, [0, 4096, code])])),
                "{kind:?}"
            );
            assert_eq!(
                killed(under(kind, &[(libc::SYS_clone3, [0, 0, 0])])),
                kind != Kind::Setup,
                "{kind:?}"
            );
        }
    }

    #[test]
    fn only_its_own_ioctls_are_a_threads() {
        let may = |kind, request| !killed(under(kind, &[(libc::SYS_ioctl, [-1, request, 0])]));
        const RUN: c_long = 0xae80;
        const CREATE_VM: c_long = 0xae01;
        assert!(may(Kind::Vcpu, RUN) && !may(Kind::Control, RUN) && !may(Kind::Device(ThreadKind::Block), RUN));
        assert!(may(Kind::Setup, CREATE_VM) && !may(Kind::Vcpu, CREATE_VM) && !may(Kind::Control, CREATE_VM));
        const SET_LAPIC: c_long = 0xae8f;
        const SET_IRQCHIP: c_long = 0xae63;
        assert!(may(Kind::Loader, SET_LAPIC) && !may(Kind::Vcpu, SET_LAPIC) && !may(Kind::Control, SET_LAPIC));
        assert!(may(Kind::Loader, SET_IRQCHIP) && !may(Kind::Vcpu, SET_IRQCHIP) && !may(Kind::Control, SET_IRQCHIP));
        const WAKE: c_long = 0xaa02;
        assert!(may(Kind::PageServer, WAKE) && !may(Kind::PageServer, CREATE_VM) && !may(Kind::PageServer, RUN));
        assert!(!may(Kind::Loader, CREATE_VM) && !may(Kind::Loader, RUN));
    }
}
