//! What this host can do for Flint, by trying it: `flint doctor`, and what flintd tells of its host.
//!
//! ```text
//! kvm      /dev/kvm, and whether it runs guest kernel mode natively or emulates it (measured)
//! kernel   io_uring, userfaultfd, huge pages, namespaces, tun, cgroup v2, nftables, limits
//! ```

mod kernel;
mod kvm;

pub use kvm::{Kvm, KvmError, KvmKind, measure, present};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As Flint wants it.
    Good,
    /// Flint runs, with less.
    Limited,
    /// Flint cannot do its work without it.
    Missing,
}

impl Verdict {
    /// One word for tables and JSON.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Short name, stable.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about a lack.
    pub remedy: Option<String>,
}

impl Check {
    /// A check that came out well.
    pub fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Good,
            found: found.into(),
            remedy: None,
        }
    }

    /// A check that found less than there should be, with what to do about it.
    pub fn limited(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Limited,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    /// A check that found nothing to work with, with what to do about it.
    pub fn missing(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Missing,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// Looks at everything; takes under 100 ms.
#[must_use]
pub fn all() -> Vec<Check> {
    let mut checks = vec![kvm::check()];
    checks.extend(kernel::checks());
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_comes_with_its_remedy() {
        for check in all() {
            assert_eq!(check.remedy.is_none(), check.verdict == Verdict::Good, "{check:?}");
            assert!(!check.found.is_empty(), "{check:?}");
        }
    }
}
