//! A program that draws random numbers when it is told to, as programs in pods do that were started before their pod was saved. For
//! agent/tests/system_fork.rs, which runs it in pods: it is built static, as flint-init is.
//!
//! Each line on standard input is answered by one on standard output:
//!
//! | line | answer |
//! |---|---|
//! | `draw` | `getrandom=HEX thread_rng=HEX`: 16 bytes of the kernel's, and of the generator that `rand` keeps for a thread |
//! | `reseed` | `reseeded`, when that generator has new numbers of the kernel's |

use std::io::{self, BufRead, Write};

use rand::{
    Rng, TryRng,
    rngs::{SysRng, ThreadRng},
};

fn main() -> io::Result<()> {
    let mut thread = rand::rng();
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let answer = answer(&line?, &mut thread)?;
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

fn answer(line: &str, thread: &mut ThreadRng) -> io::Result<String> {
    match line {
        "draw" => {
            let (mut kernel, mut own) = ([0; 16], [0; 16]);
            SysRng.try_fill_bytes(&mut kernel).map_err(io::Error::other)?;
            thread.fill_bytes(&mut own);
            Ok(format!("getrandom={} thread_rng={}", hex(kernel), hex(own)))
        }
        "reseed" => {
            thread.reseed().map_err(io::Error::other)?;
            Ok("reseeded".into())
        }
        _ => Err(io::Error::other(format!("{line:?}: draw, or reseed?"))),
    }
}

fn hex(bytes: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(bytes))
}
