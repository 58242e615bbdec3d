//! Guest kernels of a few instructions: 64-bit code in an ELF file, entered with the first 4 GiB mapped to themselves.

/// Where the code is.
const CODE: u64 = 0x10_0000;

/// An ELF64 executable (System V gABI, chapters 4 and 5) whose only segment is `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let length = code.len() as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // e_type EXEC, e_machine x86-64, e_version.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // e_entry, e_phoff, e_shoff.
    elf.extend([CODE, 64, 0].iter().flat_map(|field| field.to_le_bytes()));
    // e_flags; then e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
    elf.extend([0; 4]);
    elf.extend([64_u16, 56, 1, 64, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
    // p_type LOAD, p_flags RWX; then p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align.
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let segment = [HEADERS, CODE, CODE, length, length, 1];
    elf.extend(segment.iter().flat_map(|field| field.to_le_bytes()));
    elf.extend(code);
    elf
}

/// Writes a byte to an I/O port: mov dx, port; mov al, value; out dx, al.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Writes a text to the serial line.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// Sleeps for ever: hlt; jmp to it.
pub fn halt() -> Vec<u8> {
    vec![0xf4, 0xeb, 0xfd]
}

/// Loads an empty interrupt table and raises an exception: lidt [0x5000]; ud2. Neither that nor what follows can be
/// delivered.
pub fn triple_fault() -> Vec<u8> {
    vec![0x0f, 0x01, 0x1c, 0x25, 0x00, 0x50, 0x00, 0x00, 0x0f, 0x0b]
}
