//! Guests of a few instructions, written as bytes: 64-bit code that begins at [`CODE`] with the first 4 GiB mapped to themselves.

/// Where the code is.
pub const CODE: u64 = 0x10_0000;

/// An ELF file with `code` and nothing else.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; 120];
    elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let length = code.len() as u64;
    for (offset, value) in [
        (24, CODE),
        (32, 64),
        (72, 120),
        (80, CODE),
        (88, CODE),
        (96, length),
        (104, length),
    ] {
        elf[offset..offset + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    for (offset, value) in [(16, 2), (18, 62), (52, 64), (54, 56), (56, 1), (64, 1)] {
        elf[offset..offset + 2].copy_from_slice(&u16::to_le_bytes(value));
    }
    elf.extend_from_slice(code);
    elf
}

/// mov dx, port; mov al, value; out dx, al
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Writes a text to the serial line.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// hlt; jmp to it
pub fn halt() -> Vec<u8> {
    vec![0xf4, 0xeb, 0xfd]
}

/// jmp to itself
pub fn spin() -> Vec<u8> {
    vec![0xeb, 0xfe]
}

/// lidt [0x5000], where there are zeros: no interrupt and no fault can be delivered.
pub fn empty_interrupt_table() -> Vec<u8> {
    vec![0x0f, 0x01, 0x1c, 0x25, 0x00, 0x50, 0x00, 0x00]
}

/// mov rbx, 1 << 40; mov byte [rbx], 0: a page fault that cannot be delivered, nor the fault of that.
pub fn triple_fault() -> Vec<u8> {
    let mut code = empty_interrupt_table();
    code.extend([0x48, 0xbb]);
    code.extend(u64::to_le_bytes(1 << 40));
    code.extend([0xc6, 0x03, 0x00]);
    code
}

/// mov ebx, address; mov dword [rbx], value
pub fn store(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xbb];
    code.extend(address.to_le_bytes());
    code.extend([0xc7, 0x03]);
    code.extend(value.to_le_bytes());
    code
}

/// mov rbx, address; mov byte [rbx], value; mov al, [rbx]; mov dx, 0x3f8; out dx, al
pub fn store_and_print(address: u64, value: u8) -> Vec<u8> {
    let mut code = vec![0x48, 0xbb];
    code.extend(address.to_le_bytes());
    code.extend([0xc6, 0x03, value, 0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]);
    code
}

/// Puts code at 0x8000 and starts vCPU 1 there, in real mode (SDM volume 3, 9.4.4).
pub fn start_second(real_mode: &[u8]) -> Vec<u8> {
    const ICR_LOW: u32 = 0xfee0_0300;
    const ICR_HIGH: u32 = 0xfee0_0310;
    let mut code = Vec::new();
    for (index, word) in (0..).zip(real_mode.chunks(4)) {
        let mut bytes = [0xf4; 4];
        bytes[..word.len()].copy_from_slice(word);
        code.extend(store(0x8000 + 4 * index, u32::from_le_bytes(bytes)));
    }
    for (register, value) in [
        (ICR_HIGH, 1 << 24),
        (ICR_LOW, 0x4500),
        (ICR_HIGH, 1 << 24),
        (ICR_LOW, 0x4608),
    ] {
        code.extend(store(register, value));
    }
    code
}
