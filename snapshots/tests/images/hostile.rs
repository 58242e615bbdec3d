//! Registries that send elsewhere, say what is not so, fall silent, or want what they must not get.

use base64::Engine as _;
use flint_snapshots::images::ErrorKind;
use flint_snapshots::registry::HostConfig;

use crate::build::{noise, simple};
use crate::proxy::{Fault, Proxy, answer};
use crate::registry::Registry;
use crate::*;

fn docker_config(dir: &Path, content: &serde_json::Value) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("docker.json"), content.to_string()).unwrap();
}

fn auths(host: &str) -> serde_json::Value {
    let auth = base64::engine::general_purpose::STANDARD.encode("user:secret");
    serde_json::json!({"auths": {host: {"auth": auth}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_may_lie_elsewhere_and_credentials_do_not_go_there() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::with_password());
    let image = simple(&dir.path().join("oci"), &noise(300_000, 30));
    let arguments = [
        "--dest-tls-verify=false",
        "--preserve-digests",
        "--dest-creds",
        "user:secret",
    ];
    registry.push_with(&image, "t/app:1", &arguments);
    for status in ["302 Found", "307 Temporary Redirect"] {
        // The storage, as a cloud's: open to whoever has the address.
        let layer = std::fs::read(registry.blob_file(image.layers[0])).unwrap();
        let dump = dir.path().join("layer");
        std::fs::write(&dump, &layer).unwrap();
        let open_registry = Registry::start();
        open_registry.push(&image, "t/app:1");
        let storage = Proxy::start(&open_registry.address, |_, _| Fault::Pass);
        let (hex, target) = (image.layers[0].hex(), storage.address.clone());
        let front = Proxy::start(&registry.address, move |head, _| {
            if !head.to_lowercase().contains("authorization:") || !head.contains(&hex) {
                return Fault::Pass;
            }
            let location = format!("Location: http://{target}/v2/t/app/blobs/sha256:{hex}\r\n");
            answer(status, &location, "")
        });
        let path = dir.path().join(status);
        docker_config(&path, &auths(&front.address));
        let store = open(&path).await;
        let pulled = pull(&store, &front.reference("t/app:1")).await;
        let pulled = pulled.unwrap_or_else(|error| panic!("{}", text(&*error)));
        assert_serves(&store, &pulled, &noise(300_000, 30)[..4096]).await;
        assert_eq!(storage.count("/blobs/"), 1);
        assert!(front.saw_credentials(), "the registry was shown nothing");
        assert!(
            !storage.saw_credentials(),
            "the storage was shown the registry's credentials"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirections_in_a_circle_end() {
    let dir = tempfile::tempdir().unwrap();
    let around = Proxy::start("127.0.0.1:1", |head, _| {
        let host = head
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .unwrap_or_default();
        answer(
            "302 Found",
            &format!("Location: http://{host}/v2/t/app/manifests/1\r\n"),
            "",
        )
    });
    let store = open(&dir.path().join("store")).await;
    let error = pull(&store, &around.reference("t/app:1")).await.unwrap_err();
    let text = text(&*error);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{text}");
    assert!(text.contains("redirects") && text.contains(&around.address), "{text}");
    assert!(!text.contains("extra CA"), "{text}");
    assert!((2..=8).contains(&around.count("")), "{} requests", around.count(""));
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_in_an_error_wherever_it_falls() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(300_000, 31));
    registry.push(&image, "t/app:1");
    let cases = [
        (
            "before the head",
            "/manifests/",
            Fault::Stall(0),
            "waiting for an answer",
        ),
        (
            "behind the head",
            "/manifests/",
            Fault::Stall(400),
            "in the middle of an answer",
        ),
        (
            "in a layer",
            "/blobs/",
            Fault::Stall(5_000),
            "in the middle of an answer",
        ),
    ];
    for (name, part, fault, said) in cases {
        let hex = image.layers[0].hex();
        let slow = Proxy::start(&registry.address, move |head, _| {
            let falls = head.contains(part) && (part == "/manifests/" || head.contains(&hex));
            if falls { fault.clone() } else { Fault::Pass }
        });
        let path = dir.path().join(name);
        let mut options = options(&path);
        options.registry.timeouts.stall = Duration::from_millis(100);
        options.registry.timeouts.first_byte = Duration::from_millis(300);
        options.registry.retries.attempts = 2;
        let store = ImageStore::open(&path, options).await.unwrap();
        let error = pull(&store, &slow.reference("t/app:1")).await.unwrap_err();
        let text = text(&*error);
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}: {text}");
        for part in [said, "silent", "try again", &slow.address] {
            assert!(text.contains(part), "{name}: {part:?} is not in {text:?}");
        }
        assert_clean(&store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lengths_that_are_wrong_are_found_out() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(300_000, 32));
    registry.push(&image, "t/app:1");
    let layer = image.layers[0];
    let size = usize::try_from(std::fs::metadata(registry.blob_file(layer)).unwrap().len()).unwrap();
    let longer = "x".repeat(size + 1);
    let cases = [
        (
            "shorter",
            Fault::Length(size / 2),
            ErrorKind::Unavailable,
            format!("of {size} bytes"),
        ),
        (
            "longer",
            Fault::Length(size * 2),
            ErrorKind::Unavailable,
            "cannot be reached".to_owned(),
        ),
        (
            "more",
            answer("200 OK", "", &longer),
            ErrorKind::BadImage,
            "longer than".to_owned(),
        ),
    ];
    for (name, fault, kind, said) in cases {
        let hex = layer.hex();
        // It says so of the rest as well: nothing ever completes the layer.
        let liar = Proxy::start(&registry.address, move |head, _| match (head.contains(&hex), name) {
            (false, _) => Fault::Pass,
            (true, "more") => fault.clone(),
            (true, _) if head.to_lowercase().contains("range: bytes=") => Fault::Reset(0),
            (true, _) => fault.clone(),
        });
        let store = open(&dir.path().join(name)).await;
        match (name, pull(&store, &liar.reference("t/app:1")).await) {
            // All bytes came and have the digest: that more was promised does no harm.
            ("longer", Ok(pulled)) => assert_eq!(pulled.digest, image.digest),
            (_, Ok(_)) => panic!("{name}: it was taken"),
            (_, Err(error)) => {
                let text = text(&*error);
                assert_eq!(error.kind(), kind, "{name}: {text}");
                assert!(
                    text.contains(&said) || text.contains("cannot be reached"),
                    "{name}: {text}"
                );
                assert!(text.contains(&layer.to_string()), "{name}: {text}");
                assert_clean(&store).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_peace_gets_it_for_a_while() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), b"x");
    registry.push(&image, "t/app:1");
    let busy = Proxy::start(&registry.address, |head, number| {
        if head.contains("/manifests/") && number == 1 {
            answer("429 Too Many Requests", "Retry-After: 1\r\n", "")
        } else {
            Fault::Pass
        }
    });
    let path = dir.path().join("patient");
    let mut patient = options(&path);
    patient.registry.retries.max = Duration::from_secs(2);
    let store = ImageStore::open(&path, patient).await.unwrap();
    let begin = std::time::Instant::now();
    pull(&store, &busy.reference("t/app:1")).await.unwrap();
    assert!(
        begin.elapsed() >= Duration::from_secs(1),
        "it came back after {:?}",
        begin.elapsed()
    );

    let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"you have reached your limit"}]}"#;
    let shut = Proxy::start(&registry.address, move |_, _| {
        answer("429 Too Many Requests", "Retry-After: 3600\r\n", body)
    });
    let store = open(&dir.path().join("shut")).await;
    let begin = std::time::Instant::now();
    let error = pull(&store, &shut.reference("t/app:1")).await.unwrap_err();
    let text = text(&*error);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{text}");
    for part in ["answered 429", "you have reached your limit", "use a mirror"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "it waited as long as it was asked to"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_shown_to_their_own_registry_only() {
    let (dir, real) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), b"x");
    real.push(&image, "t/app:1");
    let refusing = |_: &str, _: usize| answer("401 Unauthorized", "WWW-Authenticate: Basic realm=\"r\"\r\n", "");
    let mirror = Proxy::start("127.0.0.1:1", refusing);
    let other = Proxy::start("127.0.0.1:1", refusing);
    let registry = Proxy::start(&real.address, move |head, number| {
        if head.to_lowercase().contains("authorization: basic") {
            Fault::Pass
        } else {
            refusing(head, number)
        }
    });
    let path = dir.path().join("store");
    docker_config(&path, &auths(&registry.address));
    let mut options = options(&path);
    let mirrors = vec![format!("http://{}", mirror.address)];
    options.registry.hosts.insert(
        registry.address.clone(),
        HostConfig {
            plain_http: None,
            mirrors,
        },
    );
    let store = ImageStore::open(&path, options).await.unwrap();
    let pulled = pull(&store, &registry.reference("t/app:1")).await;
    assert_eq!(
        pulled.unwrap_or_else(|error| panic!("{}", text(&*error))).digest,
        image.digest
    );
    // Those that come with a pull are the registry's, too.
    let given = with_credentials(registry.reference("t/app:1"), "user", "secret");
    store.pull(given).unwrap().finish().await.unwrap();
    let error = pull(&store, &other.reference("t/app:1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", text(&*error));
    assert!(mirror.count("") > 0 && other.count("") > 0);
    assert!(
        !mirror.saw_credentials(),
        "the mirror was shown the registry's credentials"
    );
    assert!(!other.saw_credentials(), "another registry was shown them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_helper_is_named_when_credentials_are_missed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Proxy::start("127.0.0.1:1", |_, _| {
        answer("401 Unauthorized", "WWW-Authenticate: Basic realm=\"r\"\r\n", "")
    });
    let path = dir.path().join("store");
    let helpers = serde_json::json!({"credHelpers": {&registry.address: "vault"}, "auths": {&registry.address: {}}});
    docker_config(&path, &helpers);
    let store = open(&path).await;
    let error = pull(&store, &registry.reference("t/app:1")).await.unwrap_err();
    let text = text(&*error);
    assert_eq!(error.kind(), ErrorKind::Denied, "{text}");
    for part in ["docker-credential-vault", "auths", "with the pull"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}
