//! `/dev/kvm`, measured: a guest of two instructions counts in kernel mode for a few milliseconds.
//!
//! Some clouds offer a KVM that emulates the guest's kernel mode in software, at about a millionth of a second an
//! instruction. All ioctls work there, and no Linux guest ever comes up; nothing but a measurement tells.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use thiserror::Error;

use super::Check;

/// The KVM interface has been stable at this version since Linux 2.6.22 (KVM API, 4.1).
const API_VERSION: i32 = 12;
/// How many times the guest counts before it says so by an I/O exit. At 1 MIPS that is some milliseconds.
const ROUNDS: u32 = 4096;
/// A native processor does hundreds of millions a second; an emulated one about one million.
const NATIVE_FLOOR: f64 = 15e6;
const MEASURE_FOR: Duration = Duration::from_millis(20);

/// What kind of KVM a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmKind {
    /// Guest kernel mode runs on the processor: Linux guests work.
    Native,
    /// Guest kernel mode is emulated: tiny guest programs only.
    Emulated,
}

impl KvmKind {
    /// As the API says it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Emulated => "emulated",
        }
    }
}

/// A usable KVM.
#[derive(Debug, Clone, Copy)]
pub struct Kvm {
    /// Native or emulated.
    pub kind: KvmKind,
    /// What the guest did, instructions a second.
    pub instructions_per_second: f64,
}

/// Why KVM cannot be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// No device, or none behind its name.
    #[error("there is no KVM behind /dev/kvm ({0})")]
    NoDevice(io::Error),
    /// It is there, and not for this user.
    #[error("/dev/kvm may not be opened by this user ({0})")]
    Permission(io::Error),
    /// Something else has its name.
    #[error("/dev/kvm is not KVM's device: it does not answer KVM_GET_API_VERSION")]
    NotKvm,
    /// It cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(io::Error),
    /// Another interface than the one everybody has.
    #[error("/dev/kvm speaks API version {0}, not 12")]
    Version(i32),
    /// VMX or SVM is on already, and not by KVM.
    #[error("/dev/kvm is busy: another hypervisor holds the processor's virtualization ({0})")]
    Busy(io::Error),
    /// A guest could not be made or run.
    #[error("/dev/kvm is there, and a test guest could not be run: {0}")]
    Guest(io::Error),
}

impl KvmError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoDevice(_) => {
                "load kvm_intel or kvm_amd and switch virtualization on in the firmware; in a container, pass the host's in"
            }
            Self::Permission(_) => "run as root or as a member of the device's group, kvm",
            Self::NotKvm => {
                "remove it and load kvm_intel or kvm_amd, which make it; in a container, pass the host's in"
            }
            Self::Busy(_) => "end the other hypervisor (VirtualBox, VMware, ...) or unload its modules",
            Self::Open(_) | Self::Version(_) | Self::Guest(_) => "the kernel's log (dmesg) says more about kvm",
        }
    }

    fn of_open(error: kvm_ioctls::Error) -> Self {
        match error.errno() {
            // A node without a driver is as good as none (open(2)).
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Self::NoDevice(error.into()),
            libc::EACCES | libc::EPERM => Self::Permission(error.into()),
            libc::EISDIR => Self::NotKvm,
            _ => Self::Open(error.into()),
        }
    }

    /// Before Linux 6.12 KVM switches the processor's virtualization on with the first VM, and answers EBUSY where somebody
    /// else has.
    fn of_guest(error: kvm_ioctls::Error) -> Self {
        match error.errno() {
            libc::EBUSY => Self::Busy(error.into()),
            _ => Self::Guest(error.into()),
        }
    }
}

/// Whether `/dev/kvm` is KVM; takes microseconds. That guests run is for [`measure`] to say.
///
/// # Errors
/// [`KvmError`] if it is not.
pub fn present() -> Result<(), KvmError> {
    open().map(drop)
}

fn open() -> Result<kvm_ioctls::Kvm, KvmError> {
    let kvm = kvm_ioctls::Kvm::new().map_err(KvmError::of_open)?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        // The ioctl's own error: any file can be opened, and none but KVM's knows this one.
        -1 => Err(KvmError::NotKvm),
        other => Err(KvmError::Version(other)),
    }
}

/// Runs a test guest for some 20 milliseconds.
///
/// # Errors
/// [`KvmError`] if there is no usable KVM.
pub fn measure() -> Result<Kvm, KvmError> {
    let kvm = open()?;
    let vm = kvm.create_vm().map_err(KvmError::of_guest)?;
    let memory = Page::new().map_err(KvmError::Guest)?;
    let mut vcpu = counting_guest(&vm, &memory).map_err(KvmError::of_guest)?;
    let instructions_per_second = count(&mut vcpu).map_err(KvmError::of_guest)?;
    let kind = if instructions_per_second < NATIVE_FLOOR {
        KvmKind::Emulated
    } else {
        KvmKind::Native
    };
    Ok(Kvm {
        kind,
        instructions_per_second,
    })
}

/// One page of memory, shared with the guest, unmapped with the value.
struct Page {
    address: *mut libc::c_void,
}

