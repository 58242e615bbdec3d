//! Who may pull, and over what.

use base64::Engine as _;
use flint_snapshots::images::ErrorKind;
use flint_snapshots::registry::HostConfig;

use crate::build::simple;
use crate::proxy::{Fault, Proxy, answer};
use crate::registry::Registry;
use crate::*;

#[tokio::test(flavor = "multi_thread")]
async fn basic_credentials_open_and_others_do_not() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::with_password());
    let image = simple(&dir.path().join("oci"), b"private");
    let reference = registry.push_with(
        &image,
        "t/app:1",
        &["--dest-tls-verify=false", "--dest-creds", "user:secret"],
    );
    let path = dir.path().join("store");
    let store = open(&path).await;

    let error = pull(&store, &reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(
        text(&*error).contains("wants credentials") && text(&*error).contains(&registry.address),
        "{}",
        text(&*error)
    );

    let error = store
        .pull(with_credentials(&*reference, "user", "wrong-one"))
        .unwrap()
        .finish()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(
        text(&*error).contains("\"user\"") && !text(&*error).contains("wrong-one"),
        "{}",
        text(&*error)
    );
    assert_clean(&store).await;

    let pulled = store
        .pull(with_credentials(&*reference, "user", "secret"))
        .unwrap()
        .finish()
        .await
        .unwrap();
    assert_eq!(pulled.digest, image.digest);
    store.remove(&reference).await.unwrap();

    let auth = base64::engine::general_purpose::STANDARD.encode("user:secret");
    let config = serde_json::json!({"auths": {&registry.address: {"auth": auth}}});
    std::fs::write(path.join("docker.json"), config.to_string()).unwrap();
    assert_eq!(
        pull(&store, &reference).await.unwrap().digest,
        image.digest,
        "docker's configuration was not used"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bearer_token_is_fetched_and_renewed() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), b"private");
    registry.push(&image, "t/app:1");
    let expected = format!(
        "authorization: Basic {}",
        base64::engine::general_purpose::STANDARD.encode("user:secret")
    );
    // Request 1 for a token has no credentials and fails. Request 2 gives a token that is good for manifests only: at the
    // first blob it is refused, as if it had run out, and request 3 gives one that is good.
    let proxy = Proxy::start(&registry.address, move |head, number| {
        let host = head
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .unwrap_or_default();
        if head.starts_with("GET /token?scope=repository%3At%2Fapp%3Apull&service=test ") {
            return if head.contains(&expected) {
                answer("200 OK", "", &format!(r#"{{"token":"token-{number}"}}"#))
            } else {
                answer("401 Unauthorized", "", "")
            };
        }
        let shown = head
            .lines()
            .find_map(|line| line.strip_prefix("authorization: Bearer "));
        match shown {
            Some("token-2") if head.contains("/manifests/") => Fault::Pass,
            Some("token-3") => Fault::Pass,
            _ => {
                let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"\r\n");
                answer("401 Unauthorized", &challenge, "")
            }
        }
    });
    let store = open(&dir.path().join("store")).await;
    let reference = proxy.reference("t/app:1");
    let error = pull(&store, &reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", text(&*error));
    let work = store.pull(with_credentials(&*reference, "user", "secret")).unwrap();
    let pulled = work.finish().await.unwrap_or_else(|error| panic!("{}", text(&*error)));
    assert_eq!(pulled.digest, image.digest);
    assert_eq!(proxy.count("/token"), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_a_ca_that_is_trusted() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::with_tls());
    let image = simple(&dir.path().join("oci"), b"over tls");
    let reference = registry.push(&image, "t/app:1");
    for trusted in [false, true] {
        let path = dir.path().join(format!("store-{trusted}"));
        let mut options = options(&path);
        options.registry.hosts.insert(
            registry.address.clone(),
            HostConfig {
                plain_http: Some(false),
                mirrors: Vec::new(),
            },
        );
        options.registry.extra_ca = trusted.then(|| registry.dir.path().join("ca.pem"));
        let store = ImageStore::open(&path, options).await.unwrap();
        match pull(&store, &reference).await {
            Ok(pulled) => assert!(trusted && pulled.digest == image.digest),
            Err(error) => {
                let text = text(&*error);
                assert!(
                    !trusted && text.contains("not trusted") && text.contains("extra CA"),
                    "{text}"
                );
            }
        }
    }
}
