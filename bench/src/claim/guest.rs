//! A guest that tells when it goes on in a clone:
//!
//! ```text
//!      mov rcx, [GENERATION]        the generation id that it was made with
//!      out COM1, 'T'                it is a template now
//!   1: cmp rcx, [GENERATION]
//!      je 1b
//!      out COM1, 'C'
//!   2: hlt; jmp 2b
//! ```

pub use crate::tiny::{CLONE, TEMPLATE};

use crate::tiny::Code;

/// The guest as an ELF file.
pub fn kernel() -> Vec<u8> {
    let mut code = Code::default();
    code.remember_generation();
    code.out(TEMPLATE);
    code.await_generation();
    code.out(CLONE);
    code.halt();
    code.elf()
}
