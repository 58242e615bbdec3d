//! Pulls through a proxy, as HTTP_PROXY, HTTPS_PROXY and NO_PROXY say. The client reads them when it is made, so each case is
//! a process of its own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use flint_snapshots::registry::HostConfig;

use crate::build::{noise, simple};
use crate::proxy::read_head;
use crate::registry::Registry;
use crate::*;

const CHILD_DIR: &str = "FLINT_TEST_CHILD_DIR";
const CHILD_REFERENCE: &str = "FLINT_TEST_CHILD_REFERENCE";
const CHILD_CA: &str = "FLINT_TEST_CHILD_CA";
/// A name that no resolver knows (RFC 6761, 6.2): only a proxy can lead to it.
const NAME: &str = "registry.test";

/// Not a test: the process that pulls.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the tests of this file"]
async fn child() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else {
        return;
    };
    let reference = std::env::var(CHILD_REFERENCE).unwrap();
    let mut options = options(&dir);
    options.registry.extra_ca = std::env::var_os(CHILD_CA).map(PathBuf::from);
    let plain = HostConfig {
        plain_http: Some(options.registry.extra_ca.is_none()),
        mirrors: Vec::new(),
    };
    let host = reference.split('/').next().unwrap().to_owned();
    options.registry.hosts.insert(host, plain);
    let store = ImageStore::open(&dir, options).await.unwrap();
    let pulled = pull(&store, &reference).await;
    let pulled = pulled.unwrap_or_else(|error| panic!("{}", text(&*error)));
    assert_serves(&store, &pulled, &noise(100_000, 50)[..4096]).await;
}

/// A forward proxy that leads everything to `upstream`; it notes the first line of each request.
fn forward_proxy(upstream: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&lines);
    // It ends with the test's process, which nextest makes for each test.
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (seen, upstream) = (Arc::clone(&seen), upstream.clone());
            std::thread::spawn(move || serve(client, &upstream, &seen));
        }
    });
    (address, lines)
}

fn serve(mut client: TcpStream, upstream: &str, seen: &Mutex<Vec<String>>) -> Option<()> {
    let head = read_head(&mut client)?;
    let line = head.lines().next()?.to_owned();
    seen.lock().unwrap().push(line.clone());
    let mut server = TcpStream::connect(upstream).ok()?;
    if line.starts_with("CONNECT ") {
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").ok()?;
    } else {
        // Absolute form (RFC 9112, 3.2.2) to origin form, one request for each connection.
        let path = line
            .split(' ')
            .nth(1)?
            .strip_prefix("http://")?
            .split_once('/')?
            .1
            .to_owned();
        let rest = head.split_once("\r\n")?.1;
        let request = format!("GET /{path} HTTP/1.1\r\nConnection: close\r\n{rest}");
        server.write_all(request.as_bytes()).ok()?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer).ok()?;
        return client.write_all(&answer).ok();
    }
    let (mut from_client, mut to_server) = (client.try_clone().ok()?, server.try_clone().ok()?);
    std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
    std::io::copy(&mut server, &mut client).map(drop).ok()
}

/// Pulls `reference` in a process with this environment; what it said if it failed.
fn pull_with(dir: &Path, reference: &str, environment: &[(&str, &str)]) -> Result<(), String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    let output = command
        .args(["--exact", "route::child", "--ignored", "--nocapture"])
        .env(CHILD_DIR, dir)
        .env(CHILD_REFERENCE, reference)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if output.status.success() { Ok(()) } else { Err(said) }
}

#[test]
fn plain_registries_are_reached_through_the_proxy_unless_it_is_not_for_them() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push(&simple(&dir.path().join("oci"), &noise(100_000, 50)), "t/app:1");
    let (proxy, seen) = forward_proxy(registry.address.clone());
    let proxy = format!("http://{proxy}");
    let reference = format!("{NAME}:5000/t/app:1");

    pull_with(&dir.path().join("proxied"), &reference, &[("HTTP_PROXY", &proxy)]).unwrap();
    let lines = seen.lock().unwrap().clone();
    assert!(
        !lines.is_empty()
            && lines
                .iter()
                .all(|line| line.starts_with("GET http://registry.test:5000/v2/")),
        "{lines:?}"
    );

    let environment = [("HTTP_PROXY", &*proxy), ("NO_PROXY", NAME)];
    let said = pull_with(&dir.path().join("direct"), &reference, &environment).unwrap_err();
    assert!(said.contains("cannot be reached") && said.contains(NAME), "{said}");
    assert_eq!(
        seen.lock().unwrap().len(),
        lines.len(),
        "the proxy was asked all the same"
    );

    let nobody = [("HTTP_PROXY", "http://127.0.0.1:1")];
    let said = pull_with(&dir.path().join("dead"), &reference, &nobody).unwrap_err();
    assert!(said.contains("cannot be reached"), "{said}");
}

#[test]
fn tls_goes_through_the_proxy_as_a_tunnel() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::with_tls());
    registry.push(&simple(&dir.path().join("oci"), &noise(100_000, 50)), "t/app:1");
    let (proxy, seen) = forward_proxy(registry.address.clone());
    let proxy = format!("http://{proxy}");
    let authority = registry.dir.path().join("ca.pem");
    let environment = [("HTTPS_PROXY", &*proxy), (CHILD_CA, authority.to_str().unwrap())];
    pull_with(&dir.path().join("store"), &format!("{NAME}:5000/t/app:1"), &environment).unwrap();
    let lines = seen.lock().unwrap().clone();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| line.starts_with("CONNECT registry.test:5000 ")),
        "{lines:?}"
    );
}
