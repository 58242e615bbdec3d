//! What is saved of a machine in KVM goes into a fresh one, and the guest goes on there.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use flint_vmm::machine::chipset::{self, ChipsetState};
use flint_vmm::machine::{create_interrupt_controllers, create_vm};
use flint_vmm::memory::{Anonymous, GuestMemory, MemorySource, layout};
use flint_vmm::vcpu;
use flint_vmm::vcpu::cpuid::Processor;
use flint_vmm::vcpu::level::Level;
use flint_vmm::vcpu::state::{self, VcpuState};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// mov eax, 7; loop: out 0x80, al; inc eax; jmp loop - in real mode.
const COUNTER: [u8; 10] = [0x66, 0xb8, 7, 0, 0, 0, 0xe6, 0x80, 0x40, 0xeb];
const BACK: u8 = 0xfb;
const CODE: u64 = 0x1000;

const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

struct Machine {
    kvm: Kvm,
    // Dropped in this order: nothing runs before the memory goes.
    vcpu: VcpuFd,
    vm: VmFd,
    memory: GuestMemory,
}

impl Machine {
    fn new() -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = create_vm(&kvm).unwrap();
        let memory = Anonymous.map(&layout(1 << 20)).unwrap();
        let region = memory.iter().next().unwrap();
        let area = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the memory lives as long as the VM, and only this test and the guest touch it.
        unsafe { vm.set_user_memory_region(area) }.unwrap();
        create_interrupt_controllers(&vm).unwrap();
        memory.write_slice(&COUNTER, GuestAddress(CODE)).unwrap();
        memory.write_obj(BACK, GuestAddress(CODE + 10)).unwrap();
        let vcpu = vcpu::create(&Processor::of(&kvm, Level::Host).unwrap(), &vm, 0, 1).unwrap();
        Self { kvm, vcpu, vm, memory }
    }

    /// Lets it begin to count.
    fn begin(&self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// The next number that the guest tells.
    fn next(&mut self) -> u8 {
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x80, &[number]) => number,
            other => panic!("{other:?}"),
        }
    }

    /// Saves it where it may be: an access that KVM has handed out is complete only once KVM_RUN was entered again.
    fn save(&mut self) -> (VcpuState, ChipsetState) {
        self.vcpu.set_kvm_immediate_exit(1);
        assert_eq!(self.vcpu.run().unwrap_err().errno(), libc::EINTR);
        self.vcpu.set_kvm_immediate_exit(0);
        let msrs = self.kvm.get_msr_index_list().unwrap();
        (
            state::save(&self.vcpu, msrs.as_slice()).unwrap(),
            chipset::save(&self.vm).unwrap(),
        )
    }
}

fn msr(state: &VcpuState, index: u32) -> u64 {
    state.msrs.iter().find(|msr| msr.index == index).unwrap().data
}

/// Parts that are not the same, but for what time changes.
fn differences(one: &VcpuState, other: &VcpuState) -> Vec<&'static str> {
    let parts = [
        ("CPUID", one.cpuid == other.cpuid),
        ("MSRs", one.msrs == other.msrs),
        ("registers", one.regs == other.regs),
        ("system registers", one.sregs == other.sregs),
        ("XSAVE area", one.xsave == other.xsave),
        ("extended control registers", one.xcrs == other.xcrs),
        ("debug registers", one.debug == other.debug),
        ("local APIC", one.lapic == other.lapic),
        ("MP state", one.mp_state == other.mp_state),
        ("events", one.events == other.events),
    ];
    parts
        .into_iter()
        .filter(|(_, same)| !same)
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn a_restored_guest_goes_on_where_it_was_saved() {
    let mut first = Machine::new();
    first.begin();
    assert_eq!([first.next(), first.next(), first.next()], [7, 8, 9]);
    let (saved, _) = first.save();
    let mut second = Machine::new();
    state::restore(&second.vcpu, &saved, None).unwrap();
    assert_eq!([second.next(), second.next()], [10, 11]);
    assert_eq!(first.next(), 10, "saving changes nothing");
}

#[test]
fn a_vcpus_state_survives_a_restore() {
    let mut first = Machine::new();
    first.begin();
    first.next();
    // Something in each part that a fresh vCPU does not have.
    let mut changed = first.save().0;
    changed.regs.r15 = 0x0123_4567_89ab_cdef;
    changed.sregs.cr2 = 0xdead_b000;
    changed.debug.db[0] = 0x4000;
    // FCW, and the low half of XMM0 (SDM volume 1, 10.5.1 and 13.4); XSTATE_BV says that both are there.
    changed.xsave[0] = 0x27f;
    changed.xsave[40] = 0x5555_aaaa;
    changed.xsave[128] |= 3;
    // Task priority; processor priority follows it (SDM volume 3, 11.8.3.1).
    (changed.lapic.regs[0x80], changed.lapic.regs[0xa0]) = (0x20, 0x20);
    let gs = changed
        .msrs
        .iter_mut()
        .find(|msr| msr.index == MSR_KERNEL_GS_BASE)
        .unwrap();
    gs.data = 0x7fff_0000;
    changed.sregs.cr8 = 2;

    let mut second = Machine::new();
    state::restore(&second.vcpu, &changed, None).unwrap();
    state::restore_time(&second.vcpu, changed.time).unwrap();
    let again = second.save().0;
    assert_eq!(msr(&again, MSR_KERNEL_GS_BASE), 0x7fff_0000);
    assert_eq!((again.xsave[0], again.xsave[40]), (0x27f, 0x5555_aaaa));
    assert!(again.time.tsc >= changed.time.tsc, "time went back");
    assert_eq!(differences(&again, &changed), [""; 0]);
}

#[test]
fn interrupt_controllers_and_clock_survive_a_restore() {
    let mut first = Machine::new();
    let mut changed = first.save().1;
    changed.pics[0].irq_base = 0x30;
    changed.pics[0].imr = 0xef;
    changed.pics[1].irq_base = 0x38;
    changed.ioapic.id = 3;
    changed.ioapic.select = 0x10;
    // Pin 4: vector 0x41, level triggered, masked.
    changed.ioapic.redirections[4] = 1 << 16 | 1 << 15 | 0x41;
    let clock = chipset::save_clock(&first.vm).unwrap() + 1_000_000_000_000;

    let mut second = Machine::new();
    chipset::restore(&second.vm, &changed).unwrap();
    chipset::restore_clock(&second.vm, clock).unwrap();
    let later = chipset::save_clock(&second.vm).unwrap();
    assert!(
        (clock..clock + 600_000_000_000).contains(&later),
        "{clock} became {later}"
    );
    assert_eq!(second.save().1, changed);
    let _ = (&first.memory, &second.memory);
}

#[test]
fn a_state_that_kvm_does_not_take_is_an_error() {
    let mut first = Machine::new();
    let mut state = first.save().0;
    state.msrs.push(kvm_bindings::kvm_msr_entry {
        index: 0x4000_0000,
        ..Default::default()
    });
    assert!(state::restore(&Machine::new().vcpu, &state, None).is_err());
    let mut state = first.save().0;
    state.mp_state.mp_state = 99;
    assert!(state::restore(&Machine::new().vcpu, &state, None).is_err());
}
