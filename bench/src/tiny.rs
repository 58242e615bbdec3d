//! Guests of a few instructions, written as bytes: 64-bit code at 1 MiB with the first 4 GiB mapped to themselves, which is how
//! flint-vmm enters an ELF file.

/// Where the code is.
const CODE: u64 = 0x10_0000;
/// Where flint-vmm puts the VM generation id.
const GENERATION: [u8; 4] = 0x000f_e000_u32.to_le_bytes();

/// What a template writes to its serial line, if it does.
pub const TEMPLATE: u8 = b'T';
/// What a clone writes to it.
pub const CLONE: u8 = b'C';

/// Instructions, one after the other.
#[derive(Debug, Default)]
pub struct Code(Vec<u8>);

impl Code {
    /// `mov dx, COM1; mov al, value; out dx, al`
    pub fn out(&mut self, value: u8) {
        self.0.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, value, 0xee]);
    }

    /// `1: hlt; jmp 1b`
    pub fn halt(&mut self) {
        self.0.extend([0xf4, 0xeb, 0xfd]);
    }

    /// `mov dword [address], value`
    pub fn store(&mut self, address: u32, value: u32) {
        self.0.extend([0xc7, 0x04, 0x25]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
    }

    /// Has rbx point to the first window, from `first` on, in which the register at `offset` has the value.
    ///
    /// `mov ebx, first; 1: cmp dword [rbx + offset], value; je 2f; add rbx, bytes; jmp 1b; 2:`
    pub fn find_window(&mut self, first: u32, bytes: u32, offset: u8, value: u8) {
        self.0.push(0xbb);
        self.0.extend(first.to_le_bytes());
        self.0.extend([0x83, 0x7b, offset, value, 0x74, 0x09, 0x48, 0x81, 0xc3]);
        self.0.extend(bytes.to_le_bytes());
        self.0.extend([0xeb, 0xf1]);
    }

    /// `mov dword [rbx + register], value`
    pub fn store_in_window(&mut self, register: u32, value: u32) {
        self.0.extend([0xc7, 0x83]);
        self.0.extend(register.to_le_bytes());
        self.0.extend(value.to_le_bytes());
    }

    /// `mov rcx, [GENERATION]`: the id that this machine was made with.
    pub fn remember_generation(&mut self) {
        self.0.extend([0x48, 0x8b, 0x0c, 0x25]);
        self.0.extend(GENERATION);
    }

    /// `1: cmp rcx, [GENERATION]; je 1b`: clones have another one before their first instruction.
    pub fn await_generation(&mut self) {
        self.0.extend([0x48, 0x3b, 0x0c, 0x25]);
        self.0.extend(GENERATION);
        self.0.extend([0x74, 0xf6]);
    }

    /// An ELF file for x86-64 with one segment, all of it code (System V ABI, 4 and 5).
    pub fn elf(self) -> Vec<u8> {
        const HEADERS: u64 = 64 + 56;
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        // ET_EXEC, EM_X86_64, version, entry, program headers, no section headers, flags, sizes and counts.
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        file.extend(CODE.to_le_bytes());
        file.extend(64_u64.to_le_bytes());
        file.extend([0; 12]);
        file.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        // PT_LOAD, readable and executable, from where in the file to where in memory, how long.
        file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        let length = self.0.len() as u64;
        for field in [HEADERS, CODE, CODE, length, length, 0] {
            file.extend(field.to_le_bytes());
        }
        file.extend(self.0);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_where_the_headers_say() {
        let mut code = Code::default();
        code.out(CLONE);
        code.halt();
        let bytes = code.0.clone();
        let file = code.elf();
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        assert_eq!((word(24), word(32)), (CODE, 64));
        let at = usize::try_from(word(64 + 8)).unwrap();
        assert_eq!(file[at..], bytes);
        assert_eq!(word(64 + 32), bytes.len() as u64);
    }
}
