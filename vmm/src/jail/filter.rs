//! Lists of system calls as programs for seccomp, which look their call up by halving:
//!
//! ```text
//!   of another architecture? -> kill
//!   call >= middle?          -> the right half, or the left one, and again
//!   call == the one left?    -> allow, or look one of its arguments up in the same way; no -> kill
//! ```
//!
//! The kernel runs a new filter once for every call that the thread may make so far, to know which of them need no filter at all
//! (Linux, kernel/seccomp.c, seccomp_cache_prepare). With a list that is compared with from its first to its last entry that is nearly 1 ms
//! for the first filter of a process, and each of its threads puts on another one.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_KILL_PROCESS, c_long, seccomp_data,
};
use seccompiler::{BpfProgram, sock_filter};

/// EM_X86_64, 64 bits, little endian (linux/audit.h).
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Which system calls are allowed. Any other one kills the process.
#[derive(Debug, Default)]
pub struct Rules(BTreeMap<u32, Check>);

/// What is looked at of a call.
#[derive(Debug)]
enum Check {
    Nothing,
    /// The low 32 bits of an argument under a mask must be one of these.
    Argument {
        index: u8,
        mask: u32,
        values: BTreeSet<u32>,
    },
}

impl Rules {
    /// Allows calls with any arguments.
    pub fn allow(&mut self, calls: &[c_long]) {
        self.0.extend(calls.iter().map(|call| (number(*call), Check::Nothing)));
    }

    /// Allows a call if an argument under a mask is one of these values. Whoever comes later adds values to those of the first,
    /// whose argument and mask stand; a call that is allowed with any arguments stays so.
    pub fn allow_with(&mut self, call: c_long, index: u8, mask: u32, values: &[u32]) {
        let check = self.0.entry(number(call)).or_insert_with(|| Check::Argument {
            index,
            mask,
            values: BTreeSet::new(),
        });
        if let Check::Argument { values: known, .. } = check {
            known.extend(values);
        }
    }
}

/// Calls have small numbers; one that had not would be none.
fn number(call: c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

const ALLOW: sock_filter = instruction(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW);
const KILL: sock_filter = instruction(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS);

/// The program of a list.
#[must_use]
pub fn program(rules: &Rules) -> BpfProgram {
    let mut program = vec![
        load(offset_of!(seccomp_data, arch)),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, AUDIT_ARCH_X86_64),
        KILL,
        load(offset_of!(seccomp_data, nr)),
    ];
    let entries = rules.0.iter().map(|(call, check)| (*call, checked(check)));
    program.extend(search(&entries.collect::<Vec<_>>()));
    program
}

fn checked(check: &Check) -> BpfProgram {
    match check {
        Check::Nothing => vec![ALLOW],
        Check::Argument { index, mask, values } => {
            let entries: Vec<_> = values.iter().map(|value| (*value, vec![ALLOW])).collect();
            // The low half comes first on x86-64.
            let argument = offset_of!(seccomp_data, args) + usize::from(*index) * size_of::<u64>();
            let mut program = vec![load(argument), instruction(BPF_ALU | BPF_AND | BPF_K, 0, 0, *mask)];
            program.extend(search(&entries));
            program
        }
    }
}

/// Goes on with the program whose key, all of which rise, is in the accumulator; kills, if there is none.
fn search(entries: &[(u32, BpfProgram)]) -> BpfProgram {
    match entries {
        [] => vec![KILL],
        [(key, found)] => {
            let mut program = vec![instruction(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, *key), KILL];
            program.extend_from_slice(found);
            program
        }
        _ => {
            let (left, right) = entries.split_at(entries.len() / 2);
            let first = right.first().map_or(u32::MAX, |(key, _)| *key);
            let left = search(left);
            // Conditional jumps reach 255 instructions far, this one any.
            let distance = u32::try_from(left.len()).unwrap_or(u32::MAX);
            let mut program = vec![
                instruction(BPF_JMP | BPF_JGE | BPF_K, 0, 1, first),
                instruction(BPF_JMP | BPF_JA, 0, 0, distance),
            ];
            program.extend(left);
            program.extend(search(right));
            program
        }
    }
}

fn load(offset: usize) -> sock_filter {
    // A place in a structure of 64 bytes; the kernel refuses any other one.
    let offset = u32::try_from(offset).unwrap_or(u32::MAX);
    instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
}

/// `then` and `otherwise`: how many instructions a conditional jump leaves out.
// Codes have 16 bits (linux/bpf_common.h).
#[allow(clippy::cast_possible_truncation)]
const fn instruction(code: u32, then: u8, otherwise: u8, value: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: then,
        jf: otherwise,
        k: value,
    }
}

