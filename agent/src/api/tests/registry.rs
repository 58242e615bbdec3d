//! A real registry on a loopback port, gone with the value that started it.

use std::{
    fs,
    io::{self, BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

pub(super) struct Registry {
    child: Child,
    address: String,
    folder: TempDir,
}

impl Registry {
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}/data}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n",
            folder.path().display()
        );
        fs::write(&config, text).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry is installed (apt-get install docker-registry)");
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "the registry ended");
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end = rest.find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit());
                break rest[..end.unwrap_or(rest.len())].to_owned();
            }
        };
        // Whoever does not read a log to its end stops its writer.
        thread::spawn(move || io::copy(&mut log, &mut io::sink()));
        Self { child, address, folder }
    }

    pub(super) fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Has it stand still, or go on.
    pub(super) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    /// The files in which it keeps blobs that have some text in them.
    pub(super) fn blobs_with(&self, text: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.path().join("data/docker/registry/v2/blobs")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if has(&path, text) {
                    found.push(path);
                }
            }
        }
        found
    }
}

fn has(path: &Path, text: &str) -> bool {
    let bytes = fs::read(path).unwrap();
    bytes.windows(text.len()).any(|part| part == text.as_bytes())
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
