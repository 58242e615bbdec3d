//! Guests that print the alphabet over and over: what is lost or repeated is seen.

use std::io::Read;
use std::os::unix::net::UnixStream;

use super::driver::*;
use super::guest;

/// Prints the alphabet over and over; the next letter is in a register and in memory, and 'X' tells that they differ. Between
/// letters it counts for a while.
pub fn letters() -> Vec<u8> {
    let mut code = vec![0xb3, b'a']; // mov bl, 'a'
    code.extend([0xc6, 0x04, 0x25, 0, 0, 0x20, 0, b'a']); // mov byte [0x200000], 'a'
    let top = code.len();
    code.extend([0x8a, 0x04, 0x25, 0, 0, 0x20, 0]); // mov al, [0x200000]
    code.extend([0x38, 0xd8, 0x74, 0x02, 0xb0, b'X']); // cmp al, bl; je over; mov al, 'X'
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]); // mov dx, 0x3f8; out dx, al
    code.extend([0xb9, 0, 4, 0, 0, 0xe2, 0xfe]); // mov ecx, 1024; loop to itself
    code.extend([0xfe, 0xc3, 0x80, 0xfb, b'z' + 1, 0x75, 0x02, 0xb3, b'a']); // inc bl; cmp bl, 'z' + 1; jne over; mov bl, 'a'
    code.extend([0x88, 0x1c, 0x25, 0, 0, 0x20, 0]); // mov [0x200000], bl
    jump_back(&mut code, top);
    code
}

pub fn jump_back(code: &mut Vec<u8>, to: usize) {
    let distance = i32::try_from(to).unwrap() - i32::try_from(code.len() + 5).unwrap();
    code.push(0xe9);
    code.extend(distance.to_le_bytes());
}

/// Everything that a paused guest has printed.
pub fn drain(serial: &mut UnixStream) -> String {
    serial.set_nonblocking(true).unwrap();
    let mut text = Vec::new();
    let _ = serial.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

pub fn assert_alphabet(text: &str) {
    assert!(text.starts_with('a'), "{text}");
    for pair in text.as_bytes().windows(2) {
        let expected = if pair[0] == b'z' { b'a' } else { pair[0] + 1 };
        assert_eq!(pair[1], expected, "{text}");
    }
}

/// Does something first, then reads sector after sector of 26, without interrupts, and prints the first byte of each.
pub fn read_sectors(first: &[u8]) -> Image {
    let mut code = [first.to_vec(), drive(1), vec![0x31, 0xf6, 0x31, 0xed]].concat(); // xor esi, esi; xor ebp, ebp
    let top = code.len();
    code.extend([0x89, 0x34, 0x25]); // mov [the request's sector], esi
    code.extend((OUT + 8).to_le_bytes());
    code.extend([0xff, 0xc5, 0x66, 0x89, 0x2c, 0x25]); // inc ebp; mov [available index], bp
    code.extend((RINGS[0] + 0x1002).to_le_bytes());
    code.extend(guest::store(WINDOW + QUEUE_NOTIFY, 0));
    code.extend([0x66, 0x39, 0x2c, 0x25]); // cmp [used index], bp
    code.extend((RINGS[0] + 0x2002).to_le_bytes());
    code.extend([0x75, 0xf6, 0x8a, 0x04, 0x25]); // jne to the comparison; mov al, [data]
    code.extend(IN.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]); // mov dx, 0x3f8; out dx, al
    code.extend([0xb9, 0, 2, 0, 0, 0xe2, 0xfe]); // mov ecx, 512; loop to itself
    code.extend([0xff, 0xc6, 0x83, 0xfe, 26, 0x75, 0x02, 0x31, 0xf6]); // inc esi; cmp esi, 26; jne over; xor esi, esi
    jump_back(&mut code, top);
    let mut image = Image::new(&code, &[]);
    image.ring(
        0,
        &[(OUT, 16, NEXT), (IN, 512, NEXT | WRITE), (BLOCK_STATUS, 1, WRITE)],
        &[],
    );
    image
}