#[cfg(test)]
mod tests {
    use super::super::seccomp::{Kind, rules};
    use super::*;
    use libc::BPF_JGT;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    };

    /// What a filter says to a call, and after how many instructions.
    fn run(program: &[sock_filter], data: &seccomp_data) -> (u32, usize) {
        let mut words = vec![data.nr.cast_unsigned(), data.arch, 0, 0];
        let arguments = data.args.iter().flat_map(|argument| [*argument, *argument >> 32]);
        words.extend(arguments.map(|half| u32::try_from(half & u64::from(u32::MAX)).unwrap()));
        let (mut accumulator, mut at) = (0, 0);
        for steps in 1.. {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            at += 1;
            let mut jump = |yes: bool| at += usize::from(if yes { jt } else { jf });
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => accumulator = words[k as usize / 4],
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => jump(accumulator == k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => jump(accumulator >= k),
                code if code == BPF_JMP | BPF_JGT | BPF_K => jump(accumulator > k),
                code if code == BPF_JMP | BPF_JA => at += k as usize,
                code if code == BPF_RET | BPF_K => return (k, steps),
                code => panic!("instruction {code:#x}"),
            }
        }
        unreachable!()
    }

    fn allows(program: &[sock_filter], data: &seccomp_data) -> bool {
        let (verdict, _) = run(program, data);
        assert!([SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS].contains(&verdict));
        verdict == SECCOMP_RET_ALLOW
    }

    fn call(nr: u32, index: usize, argument: u64) -> seccomp_data {
        let mut args = [0; 6];
        args[index] = argument;
        seccomp_data {
            nr: nr.cast_signed(),
            arch: AUDIT_ARCH_X86_64,
            instruction_pointer: 0,
            args,
        }
    }

    /// The same list by another compiler.
    fn peer(rules: &Rules) -> BpfProgram {
        let list = rules.0.iter().map(|(call, check)| {
            let rules = match check {
                Check::Nothing => vec![],
                Check::Argument { index, mask, values } => {
                    let compare = SeccompCmpOp::MaskedEq(u64::from(*mask));
                    let values = values.iter().map(|value| {
                        SeccompCondition::new(*index, SeccompCmpArgLen::Dword, compare.clone(), u64::from(*value))
                            .unwrap()
                    });
                    values
                        .map(|condition| SeccompRule::new(vec![condition]).unwrap())
                        .collect()
                }
            };
            (i64::from(*call), rules)
        });
        let (other, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
        let filter = SeccompFilter::new(list.collect(), other, listed, TargetArch::x86_64);
        filter.unwrap().try_into().unwrap()
    }

    fn agree(rules: &Rules) {
        let (ours, theirs) = (program(rules), peer(rules));
        assert!(ours.len() < 4096, "the kernel's limit");
        let mut arguments = vec![0, 1, 4, 5, u64::MAX, 1 << 32, 0xffff];
        for check in rules.0.values() {
            if let Check::Argument { values, .. } = check {
                let around = values.iter().map(|value| u64::from(*value));
                arguments.extend(around.flat_map(|value| [value, value + 1, value | 1 << 16, value | 1 << 32]));
            }
        }
        // The last ones are calls by the x32 ABI, which has the same architecture.
        for nr in (0..600).chain([u32::MAX, 0x4000_0000, 0x4000_0001, 0x4000_0010]) {
            for (index, argument) in (0..4).flat_map(|index| arguments.iter().map(move |it| (index, *it))) {
                let data = call(nr, index, argument);
                let same = allows(&ours, &data) == allows(&theirs, &data);
                assert!(same, "call {nr}, argument {index}: {argument:#x}");
            }
        }
        let foreign = seccomp_data {
            arch: 0x4000_0003,
            ..call(0, 0, 0)
        };
        assert!(!allows(&ours, &foreign));
    }

    #[test]
    fn programs_decide_as_those_of_another_compiler_do() {
        let kinds = Kind::ALL.into_iter().chain([Kind::PageServer]);
        kinds.for_each(|kind| agree(&rules(kind)));
    }

    #[test]
    fn what_was_allowed_with_any_arguments_stays_so_and_values_add_up() {
        let mut rules = Rules::default();
        rules.allow_with(7, 1, 0xff, &[3]);
        rules.allow_with(7, 1, 0xff, &[5]);
        rules.allow(&[9]);
        rules.allow_with(9, 1, 0xff, &[3]);
        let program = program(&rules);
        let allowed = |nr, argument| allows(&program, &call(nr, 1, argument));
        assert!(allowed(7, 3) && allowed(7, 0x105) && !allowed(7, 4));
        assert!(allowed(9, 4) && !allowed(8, 3));
    }

    #[test]
    fn a_list_of_nothing_allows_nothing() {
        assert!(!allows(&super::program(&Rules::default()), &call(0, 0, 0)));
    }

    #[test]
    fn no_call_takes_more_than_a_few_steps() {
        let rules = rules(Kind::Setup);
        let program = program(&rules);
        // A comparison and a jump for each halving; what comes first and last; and the same for the longest list of ioctls.
        let halvings = |count: usize| count.ilog2() as usize + 1;
        let most = 10 + 2 * (halvings(rules.0.len()) + halvings(100));
        for nr in 0..600 {
            let (_, steps) = run(&program, &call(nr, 0, 0));
            assert!(steps <= most, "call {nr} takes {steps} steps");
        }
    }
}
