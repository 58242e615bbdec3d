//! The least that a clone costs on this host: what KVM alone needs, with no VMM around it.
//!
//! ```text
//!   made ahead: VM, irqchip, vCPU with CPUID, slot over a reserved range | map the file | registers | KVM_RUN ... port write
//!                                                                        |<- map ------------------------------->|
//!                                                                                                  |<- run ------>|
//! ```

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::Error;

/// Real mode: out 0x80, al; hlt.
const CODE: [u8; 3] = [0xe6, 0x80, 0xf4];
const START: u64 = 0x1000;
const PAGE: u64 = 4096;

/// One look at the floor.
#[derive(Debug, Clone, Copy)]
pub struct Floor {
    /// From KVM_RUN until the first port write is seen: what a parked clone has left to do.
    pub run: Duration,
    /// The same from before its memory is mapped and its state set: what a shell has left to do.
    pub map: Duration,
}

/// Memory for the floor's guest.
pub fn memory(bytes: u64) -> Result<File, Error> {
    let file = tempfile::tempfile()?;
    file.set_len(bytes)?;
    file.write_all_at(&CODE, START)?;
    Ok(file)
}

impl Floor {
    /// Makes a VM, lets its guest go once, and takes it down.
    pub fn measure(kvm: &Kvm, memory: &File) -> Result<Self, Error> {
        let bytes = memory.metadata()?.len();
        let vm = kvm.create_vm()?;
        vm.set_tss_address(0xfffb_d000)?;
        vm.create_irq_chip()?;
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let range = Range::reserve(bytes)?;
        range.register(&vm)?;

        let begin = Instant::now();
        range.map(memory)?;
        set_state(&vcpu)?;
        let set = Instant::now();
        match vcpu.run()? {
            VcpuExit::IoOut(..) => {}
            other => return Err(format!("the floor's guest left by {other:?}, not by a port write").into()),
        }
        Ok(Self {
            run: set.elapsed(),
            map: begin.elapsed(),
        })
    }
}

fn set_state(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: START,
        rflags: 2,
        ..kvm_regs::default()
    })?;
    vcpu.set_lapic(&vcpu.get_lapic()?)?;
    vcpu.set_mp_state(vcpu.get_mp_state()?)?;
    Ok(())
}

/// A reserved range of addresses.
struct Range {
    start: NonNull<c_void>,
    size: NonZeroUsize,
}

impl Range {
    fn reserve(bytes: u64) -> Result<Self, Error> {
        let size = usize::try_from(bytes.next_multiple_of(PAGE)).ok();
        let size = size.and_then(NonZeroUsize::new).ok_or("no such size of memory")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping, where the kernel likes; nothing is there.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, flags) }?;
        Ok(Self { start, size })
    }

    fn register(&self, vm: &VmFd) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.size.get() as u64,
            userspace_addr: self.start.as_ptr() as u64,
        };
        // SAFETY: the range is this value's, which outlives the VM's running; this program keeps no reference into it.
        unsafe { vm.set_user_memory_region(region) }?;
        Ok(())
    }

    fn map(&self, file: &File) -> Result<(), Error> {
        let start = NonZeroUsize::new(self.start.as_ptr() as usize);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        // SAFETY: the range is ours alone, and there is nothing in it.
        unsafe { mmap(start, self.size, access, flags, file.as_fd(), 0) }?;
        Ok(())
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and nobody has a reference into it.
        let _ = unsafe { munmap(self.start, self.size.get()) };
    }
}
