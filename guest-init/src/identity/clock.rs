//! The wall clock: from the host's own, where it can be read.
//!
//! A time that comes by message is late by the way of the message: some hundred microseconds, or many milliseconds on a loaded
//! host. KVM's PTP clock (Linux' ptp_kvm: a hypercall, KVM_HC_CLOCK_PAIRING) gives the host's CLOCK_REALTIME within
//! microseconds, with nobody in between. VMClock would do the same by a page of memory, from Linux 6.13 on.

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

/// Sets the clock to the host's, or, if that cannot be read, to `realtime`, since the epoch.
pub fn set(realtime: Duration) -> Result<(), Errno> {
    let clock = find(Path::new(CLOCKS)).and_then(|device| File::open(device).ok());
    let host = clock.and_then(|device| read(&device).ok());
    let time = choose(realtime, host);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(time))
}

fn choose(message: Duration, host: Option<Duration>) -> Duration {
    host.filter(|host| host.abs_diff(message) < TOLERANCE)
        .unwrap_or(message)
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
    fn the_hosts_clock_goes_before_the_message_unless_it_is_another_clock() {
        let [message, host, other] = [1000, 1003, 9000].map(Duration::from_secs);
        assert_eq!(choose(message, Some(host)), host);
        assert_eq!(choose(host, Some(message)), message);
        assert_eq!(choose(message, Some(other)), message);
        assert_eq!(choose(message, None), message);
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
