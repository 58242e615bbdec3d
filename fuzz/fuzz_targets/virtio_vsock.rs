//! vsock in user space under a driver that does whatever it likes; the host's ends are read and closed as they come.
#![no_main]

use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};

use flint_fuzz::virtio::{Script, run};
use flint_vmm::virtio::Device;
use flint_vmm::virtio::vsock::{Dial, Dialer, Vsock, VsockResource};
use libfuzzer_sys::fuzz_target;

struct Forward(Sender<Dial>);

impl Dialer for Forward {
    fn dial(&mut self, dial: Dial) -> io::Result<()> {
        match dial.port {
            666 => Err(io::ErrorKind::ConnectionRefused.into()),
            _ => self.0.send(dial).map_err(io::Error::other),
        }
    }
}

/// What the host does after each step: takes what was dialled, echoes some, drops some.
struct Host {
    dialled: Receiver<Dial>,
    streams: Vec<UnixStream>,
}

impl Host {
    fn turn(&mut self) {
        for dial in self.dialled.try_iter() {
            let stream = UnixStream::from(dial.fd);
            if dial.port % 3 != 0 && stream.set_nonblocking(true).is_ok() {
                self.streams.push(stream);
            }
        }
        self.streams.retain_mut(|stream| {
            let mut bytes = [0; 512];
            match stream.read(&mut bytes) {
                Ok(0) => false,
                Ok(len) => stream.write(&bytes[..len]).is_ok(),
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            }
        });
    }
}

fuzz_target!(|script: Script| {
    let name = format!("flint-fuzz-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).expect("a good name");
    let listener = UnixListener::bind_addr(&address).expect("a free name");
    let (sender, dialled) = channel();
    let mut device = Vsock::new(3).expect("a good CID");
    let resource = VsockResource {
        listener,
        dialer: Box::new(Forward(sender)),
    };
    device.bind(resource).expect("an empty slot");
    let mut host = Host {
        dialled,
        streams: Vec::new(),
    };
    let mut caller = UnixStream::connect_addr(&address).expect("somebody listens");
    caller.write_all(b"CONNECT 1024\n").expect("room");
    run(&mut device, &script, |_| host.turn());
});
