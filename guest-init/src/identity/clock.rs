//! The wall clock: from the host's own, where it can be read.
//!
//! A time that comes by message is late by the way of the message: some hundred microseconds, or many milliseconds on a loaded
//! host. KVM's PTP clock (Linux' ptp_kvm: a hypercall, KVM_HC_CLOCK_PAIRING) gives the host's CLOCK_REALTIME within
//! microseconds, with nobody in between, and our own clock is moved by what it is off. VMClock would do the same by a page
//! of memory, from Linux 6.13 on.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};

const CLOCKS: &str = "/sys/class/ptp";
/// Linux' name of it (drivers/ptp/ptp_kvm_common.c).
const KVM_CLOCK: &str = "KVM virtual PTP";
/// A clock that is farther from the message's time is not the one that its sender looked at.
const TOLERANCE: Duration = Duration::from_secs(60);

/// How often the host's clock is looked at, at most.
const LOOKS: usize = 5;
/// An answer that came within this is as good as any.
const SOON: Duration = Duration::from_micros(50);

/// Sets the clock to the host's, or, if that cannot be read, to `realtime`, since the epoch.
pub fn set(realtime: Duration) -> Result<(), Errno> {
    let clock = find(Path::new(CLOCKS)).and_then(|device| File::open(device).ok());
    match clock.and_then(|device| look(&device).ok()) {
        Some(look) if is_the_senders(look.host, realtime) => step(look.ahead()),
        _ => clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(realtime)),
    }
}

/// Whether the host's clock is the one that the message's sender looked at.
fn is_the_senders(host: Duration, message: Duration) -> bool {
    host.abs_diff(message) < TOLERANCE
}

/// The host's clock between two looks at our own.
#[derive(Debug, Clone, Copy)]
struct Look {
    before: Duration,
    host: Duration,
    after: Duration,
}

impl Look {
    fn took(&self) -> Duration {
        self.after.saturating_sub(self.before)
    }

    /// By how many nanoseconds the host's clock is ahead of ours, give or take half of what the look took.
    fn ahead(&self) -> i128 {
        let nanoseconds = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        nanoseconds(self.host) - nanoseconds(self.before + self.took() / 2)
    }
}

/// The best look of a few: between two instructions this machine may stand still for milliseconds.
fn look(device: &File) -> io::Result<Look> {
    let mut best: Option<Look> = None;
    for _ in 0..LOOKS {
        let own = || clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from);
        let (before, host, after) = (own()?, read(device)?, own()?);
        let look = Look { before, host, after };
        if best.is_none_or(|best| look.took() < best.took()) {
            best = Some(look);
        }
        if look.took() < SOON {
            break;
        }
    }
    best.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Moves the clock by so many nanoseconds (clock_adjtime(2), ADJ_SETOFFSET): it goes on from what it shows then, so that it does not
/// matter how long ago they were reckoned.
fn step(nanoseconds: i128) -> Result<(), Errno> {
    const BILLION: i128 = 1_000_000_000;
    let seconds = nanoseconds.div_euclid(BILLION);
    // SAFETY: all of the structure's fields are numbers, for which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    change.time.tv_sec = i64::try_from(seconds).map_err(|_| Errno::ERANGE)?;
    // From 0 to below a billion, and with ADJ_NANO it is nanoseconds.
    change.time.tv_usec = i64::try_from(nanoseconds.rem_euclid(BILLION)).map_err(|_| Errno::ERANGE)?;
    // SAFETY: the structure is ours, and the kernel writes into nothing else.
    Errno::result(unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &raw mut change) }).map(drop)
}

/// The device of KVM's clock.
fn find(clocks: &Path) -> Option<PathBuf> {
    fs::read_dir(clocks).ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("clock_name")).ok()?;
        (name.trim_end() == KVM_CLOCK).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// Reads a clock device: its descriptor makes a clock id (Linux' FD_TO_CLOCKID, clock_getres(2)).
fn read(device: &File) -> io::Result<Duration> {
    const CLOCKFD: libc::clockid_t = 3;
    let id = ClockId::from_raw(!device.as_raw_fd() << 3 | CLOCKFD);
    Ok(clock_gettime(id)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_far_from_the_messages_time_is_not_its_senders() {
        let [message, host, other] = [1000, 1003, 9000].map(Duration::from_secs);
        assert!(is_the_senders(host, message) && is_the_senders(message, host));
        assert!(!is_the_senders(other, message) && !is_the_senders(message, other));
    }

    #[test]
    fn the_host_is_ahead_or_behind_by_what_lies_between_the_middle_of_a_look_and_its_answer() {
        let look = |host| Look {
            before: Duration::from_nanos(100),
            host: Duration::from_nanos(host),
            after: Duration::from_nanos(300),
        };
        assert_eq!(
            [200, 5_000_000_000, 50].map(|host| look(host).ahead()),
            [0, 4_999_999_800, -150]
        );
        // The clock may have been set back meanwhile.
        let back = Look {
            after: Duration::ZERO,
            ..look(200)
        };
        assert_eq!((back.took(), back.ahead()), (Duration::ZERO, 100));
    }

    #[test]
    fn kvms_clock_is_found_by_its_name_among_others() {
        let clocks = tempfile::tempdir().unwrap();
        for (device, name) in [
            ("ptp0", "virtio_rtc\n"),
            ("ptp1", "KVM virtual PTP\n"),
            ("ptp2", "e1000e\n"),
        ] {
            fs::create_dir(clocks.path().join(device)).unwrap();
            fs::write(clocks.path().join(device).join("clock_name"), name).unwrap();
        }
        assert_eq!(find(clocks.path()), Some("/dev/ptp1".into()));
        assert_eq!(find(&clocks.path().join("absent")), None);
    }

    #[test]
    fn a_file_that_is_no_clock_is_an_error() {
        assert!(read(&tempfile::tempfile().unwrap()).is_err());
    }
}
