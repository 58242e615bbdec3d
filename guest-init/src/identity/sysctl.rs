//! Kernel parameters by dotted name, as sysctl(8) has them.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use super::IdentityError;

/// Checked parameters.
#[derive(Debug, PartialEq, Eq)]
pub struct Sysctls(Vec<(String, PathBuf, String)>);

/// Checks names: they become paths below /proc/sys. A slash in a name stands for a dot in a path component
/// ("net.ipv4.conf.eth0/1.forwarding"), as in sysctl(8).
pub fn parse(sysctls: &HashMap<String, String>) -> Result<Sysctls, IdentityError> {
    let mut parsed = Vec::with_capacity(sysctls.len());
    for (name, value) in sysctls {
        let relative: PathBuf = name.split('.').map(|part| part.replace('/', ".")).collect();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | '@');
        let safe = |part: &str| !part.is_empty() && !part.replace('/', ".").chars().all(|c| c == '.');
        if !name.chars().all(allowed) || !name.split('.').all(safe) {
            return Err(IdentityError::invalid(
                format!("sysctls[{name:?}]"),
                "is not the name of a kernel parameter",
            ));
        }
        parsed.push((name.clone(), Path::new("/proc/sys").join(relative), value.clone()));
    }
    parsed.sort();
    Ok(Sysctls(parsed))
}

impl Sysctls {
    /// Sets them.
    pub fn apply(&self) -> Result<(), IdentityError> {
        for (name, path, value) in &self.0 {
            fs::write(path, value).map_err(|source| IdentityError::Sysctl {
                name: name.clone(),
                value: value.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_one(name: &str) -> Result<Sysctls, IdentityError> {
        parse(&HashMap::from([(name.to_owned(), "1".to_owned())]))
    }

    #[test]
    fn dots_become_folders_and_slashes_dots() {
        let Sysctls(parsed) = parse_one("net.ipv4.conf.eth0/1.forwarding").unwrap();
        assert_eq!(parsed[0].1, Path::new("/proc/sys/net/ipv4/conf/eth0.1/forwarding"));
    }

    #[test]
    fn names_that_leave_proc_sys_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a..b",
            "kernel.//.x",
            "kernel./",
            "a b",
            "x\n",
            "/etc/passwd.",
        ] {
            assert!(parse_one(name).is_err(), "{name:?}");
        }
    }
}
