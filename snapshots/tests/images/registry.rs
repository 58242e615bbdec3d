//! A real registry on a loopback port, gone with the value that started it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use flint_snapshots::registry::Digest;

use crate::build::Layout;

pub struct Registry {
    child: Child,
    pub address: String,
    pub dir: tempfile::TempDir,
}

impl Registry {
    /// An open registry.
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), "", "")
    }

    /// One that wants basic authorization: user "user", password "secret".
    pub fn with_password() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let htpasswd = dir.path().join("htpasswd");
        let hash = Command::new("python3")
            .args(["-W", "ignore", "-c", "import crypt; print(crypt.crypt('secret', crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16)).replace('$2b$', '$2y$', 1))"])
            .output()
            .unwrap();
        fs::write(&htpasswd, format!("user:{}", String::from_utf8(hash.stdout).unwrap())).unwrap();
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}", htpasswd.display());
        Self::start_in(dir, &auth, "")
    }

    /// One that speaks TLS with a certificate of its own CA, which is in `ca.pem`.
    pub fn with_tls() -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_certificates(dir.path());
        let tls = format!(
            ", tls: {{certificate: {0}/cert.pem, key: {0}/key.pem}}",
            dir.path().display()
        );
        Self::start_in(dir, "", &tls)
    }

    /// One that takes tokens of the service "test" whose issuer's certificate is `cert.pem` in `dir`, fetched from `realm`.
    pub fn with_tokens(dir: tempfile::TempDir, realm: &str) -> Self {
        let auth = format!(
            "auth: {{token: {{realm: '{realm}', service: test, issuer: issuer, rootcertbundle: {}/cert.pem}}}}",
            dir.path().display()
        );
        Self::start_in(dir, &auth, "")
    }

    fn start_in(dir: tempfile::TempDir, auth: &str, http: &str) -> Self {
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}/data}}}}\n\
             http: {{addr: '127.0.0.1:0'{http}}}\n{auth}\n",
            dir.path().display()
        );
        fs::write(dir.path().join("config.yml"), text).unwrap();
        let (child, address) = serve(dir.path());
        Self { child, address, dir }
    }

    /// Starts it again with what it has, after it was killed; at another address.
    pub fn start_again(&mut self) {
        (self.child, self.address) = serve(self.dir.path());
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Pushes a layout's image; returns the reference.
    pub fn push(&self, layout: &Layout, name: &str) -> String {
        self.push_with(layout, name, &["--dest-tls-verify=false", "--preserve-digests"])
    }

    pub fn push_with(&self, layout: &Layout, name: &str, arguments: &[&str]) -> String {
        let reference = self.reference(name);
        skopeo(
            &[
                &["copy"],
                arguments,
                &[
                    &format!("oci:{}", layout.path.display()),
                    &format!("docker://{reference}"),
                ],
            ]
            .concat(),
        );
        reference
    }

    /// Puts a manifest or an index under `name`, as it is.
    pub fn put_manifest(&self, name: &str, media_type: &str, document: &serde_json::Value) -> String {
        let (repository, tag) = name.split_once(':').unwrap();
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.address);
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--fail-with-body",
                "--noproxy",
                "*",
                "-X",
                "PUT",
                "-H",
            ])
            .arg(format!("Content-Type: {media_type}"))
            .args(["--data-binary", &document.to_string(), &url])
            .output()
            .expect("curl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        self.reference(name)
    }

    /// The file in which the registry keeps a blob.
    pub fn blob_file(&self, digest: Digest) -> PathBuf {
        let hex = digest.hex();
        self.dir
            .path()
            .join(format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a registry of the configuration in `dir`; its address.
fn serve(dir: &Path) -> (Child, String) {
    let mut child = Command::new("docker-registry")
        .arg("serve")
        .arg(dir.join("config.yml"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("docker-registry is installed (apt-get install docker-registry)");
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    let address = loop {
        let mut line = String::new();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the registry ended: {seen}");
        if let Some((_, rest)) = line.split_once("listening on ") {
            break rest
                .split(|c: char| c != '.' && c != ':' && !c.is_ascii_digit())
                .next()
                .unwrap()
                .to_owned();
        }
        seen.push_str(&line);
    };
    // Whoever does not read a log to its end stops its writer.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    (child, address)
}

pub fn skopeo(arguments: &[&str]) {
    let output = Command::new("skopeo")
        .arg("--insecure-policy")
        .args(arguments)
        .output()
        .expect("skopeo is installed");
    assert!(
        output.status.success(),
        "skopeo {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn openssl(dir: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "openssl {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn make_certificates(dir: &Path) {
    let openssl = |arguments: &str| openssl(dir, arguments);
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test-ca -keyout ca.key -out ca.pem",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=registry -keyout key.pem -out request.pem",
    );
    fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1,DNS:registry.test").unwrap();
    openssl("x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out cert.pem");
}
