//! A proxy that does to answers what networks and servers do to them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

/// What happens to a request. Numbers count bytes of the answer, its head included.
#[derive(Clone)]
pub enum Fault {
    Pass,
    /// The connection ends properly, too early.
    Truncate(usize),
    /// The connection is reset.
    Reset(usize),
    /// Nothing comes any more.
    Stall(usize),
    /// One byte of the answer's body is altered.
    Flip(usize),
    /// The answer says that it is this long.
    Length(usize),
    /// The proxy answers by itself.
    Answer(String),
}

/// A status line, headers and a body.
pub fn answer(status: &str, headers: &str, body: &str) -> Fault {
    Fault::Answer(format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    ))
}

pub struct Proxy {
    pub address: String,
    heads: Arc<Mutex<Vec<String>>>,
    /// Tells each stall, when it has begun.
    pub stalled: mpsc::Receiver<()>,
    ending: Arc<AtomicBool>,
}

impl Proxy {
    /// A proxy before `upstream`; `decide` gets each request's head and its number among those of the same path.
    pub fn start(upstream: &str, decide: impl Fn(&str, usize) -> Fault + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (stalls, stalled) = mpsc::channel();
        let ending = Arc::new(AtomicBool::new(false));
        let (seen, upstream, decide, end) = (
            Arc::clone(&heads),
            upstream.to_owned(),
            Arc::new(decide),
            Arc::clone(&ending),
        );
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(client) = client else { continue };
                let (seen, upstream, decide, stalls) =
                    (Arc::clone(&seen), upstream.clone(), Arc::clone(&decide), stalls.clone());
                std::thread::spawn(move || serve(client, &upstream, &seen, &*decide, &stalls));
            }
        });
        Self {
            address,
            heads,
            stalled,
            ending,
        }
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// The requests so far, without bodies.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }

    /// How many requests had `part` in their path.
    pub fn count(&self, part: &str) -> usize {
        self.heads().iter().filter(|head| path_of(head).contains(part)).count()
    }

    /// Whether any request showed credentials.
    pub fn saw_credentials(&self) -> bool {
        self.heads()
            .iter()
            .any(|head| head.to_lowercase().contains("authorization:"))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
    }
}

fn serve(
    mut client: TcpStream,
    upstream: &str,
    seen: &Mutex<Vec<String>>,
    decide: &(impl Fn(&str, usize) -> Fault + ?Sized),
    stalls: &mpsc::Sender<()>,
) -> Option<()> {
    let head = read_head(&mut client)?;
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push(head.clone());
        seen.iter().filter(|other| path_of(other) == path_of(&head)).count()
    };
    let fault = decide(&head, number);
    if let Fault::Answer(text) = &fault {
        return client.write_all(text.as_bytes()).ok();
    }
    let mut server = TcpStream::connect(upstream).ok()?;
    server
        .write_all(head.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes())
        .ok()?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).ok()?;
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    match fault {
        Fault::Pass | Fault::Answer(_) => client.write_all(&answer).ok(),
        Fault::Flip(at) => {
            answer[body + at] ^= 1;
            client.write_all(&answer).ok()
        }
        Fault::Length(len) => {
            let head = String::from_utf8(answer[..body].to_vec()).ok()?;
            let line = head
                .lines()
                .find(|line| line.to_lowercase().starts_with("content-length:"))?;
            client
                .write_all(head.replace(line, &format!("Content-Length: {len}")).as_bytes())
                .ok()?;
            client.write_all(&answer[body..]).ok()
        }
        Fault::Truncate(at) => {
            client.write_all(&answer[..at.min(answer.len())]).ok()?;
            client.shutdown(Shutdown::Both).ok()
        }
        Fault::Reset(at) => {
            client.write_all(&answer[..at.min(answer.len())]).ok()?;
            reset(client);
            Some(())
        }
        Fault::Stall(at) => {
            client.write_all(&answer[..at.min(answer.len())]).ok()?;
            stalls.send(()).ok()?;
            // Until the client gives up.
            client.read_to_end(&mut Vec::new()).map(drop).ok()
        }
    }
}

/// What a request asks for.
fn path_of(head: &str) -> &str {
    head.split(' ').nth(1).unwrap_or_default()
}

pub fn read_head(client: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if client.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

/// Closes with RST: nothing lingers.
fn reset(client: TcpStream) {
    use std::os::fd::AsRawFd;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let size = libc::socklen_t::try_from(size_of::<libc::linger>()).unwrap();
    // SAFETY: the descriptor is open, and `linger` is what SO_LINGER wants and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            client.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size,
        )
    };
    assert_eq!(result, 0);
    drop(client);
}
