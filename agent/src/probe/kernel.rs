//! What the host's kernel and its set-up offer, each thing tried or read, never guessed from a version.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Check;

pub(super) fn checks() -> Vec<Check> {
    vec![
        root(),
        io_uring(),
        userfaultfd(),
        huge_pages(),
        cgroup_v2(),
        namespaces(),
        tun(),
        nftables(),
        mkfs(),
        open_files(),
    ]
}

fn root() -> Check {
    // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
    match unsafe { libc::geteuid() } {
        0 => Check::good("root", "running as root"),
        uid => Check::limited(
            "root",
            format!("running as uid {uid}: some checks see less"),
            "run `flint doctor` as root",
        ),
    }
}

/// io_uring_setup with no parameters: EFAULT says that it is there, ENOSYS or EPERM that it is not.
fn io_uring() -> Check {
    // SAFETY: a null parameter block makes the call fail before it does anything.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<libc::c_void>()) };
    match (result, io::Error::last_os_error().raw_os_error()) {
        (-1, Some(libc::EFAULT)) => Check::good("io_uring", "available"),
        (-1, Some(libc::EPERM)) => Check::missing(
            "io_uring",
            "forbidden by sysctl kernel.io_uring_disabled or by a seccomp filter",
            "sysctl -w kernel.io_uring_disabled=0; in a container, allow io_uring in its seccomp profile",
        ),
        _ => Check::missing(
            "io_uring",
            "the kernel has none",
            "use Linux 6.1 or newer with CONFIG_IO_URING",
        ),
    }
}

fn userfaultfd() -> Check {
    if Path::new("/dev/userfaultfd").exists() {
        return Check::good("userfaultfd", "/dev/userfaultfd");
    }
    // SAFETY: takes flags only; the result is an error or a new descriptor, closed below.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if fd < 0 {
        return Check::limited(
            "userfaultfd",
            format!("not available: {}", io::Error::last_os_error()),
            "use a kernel with CONFIG_USERFAULTFD; snapshots then come from plain files only",
        );
    }
    if let Ok(fd) = i32::try_from(fd) {
        // SAFETY: the descriptor was just made, and nobody else knows it.
        unsafe { libc::close(fd) };
    }
    Check::good("userfaultfd", "by system call")
}

fn huge_pages() -> Check {
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        fs::read_to_string(path)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    match (read("nr_hugepages"), read("free_hugepages")) {
        (Some(total), Some(free)) if total > 0 => {
            Check::good("huge-pages", format!("{free} of {total} of 2 MiB are free"))
        }
        (Some(_), _) => Check::limited(
            "huge-pages",
            "none of 2 MiB is set aside",
            "optional: sysctl -w vm.nr_hugepages=N makes restored guests fault less",
        ),
        (None, _) => Check::limited(
            "huge-pages",
            "the kernel has none of 2 MiB",
            "optional: use CONFIG_HUGETLBFS",
        ),
    }
}

fn cgroup_v2() -> Check {
    const NAME: &str = "cgroup-v2";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| path.to_owned())
    });
    let Some(mount) = mount else {
        return Check::missing(
            NAME,
            "not mounted",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup, or boot with systemd",
        );
    };
    let controllers = fs::read_to_string(format!("{mount}/cgroup.controllers")).unwrap_or_default();
    let lacking: Vec<_> = ["cpu", "memory", "io"]
        .into_iter()
        .filter(|name| !controllers.split_whitespace().any(|c| c == *name))
        .collect();
    if lacking.is_empty() {
        Check::good(NAME, format!("at {mount}: {}", controllers.trim()))
    } else {
        Check::limited(
            NAME,
            format!("at {mount}, without {}", lacking.join(", ")),
            "boot with systemd.unified_cgroup_hierarchy=1 (no v1 controllers); until then sandboxes run without those limits",
        )
    }
}

fn namespaces() -> Check {
    let kinds = ["user", "mnt", "net", "pid", "ipc", "uts", "cgroup"];
    let lacking: Vec<_> = kinds
        .into_iter()
        .filter(|kind| !Path::new(&format!("/proc/self/ns/{kind}")).exists())
        .collect();
    if !lacking.is_empty() {
        let found = format!("the kernel lacks {}", lacking.join(", "));
        return Check::missing(
            "namespaces",
            found,
            "use a kernel with CONFIG_NAMESPACES and all its kinds",
        );
    }
    let most = fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    match most.trim().parse::<u64>() {
        Ok(0) => Check::missing(
            "namespaces",
            "user namespaces are switched off",
            "sysctl -w user.max_user_namespaces=65536",
        ),
        Ok(most) => Check::good("namespaces", format!("all kinds; at most {most} user namespaces")),
        Err(_) => Check::good("namespaces", "all kinds"),
    }
}

fn tun() -> Check {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::good("tun", "/dev/net/tun opens"),
        Err(error) => Check::missing(
            "tun",
            format!("/dev/net/tun does not open: {error}"),
            "modprobe tun, and run as root",
        ),
    }
}

/// Listing the rule set asks both the program and the kernel.
fn nftables() -> Check {
    let run = Command::new("nft")
        .args(["list", "tables"])
        .stdin(Stdio::null())
        .output();
    match run {
        Ok(output) if output.status.success() => Check::good("nftables", "nft and the kernel agree"),
        Ok(output) => {
            let error = String::from_utf8_lossy(&output.stderr);
            let first = error.lines().next().unwrap_or("it says nothing").to_owned();
            Check::limited(
                "nftables",
                format!("nft failed: {first}"),
                "modprobe nf_tables, and run as root; pods have no way out without it",
            )
        }
        Err(_) => Check::limited(
            "nftables",
            "there is no nft program",
            "apt-get install nftables; pods have no way out without it",
        ),
    }
}

fn mkfs() -> Check {
    let found = ["/sbin", "/usr/sbin", "/usr/local/sbin"].map(|dir| format!("{dir}/mkfs.ext4"));
    match found.into_iter().find(|path| Path::new(path).exists()) {
        Some(path) => Check::good("mkfs.ext4", path),
        None => Check::missing("mkfs.ext4", "not installed", "apt-get install e2fsprogs"),
    }
}

/// Each sandbox costs flintd some ten descriptors.
fn open_files() -> Check {
    const WANTED: u64 = 65_536;
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit writes one rlimit to a pointer that is valid for it.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    match (result, limit.rlim_max) {
        (0, most) if most >= WANTED => Check::good("open-files", format!("at most {most}")),
        (0, most) => Check::limited(
            "open-files",
            format!("at most {most}: room for about {} sandboxes", most / 10),
            "LimitNOFILE=1048576 in flintd's unit, or ulimit -n",
        ),
        _ => Check::limited("open-files", "the limit cannot be read", "check ulimit -n"),
    }
}
