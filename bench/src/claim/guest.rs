//! A guest of a few instructions that tells when it goes on in a clone: it is written as bytes, 64-bit code at 1 MiB with the first
//! 4 GiB mapped to themselves, which is how flint-vmm enters an ELF file.
//!
//! ```text
//!      mov rcx, [GENERATION]        the generation id that it was made with
//!      out COM1, 'T'                it is a template now
//!   1: cmp rcx, [GENERATION]        its clones have another one before their first instruction
//!      je 1b
//!      out COM1, 'C'
//!   2: hlt; jmp 2b
//! ```

/// Where the code is.
const CODE: u64 = 0x10_0000;
/// Where flint-vmm puts the VM generation id.
const GENERATION: [u8; 4] = 0x000f_e000_u32.to_le_bytes();

/// What a template writes to its serial line.
pub const TEMPLATE: u8 = b'T';
/// What a clone writes to it.
pub const CLONE: u8 = b'C';

/// The guest as an ELF file.
pub fn kernel() -> Vec<u8> {
    elf(&code())
}

fn code() -> Vec<u8> {
    let [g0, g1, g2, g3] = GENERATION;
    let mut code = vec![0x48, 0x8b, 0x0c, 0x25, g0, g1, g2, g3];
    code.extend(out(TEMPLATE));
    code.extend([0x48, 0x3b, 0x0c, 0x25, g0, g1, g2, g3, 0x74, 0xf6]);
    code.extend(out(CLONE));
    code.extend([0xf4, 0xeb, 0xfd]);
    code
}

/// mov dx, COM1; mov al, value; out dx, al
fn out(value: u8) -> [u8; 7] {
    [0x66, 0xba, 0xf8, 0x03, 0xb0, value, 0xee]
}

/// An ELF file for x86-64 with one segment, all of it code (System V ABI, 4 and 5).
fn elf(code: &[u8]) -> Vec<u8> {
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
    let length = code.len() as u64;
    for field in [HEADERS, CODE, CODE, length, length, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_where_the_headers_say() {
        let file = kernel();
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        assert_eq!((word(24), word(32)), (CODE, 64));
        let at = usize::try_from(word(64 + 8)).unwrap();
        assert_eq!(file[at..], code());
        assert_eq!(word(64 + 32), code().len() as u64);
    }
}