const PAGE_SIZE: usize = 4096;
/// Where the guest's page lies and its program starts.
const GUEST_ADDRESS: u64 = 0x1000;

impl Page {
    fn new() -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { address })
        }
    }

    fn write(&self, code: &[u8]) {
        let length = code.len().min(PAGE_SIZE);
        // SAFETY: the mapping is PAGE_SIZE long and writable, `length` is at most that, and `code` is no part of it.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.address.cast(), length) };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, is PAGE_SIZE long, and nobody uses it any more: the VM that saw it is
        // dropped before it in `measure` (locals drop in reverse order, and the page was made after the VM; a VM keeps
        // no reference that it follows without KVM_RUN).
        unsafe { libc::munmap(self.address, PAGE_SIZE) };
    }
}

fn counting_guest(vm: &VmFd, memory: &Page) -> Result<VcpuFd, kvm_ioctls::Error> {
    let [r0, r1, r2, r3] = ROUNDS.to_le_bytes();
    memory.write(&[
        0xb9, r0, r1, r2, r3,   // mov ecx, ROUNDS
        0x49, //                 dec ecx
        0x75, 0xfd, //           jnz -3
        0xe6, 0x80, //           out 0x80, al
        0xeb, 0xf4, //           jmp to the start
    ]);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: GUEST_ADDRESS,
        memory_size: PAGE_SIZE as u64,
        userspace_addr: memory.address as u64,
    };
    // SAFETY: the page stays mapped until after the last KVM_RUN: `measure` owns both.
    unsafe { vm.set_user_memory_region(region)? };
    let vcpu = vm.create_vcpu(0)?;
    // Protected mode without paging, flat segments, ring 0: guest kernel mode at its simplest (SDM vol. 3, 3.2.1).
    let mut sregs = vcpu.get_sregs()?;
    sregs.cr0 |= 1;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (
            segment.base,
            segment.limit,
            segment.g,
            segment.db,
            segment.s,
            segment.present,
        ) = (0, u32::MAX, 1, 1, 1, 1);
        (segment.selector, segment.type_) = (16, 3);
    }
    (sregs.cs.selector, sregs.cs.type_) = (8, 11);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (GUEST_ADDRESS, 2);
    vcpu.set_regs(&regs)?;
    Ok(vcpu)
}

/// Instructions a second, over rounds that take [`MEASURE_FOR`] or just one round.
fn count(vcpu: &mut VcpuFd) -> Result<f64, kvm_ioctls::Error> {
    let mut rounds = 0u32;
    // The first round pays for page faults.
    round(vcpu)?;
    let start = Instant::now();
    while rounds == 0 || start.elapsed() < MEASURE_FOR {
        round(vcpu)?;
        rounds += 1;
    }
    Ok(f64::from(rounds) * f64::from(ROUNDS) * 2.0 / start.elapsed().as_secs_f64())
}

fn round(vcpu: &mut VcpuFd) -> Result<(), kvm_ioctls::Error> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => return Ok(()),
            Ok(_) => return Err(kvm_ioctls::Error::new(libc::EIO)),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn check() -> Check {
    const NAME: &str = "kvm";
    match measure() {
        Ok(Kvm {
            kind: KvmKind::Native,
            instructions_per_second: speed,
        }) => Check::good(
            NAME,
            format!(
                "guest kernel mode runs natively ({:.0} million instructions/s)",
                speed / 1e6
            ),
        ),
        Ok(Kvm {
            kind: KvmKind::Emulated,
            instructions_per_second: speed,
        }) => Check::missing(
            NAME,
            format!(
                "guest kernel mode is emulated ({:.1} million instructions/s): no Linux guest comes up",
                speed / 1e6
            ),
            "run Flint on bare metal, on a VM with nested virtualization, or in the emulated host (hack/emulated-host)",
        ),
        Err(error) => Check::missing(NAME, error.to_string(), error.remedy()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: i32) -> kvm_ioctls::Error {
        kvm_ioctls::Error::new(errno)
    }

    #[test]
    fn each_way_of_not_having_kvm_is_told_apart_with_what_to_do() {
        let told = [
            (KvmError::of_open(error(libc::ENOENT)), "no KVM", "kvm_intel"),
            (KvmError::of_open(error(libc::ENXIO)), "no KVM", "firmware"),
            (KvmError::of_open(error(libc::EACCES)), "this user", "group"),
            (KvmError::of_open(error(libc::EISDIR)), "not KVM's device", "remove it"),
            (KvmError::of_open(error(libc::EMFILE)), "Too many open files", "dmesg"),
            (KvmError::of_guest(error(libc::EBUSY)), "busy", "VirtualBox"),
            (KvmError::of_guest(error(libc::ENOMEM)), "allocate", "dmesg"),
        ];
        for (error, found, remedy) in told {
            assert!(error.to_string().contains("/dev/kvm"), "{error}");
            assert!(error.to_string().contains(found), "{error}");
            assert!(error.remedy().contains(remedy), "{error}: {}", error.remedy());
        }
    }
}
