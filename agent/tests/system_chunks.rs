//! Images whose chunks are damaged on the host while Linux guests read them.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::fs::{self, File};
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use host::{Host, LIMIT, variable};

/// The test registry at another address, which can be cut off.
struct Line {
    address: String,
    up: Arc<AtomicBool>,
    /// Tells each connection that was refused.
    refused: mpsc::Receiver<()>,
}

impl Line {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let up = Arc::new(AtomicBool::new(true));
        let (refusals, refused) = mpsc::channel();
        let is_up = Arc::clone(&up);
        // It ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if is_up.load(Ordering::SeqCst) {
                    let registry = TcpStream::connect(variable("FLINT_TEST_REGISTRY")).unwrap();
                    join(&client, &registry, &is_up);
                    join(&registry, &client, &is_up);
                } else {
                    let _ = refusals.send(());
                }
            }
        });
        Self { address, up, refused }
    }

    fn cut(&self) {
        self.up.store(false, Ordering::SeqCst);
    }

    fn mend(&self) {
        self.up.store(true, Ordering::SeqCst);
    }

    fn python(&self) -> String {
        format!("{}/python:3", self.address)
    }
}

/// Passes on what comes, as long as the line is not cut.
fn join(from: &TcpStream, to: &TcpStream, up: &Arc<AtomicBool>) {
    let (mut from, mut to, up) = (from.try_clone().unwrap(), to.try_clone().unwrap(), Arc::clone(up));
    thread::spawn(move || {
        let mut piece = [0; 16 << 10];
        while let Ok(read @ 1..) = io::Read::read(&mut from, &mut piece) {
            if !up.load(Ordering::SeqCst) || io::Write::write_all(&mut to, &piece[..read]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// A program of some MB that nothing has run, as the guest reads it.
const SUM: &str = "cat /usr/bin/python3* | sha256sum";

/// All that runs in the pod is in its guest's memory afterwards, and the folders it looks into.
const WARM: &str = "cat /bin/busybox | sha256sum; ls -lR /bin/ /usr/bin/; cat /etc/hostname | sha256sum";

fn start(host: &Host, line: &Line, command: &str) {
    host.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: reader}}\nspec:\n  terminationGracePeriodSeconds: 2\n  restartPolicy: Never\n  \
         containers:\n  - name: main\n    image: {}\n    command: [sh, -c, {}]\n",
        line.python(),
        serde_json::to_string(command).unwrap()
    ));
}

/// Zeros instead of every chunk that the host has.
fn damage(host: &Host) {
    let mut damaged = 0;
    for pack in fs::read_dir(host.path("state/images/packs")).unwrap() {
        let pack = File::options().write(true).open(pack.unwrap().path()).unwrap();
        let len = usize::try_from(pack.metadata().unwrap().len()).unwrap();
        pack.write_all_at(&vec![0; len - 16], 16).unwrap();
        damaged += len;
    }
    assert!(damaged > 1 << 20);
}

#[test]
fn a_guest_waits_for_what_is_damaged_beneath_it_also_over_the_end_of_flintd() {
    let (mut host, line) = (Host::start(), Line::new());
    let expected = host.ok(["run", "--rm", &line.python(), "--", "sh", "-c", SUM]);
    start(
        &host,
        &line,
        &format!("{{ {WARM}; }} >/dev/null; until [ -e /go ]; do sleep 0.2; done; {SUM}; sleep 1000"),
    );
    host.ok(["exec", "reader", "--", "sh", "-c", WARM]);
    damage(&host);
    line.cut();

    host.ok(["exec", "reader", "--", "sh", "-c", ": > /go"]);
    line.refused.recv_timeout(LIMIT).expect("the registry is asked");
    host.kill_daemon();
    line.mend();
    host.start_daemon();

    let (mut follower, log) = host.follow("reader");
    assert_eq!(
        log.recv_timeout(LIMIT).unwrap(),
        expected.trim_end(),
        "{}",
        host.daemon_log()
    );
    follower.kill().unwrap();
    follower.wait().unwrap();
    assert!(host.daemon_log().contains("a damaged chunk is replaced"));
    // Whoever comes later reads the same.
    assert_eq!(
        host.ok(["run", "--rm", &line.python(), "--", "sh", "-c", SUM]),
        expected
    );
}

#[test]
fn with_the_registry_down_a_read_fails_at_its_deadline_and_works_later() {
    let (host, line) = (Host::start_with(["--chunk-deadline", "3"]), Line::new());
    let expected = host.ok(["run", "--rm", &line.python(), "--", "sh", "-c", SUM]);
    start(&host, &line, "sleep 1000");
    host.ok(["exec", "reader", "--", "sh", "-c", WARM]);
    damage(&host);
    line.cut();

    let done = host.flint(["exec", "reader", "--", "sh", "-c", SUM]);
    assert!(done.stderr.contains("Input/output error"), "{done:?}");
    assert_ne!(done.stdout, expected);

    line.mend();
    assert_eq!(host.ok(["exec", "reader", "--", "sh", "-c", SUM]), expected);
}
