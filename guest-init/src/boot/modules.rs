//! Kernel modules of a distribution kernel; the minimal kernel has everything built in and no /lib/modules.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
};

use super::BootError;

const FOLDER: &str = "/lib/modules";

/// Loads the uncompressed modules that /lib/modules/order names, in that order.
pub fn load() -> Result<(), BootError> {
    let order = Path::new(FOLDER).join("order");
    let text = match fs::read_to_string(&order) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(BootError::Module { path: order, source }),
    };
    for name in names(&text) {
        let path = Path::new(FOLDER).join(name);
        insert(&path).map_err(|source| BootError::Module { path, source })?;
    }
    Ok(())
}

fn names(order: &str) -> impl Iterator<Item = &str> {
    order
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn insert(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", ModuleInitFlags::empty()) {
        // Built in, or named twice.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_lines_and_comments_name_no_module() {
        let order = "# virtio first\nvirtio_mmio.ko\n\n  erofs.ko  \n";
        assert_eq!(names(order).collect::<Vec<_>>(), ["virtio_mmio.ko", "erofs.ko"]);
    }
}
