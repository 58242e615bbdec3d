//! A device table whose digests are good, and reads all over its device. The input's last 40 bytes say which; the pack behind
//! the table is the table itself.
#![no_main]

use flint_fuzz::chunks::file_with;
use flint_snapshots::device::{ImageDevice, packs_of};
use flint_snapshots::fuzzing::seal_table;
use libfuzzer_sys::fuzz_target;

const READS_LEN: usize = 40;

fuzz_target!(|data: &[u8]| {
    let Some((table, reads)) = data.split_at_checked(data.len().saturating_sub(READS_LEN)) else {
        return;
    };
    let mut table = table.to_vec();
    seal_table(&mut table);
    let Ok(packs) = packs_of(file_with(&table)) else { return };
    let files = packs.iter().map(|_| file_with(&table)).collect();
    let Ok(device) = ImageDevice::open(file_with(&table), files) else {
        return;
    };
    for read in reads.chunks_exact(10) {
        let (offset, len) = read.split_at(8);
        let offset = u64::from_le_bytes(offset.try_into().expect("8 bytes"));
        let mut buffer = vec![0; usize::from(u16::from_le_bytes([len[0], len[1]]))];
        let _ = device.read_at(offset, &mut buffer);
        // Most devices are short: the same once more, within.
        let _ = device.read_at(offset % device.size().max(1), &mut buffer);
    }
});
