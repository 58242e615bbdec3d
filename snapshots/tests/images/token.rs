//! A real registry that takes tokens, and the server that issues them (docker's token protocol): a signed claim of what its
//! bearer may do.

use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use flint_snapshots::images::ErrorKind;
use serde_json::json;

use crate::build::{noise, simple};
use crate::proxy::{Fault, Proxy, answer};
use crate::registry::{Registry, openssl};
use crate::*;

/// A token for `scope` ("repository:t/app:pull"), signed with `key.pem` in `dir`.
fn token(dir: &Path, scope: &str) -> String {
    let certificate = std::fs::read_to_string(dir.join("cert.pem")).unwrap();
    let der: String = certificate.lines().filter(|line| !line.starts_with('-')).collect();
    let mut parts = scope.split(':');
    let mut part = || parts.next().unwrap_or_default().to_owned();
    let (kind, name, actions) = (part(), part(), part());
    let actions: Vec<_> = actions.split(',').collect();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
    let claims = json!({"iss": "issuer", "sub": "user", "aud": "test", "exp": now + 300, "nbf": now - 60, "iat": now,
        "jti": "1", "access": [{"type": kind, "name": name, "actions": actions}]});
    let signed = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header.to_string()),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let input = tempfile::NamedTempFile::new_in(dir).unwrap();
    std::fs::write(input.path(), &signed).unwrap();
    let output = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign"])
        .arg(dir.join("key.pem"))
        .arg(input.path())
        .output()
        .unwrap();
    assert!(output.status.success());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(output.stdout))
}

/// A token server that knows one user; who is none may pull what is below `public/`.
fn issuer(dir: &Path) -> Proxy {
    openssl(
        dir,
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=issuer -keyout key.pem -out cert.pem",
    );
    let dir = dir.to_path_buf();
    let user = format!("basic {}", STANDARD.encode("user:secret").to_lowercase());
    Proxy::start("127.0.0.1:1", move |head, _| {
        let query = head.split(' ').nth(1).unwrap().split_once('?').unwrap().1.to_owned();
        let scope = query.split('&').find_map(|pair| pair.strip_prefix("scope=")).unwrap();
        let scope = scope.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",");
        let head = head.to_lowercase();
        let stranger = !head.contains("authorization:");
        let may = head.contains(&user) || (stranger && scope.starts_with("repository:public/"));
        if !may {
            return answer("401 Unauthorized", "", r#"{"details":"who are you"}"#);
        }
        answer("200 OK", "", &json!({"token": token(&dir, &scope)}).to_string())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_takes_the_tokens_that_were_fetched() {
    let (dir, certificates) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let issuer = issuer(certificates.path());
    let registry = Registry::with_tokens(certificates, &format!("http://{}/token", issuer.address));
    let image = simple(&dir.path().join("oci"), &noise(200_000, 40));
    let login = [
        "--dest-tls-verify=false",
        "--preserve-digests",
        "--dest-creds",
        "user:secret",
    ];
    let private = registry.push_with(&image, "private/app:1", &login);
    let public = registry.push_with(&image, "public/app:1", &login);

    let store = open(&dir.path().join("store")).await;
    let before = issuer.count("");
    assert_eq!(
        pull(&store, &public).await.unwrap().digest,
        image.digest,
        "an anonymous token was not taken"
    );
    assert_eq!(issuer.count("") - before, 1, "one pull fetched several tokens");

    let error = pull(&store, &private).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", text(&*error));
    assert!(text(&*error).contains("wants credentials"), "{}", text(&*error));
    let wrong = with_credentials(&*private, "user", "other");
    let error = store.pull(wrong).unwrap().finish().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", text(&*error));
    assert!(text(&*error).contains("refused the credentials"), "{}", text(&*error));
    let right = with_credentials(&*private, "user", "secret");
    let pulled = store.pull(right).unwrap().finish().await;
    assert_eq!(
        pulled.unwrap_or_else(|error| panic!("{}", text(&*error))).digest,
        image.digest
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_help_nothing_or_cannot_be_had_are_told() {
    let (dir, real) = (tempfile::tempdir().unwrap(), Registry::start());
    real.push(&simple(&dir.path().join("oci"), b"x"), "t/app:1");
    let cases = [
        (
            "useless",
            answer("200 OK", "", r#"{"token":"useless"}"#),
            ErrorKind::Denied,
            "refused the credentials",
        ),
        (
            "none",
            answer("200 OK", "", "{}"),
            ErrorKind::BadImage,
            "it has no token",
        ),
        (
            "html",
            answer("200 OK", "", "<html>"),
            ErrorKind::BadImage,
            "not the JSON",
        ),
        (
            "down",
            answer("503 Service Unavailable", "", ""),
            ErrorKind::Unavailable,
            "answered 503 for a token",
        ),
        ("silent", Fault::Stall(0), ErrorKind::Unavailable, "silent"),
        (
            "secret",
            answer("200 OK", "", r#"{"token":"hunter2\n"}"#),
            ErrorKind::BadImage,
            "no text",
        ),
    ];
    for (name, fault, kind, said) in cases {
        let registry = Proxy::start(&real.address, move |head, _| {
            if head.starts_with("GET /token") {
                return fault.clone();
            }
            let host = head
                .lines()
                .find_map(|line| line.strip_prefix("host: "))
                .unwrap_or_default();
            let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"\r\n");
            answer("401 Unauthorized", &challenge, "")
        });
        let path = dir.path().join(name);
        let mut options = options(&path);
        options.registry.timeouts.first_byte = Duration::from_millis(300);
        options.registry.retries.attempts = 2;
        let store = ImageStore::open(&path, options).await.unwrap();
        let work = store.pull(with_credentials(registry.reference("t/app:1"), "user", "secret"));
        let error = work.unwrap().finish().await.unwrap_err();
        let text = text(&*error);
        assert_eq!(error.kind(), kind, "{name}: {text}");
        assert!(
            text.contains(said) && text.contains(&registry.address),
            "{name}: {text}"
        );
        assert!(!text.contains("hunter2") && !text.contains("secret"), "{name}: {text}");
    }
}
