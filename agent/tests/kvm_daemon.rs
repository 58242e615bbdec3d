//! flintd and flint, the programs, where something that they need is missing, broken or hostile: each says so with the next
//! step, flintd stays up, and works as soon as things are put right.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation
)]

mod daemon;

use std::{
    fs,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use daemon::{Daemon, Start, folder};

/// Accepted, this pod waits for an image from a registry that is not there: the discard port of loopback.
const RUN: &str = "flint run --rm 127.0.0.1:9/busybox:1 -- true";

/// Everything that can be asked says that pods cannot be started, why, and what to do.
fn refuses(daemon: &Daemon, found: &str, remedy: &str) {
    assert_eq!(daemon.sh("flint ps").code, 0, "the API answers");
    let run = daemon.sh(RUN);
    assert_eq!(run.code, 125, "{run:?}");
    let doctor = daemon.sh("flint doctor");
    assert_eq!(doctor.code, 1, "{doctor:?}");
    for said in [&run.stderr, &doctor.stdout, &daemon.log()] {
        assert!(
            said.contains(found) && said.contains(remedy),
            "{found:?}, {remedy:?}: {said}"
        );
    }
    assert!(doctor.stdout.contains("cannot start pods"), "{doctor:?}");
    assert_eq!(
        daemon.sh("flint --json ps -a | jq '.pods | length'").stdout.trim(),
        "0",
        "it was not accepted"
    );
}

/// The pod gets as far as its image.
fn accepts(daemon: &Daemon) {
    let run = daemon.sh(RUN);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(
        run.stderr.contains("127.0.0.1:9") && !run.stderr.contains("cannot start pods"),
        "{run:?}"
    );
}

/// With something else in the place of /dev/kvm, and then with the right thing again.
fn without_kvm(setup: &str, repair: &str, found: &str, remedy: &str) {
    let start = Start {
        setup,
        ..Start::default()
    };
    let daemon = Daemon::start(folder(), &start);
    refuses(&daemon, found, remedy);
    assert_eq!(daemon.sh(repair).code, 0);
    accepts(&daemon);
}

#[test]
fn without_kvm_flintd_serves_and_says_so_until_the_device_is_there() {
    let without = "mkdir $T/dev; mount --rbind /dev $T/dev; mount -t tmpfs none /dev; \
                   for f in $T/dev/*; do [ $f = $T/dev/kvm ] || ln -s $f /dev/; done";
    without_kvm(
        without,
        "ln -s $T/dev/kvm /dev/kvm",
        "there is no KVM behind /dev/kvm",
        "load kvm_intel or kvm_amd",
    );
}

#[test]
fn a_file_in_the_place_of_kvm_is_told_from_kvm() {
    without_kvm(
        "touch $T/plain; mount --bind $T/plain /dev/kvm",
        "umount /dev/kvm",
        "/dev/kvm is not KVM's device",
        "remove it and load kvm_intel",
    );
}

#[test]
fn another_device_in_the_place_of_kvm_is_told_from_kvm() {
    without_kvm(
        "mount --bind /dev/null /dev/kvm",
        "umount /dev/kvm",
        "/dev/kvm is not KVM's device",
        "remove it and load kvm_intel",
    );
}

#[test]
fn a_kvm_that_may_not_be_opened_is_told_from_one_that_is_missing() {
    // On a file system without devices not even root may open one (mount(2), MS_NODEV).
    without_kvm(
        "mkdir $T/nodev; mount -t tmpfs -o nodev none $T/nodev; mknod $T/nodev/kvm c 10 232; mount --bind $T/nodev/kvm /dev/kvm",
        "umount /dev/kvm",
        "/dev/kvm may not be opened by this user",
        "member of the device's group",
    );
}

#[test]
fn a_kvm_that_another_hypervisor_holds_is_said_to_be_busy() {
    let start = Start {
        busy: true,
        ..Start::default()
    };
    let daemon = Daemon::start(folder(), &start);
    let run = daemon.sh(RUN);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(
        run.stderr.contains("/dev/kvm is busy") && run.stderr.contains("VirtualBox"),
        "{run:?}"
    );
    assert!(daemon.sh("flint doctor").stdout.contains("/dev/kvm is busy"));
}

#[test]
fn a_kernel_or_initrd_that_is_missing_or_none_is_named_until_it_is_there() {
    let folder = folder();
    fs::remove_file(folder.path().join("kernel")).unwrap();
    fs::remove_file(folder.path().join("initrd")).unwrap();
    let daemon = Daemon::start(folder, &Start::default());
    let kernel = daemon.path("kernel");
    refuses(&daemon, &format!("guest kernel {}", kernel.display()), "--kernel");
    fs::write(&kernel, "#!/bin/sh\n").unwrap();
    refuses(&daemon, "neither an ELF vmlinux nor a bzImage", "--kernel");
    fs::write(&kernel, "\x7fELF").unwrap();
    refuses(
        &daemon,
        &format!("guest initrd {}", daemon.path("initrd").display()),
        "--initrd",
    );
    fs::write(daemon.path("initrd"), "initrd").unwrap();
    accepts(&daemon);
}

/// Certificates of a CA, of a host at 127.0.0.1, and of clients good and bad.
const CERTIFICATES: &str = r#"
ca() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout $1.key -out $1.pem -subj /CN=$1 -days 2; }
signed() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout $1.key -out $1.csr -subj /CN=$1
    printf "basicConstraints=CA:FALSE\nextendedKeyUsage=$3\n$4" > $1.ext
    openssl x509 -req -in $1.csr -CA $2.pem -CAkey $2.key -CAcreateserial -out $1.pem -extfile $1.ext $5
}
set -e; cd $T
ca right; ca other; ca selfsigned
signed host right serverAuth subjectAltName=IP:127.0.0.1
signed good right clientAuth
signed foreign other clientAuth
signed server right serverAuth
signed late right clientAuth '' '-not_before 20200101000000Z -not_after 20200102000000Z'
"#;

fn with_tls() -> Daemon {
    let folder = folder();
    let in_folder = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (cert, key, ca) = (in_folder("host.pem"), in_folder("host.key"), in_folder("right.pem"));
    // OpenSSL 3.0 has no option for dates in the past when it signs a request: `openssl ca` has.
    let late = r#"
        mkdir ca; touch ca/index; echo 01 > ca/serial
        printf "[ca]\ndefault_ca=x\n[x]\ndatabase=ca/index\nserial=ca/serial\nnew_certs_dir=ca\ndefault_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n" > ca/conf
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout late.key -out late.csr -subj /CN=late
        printf "extendedKeyUsage=clientAuth\n" > late.ext
        openssl ca -batch -config ca/conf -cert right.pem -keyfile right.key -in late.csr -out late.pem -notext -extfile late.ext -startdate 20200101000000Z -enddate 20200102000000Z
    "#;
    let setup: String = CERTIFICATES
        .lines()
        .filter(|line| !line.starts_with("signed late"))
        .map(|l| format!("{l}\n"))
        .collect();
    let start = Start {
        setup: &format!("({setup}{late}) >$T/openssl.log 2>&1"),
        args: &[
            "--listen-tls",
            "127.0.0.1:7443",
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
            "--tls-client-ca",
            &ca,
        ],
        ..Start::default()
    };
    Daemon::start(folder, &start)
}

#[test]
fn only_clients_of_the_right_ca_are_served_over_the_network() {
    let daemon = with_tls();
    let ask = |client: &str, ca: &str, host: &str| {
        daemon.sh(&format!(
            "flint --host {host}:7443 --tls-ca $T/{ca}.pem --tls-cert $T/{client}.pem --tls-key $T/{client}.key ps"
        ))
    };
    let good = ask("good", "right", "127.0.0.1");
    assert_eq!(good.code, 0, "{good:?}");
    for client in ["selfsigned", "foreign", "late", "server"] {
        let refused = ask(client, "right", "127.0.0.1");
        assert_eq!(refused.code, 1, "{client}: {refused:?}");
        assert!(
            refused.stderr.contains("cannot reach flintd at 127.0.0.1:7443"),
            "{client}: {refused:?}"
        );
        assert!(refused.stderr.contains("--tls-client-ca"), "{client}: {refused:?}");
    }
    let distrusts = ask("good", "other", "127.0.0.1");
    assert!(
        distrusts.stderr.contains("signed by the CA of --tls-ca"),
        "{distrusts:?}"
    );
    let wrong_name = ask("good", "right", "localhost");
    assert!(
        wrong_name.stderr.contains("made for the name or address in --host"),
        "{wrong_name:?}"
    );
    assert_eq!(ask("good", "right", "127.0.0.1").code, 0, "it goes on serving");

    // Without a certificate, and without TLS at all.
    let bare = daemon.sh("echo | openssl s_client -connect 127.0.0.1:7443 -CAfile $T/right.pem -alpn h2 -ign_eof 2>&1");
    assert!(bare.stdout.contains("certificate required"), "{bare:?}");
    let plain = daemon.sh("echo 'GET / HTTP/1.0' | timeout 5 socat -t5 - TCP:127.0.0.1:7443 | grep -c HTTP");
    assert_eq!(plain.stdout.trim(), "0", "{plain:?}");
}

#[test]
fn a_tls_option_that_is_missing_or_no_pem_is_named() {
    let daemon = with_tls();
    let missing = daemon.sh("flint --host 127.0.0.1:7443 --tls-ca $T/right.pem ps");
    assert!(missing.stderr.contains("--tls-cert is missing"), "{missing:?}");
    let nowhere = daemon.sh("flint --host 127.0.0.1:7443 --tls-ca $T/nowhere.pem ps");
    assert!(nowhere.stderr.contains("nowhere.pem for --tls-ca"), "{nowhere:?}");
    let no_pem =
        daemon.sh("flint --host 127.0.0.1:7443 --tls-ca $T/right.pem --tls-cert $T/kernel --tls-key $T/kernel ps");
    assert!(no_pem.code == 1 && no_pem.stderr.contains("PEM"), "{no_pem:?}");
    let nobody =
        daemon.sh("flint --host 127.0.0.1:9 --tls-ca $T/right.pem --tls-cert $T/good.pem --tls-key $T/good.key ps");
    assert!(
        nobody.stderr.contains("refused") && nobody.stderr.contains("--listen-tls"),
        "{nobody:?}"
    );
}

#[test]
fn flintd_does_not_start_with_a_certificate_that_is_none() {
    let daemon = with_tls();
    let second = |cert: &str| {
        daemon.sh(&format!(
            "{} --state-dir $T/second --run-dir $T/second --cgroup $C --kernel $T/kernel --initrd $T/initrd --listen-tls 127.0.0.1:7444 \
             --tls-cert $T/{cert} --tls-key $T/host.key --tls-client-ca $T/right.pem",
            env!("CARGO_BIN_EXE_flintd")
        ))
    };
    for (cert, said) in [("kernel", "--tls-cert"), ("nowhere.pem", "nowhere.pem")] {
        let done = second(cert);
        assert_eq!(done.code, 1, "{done:?}");
        assert!(done.stderr.contains(said) && !done.stdout.contains("ready"), "{done:?}");
    }
}

/// Opens the socket's folders and mode to everybody: what is left is the check of credentials.
const OPEN: &str = "chmod 755 $T $T/run; chmod 666 $FLINT_SOCKET";
/// As nobody.
const NOBODY: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups $FLINT ps";

#[test]
fn the_unix_socket_is_for_root_alone_whatever_its_mode() {
    let daemon = Daemon::start(folder(), &Start::default());
    let kept_out = daemon.sh(&format!("chmod 755 $T $T/run; {NOBODY}"));
    assert!(
        kept_out.code == 1 && kept_out.stderr.contains("permission denied"),
        "{kept_out:?}"
    );
    let refused = daemon.sh(&format!("{OPEN}; {NOBODY}"));
    assert!(
        refused.code == 1 && refused.stderr.contains("--socket-group"),
        "{refused:?}"
    );
    assert!(daemon.log().contains("refused a connection"), "{}", daemon.log());
    assert_eq!(daemon.sh("flint ps").code, 0);
}

#[test]
fn a_group_that_was_named_may_use_the_unix_socket() {
    let start = Start {
        args: &["--socket-group", "65534"],
        ..Start::default()
    };
    let daemon = Daemon::start(folder(), &start);
    let served = daemon.sh(&format!("chmod 755 $T $T/run; {NOBODY}"));
    assert_eq!(served.code, 0, "{served:?}");
    let supplementary = "setpriv --reuid 1234 --regid 1234 --groups 65534 $FLINT ps";
    assert_eq!(daemon.sh(supplementary).code, 0);
    let other = daemon.sh(&format!(
        "{OPEN}; setpriv --reuid 1234 --regid 1234 --clear-groups $FLINT ps"
    ));
    assert_eq!(other.code, 1, "{other:?}");
}

/// An HTTP/2 frame (RFC 9113, 4.1).
fn frame(length: usize, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = &(length as u32).to_be_bytes()[1..];
    [length, &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[test]
fn bytes_that_are_no_calls_cost_their_connection_only() {
    let daemon = Daemon::start(folder(), &Start::default());
    let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(0, 4, 0, 0, &[])].concat();
    let after = |frames: &[Vec<u8>]| [preface.as_slice(), &frames.concat()].concat();
    let before = daemon.resident_kib();
    let nonsense = [
        b"".to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 1 << 20],
        b"PRI * HTTP/2.0\r\n\r\nSM".to_vec(),
        preface.clone(),
        // Truncated; of an unknown kind; longer than the settings allow; of a stream that is not open.
        after(&[frame(16_384, 0, 0, 1, b"cut")]),
        after(&[frame(4, 0xee, 0, 1, b"what")]),
        after(&[frame(0x00ff_ffff, 1, 4, 1, &[0; 1 << 20])]),
        after(&[frame(4, 0, 1, 77, b"data")]),
        // Headers that do not decode (RFC 7541: an index of 0, a table size of 2^32); that never end.
        after(&[frame(1, 1, 5, 1, &[0x80])]),
        after(&[frame(6, 1, 5, 1, &[0x3f, 0xff, 0xff, 0xff, 0xff, 0x7f])]),
        after(
            &(0..2000)
                .map(|n| frame(16_000, if n == 0 { 1 } else { 9 }, 0, 1, &[0x40; 16_000]))
                .collect::<Vec<_>>(),
        ),
        // Streams opened and reset at once, many times (CVE-2023-44487).
        after(
            &(0..5000)
                .flat_map(|n| {
                    [
                        frame(3, 1, 5, 2 * n + 1, &[0x82, 0x86, 0x84]),
                        frame(4, 3, 0, 2 * n + 1, &[0, 0, 0, 8]),
                    ]
                })
                .collect::<Vec<_>>(),
        ),
        // Settings and pings without end.
        after(&vec![frame(8, 6, 0, 0, &[7; 8]); 20_000]),
    ];
    for bytes in &nonsense {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        // It may hang up before the end.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
        assert_eq!(daemon.sh("flint ps").code, 0, "after {} bytes", bytes.len());
    }
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more are resident");
}

/// Calls by name, with a message that is nothing but a field 1 with these bytes.
async fn call(daemon: &Daemon, path: &'static str, field: Vec<u8>) -> tonic::Code {
    let mut client = tonic::client::Grpc::new(daemon.channel().await);
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<Vec<u8>, Vec<u8>>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    match client.unary(tonic::Request::new(field), path, codec).await {
        Ok(_) => tonic::Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn calls_that_cannot_be_understood_are_answered_with_their_status() {
    use tonic::Code;
    let daemon = Daemon::start(folder(), &Start::default());
    let apply = "/flint.host.v1.Pods/ApplyPod";
    assert_eq!(
        call(&daemon, apply, vec![0xff; 64]).await,
        Code::Internal,
        "field 1 is a message"
    );
    assert_eq!(
        call(&daemon, "/flint.host.v1.Pods/Conjure", vec![]).await,
        Code::Unimplemented
    );
    assert_eq!(
        call(&daemon, "/flint.host.v9.Pods/ApplyPod", vec![]).await,
        Code::Unimplemented
    );
    let before = daemon.resident_kib();
    for _ in 0..40 {
        assert_eq!(
            call(&daemon, apply, vec![0; 5 << 20]).await,
            Code::OutOfRange,
            "longer than 4 MiB"
        );
    }
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more are resident");
    assert_eq!(daemon.sh("flint ps").code, 0);
}

#[tokio::test]
async fn health_and_reflection_answer() {
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request,
        server_reflection_response,
    };
    let daemon = Daemon::start(folder(), &Start::default());
    let mut health = HealthClient::new(daemon.channel().await);
    let check = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    let status = health
        .check(check("flint.host.v1.Pods"))
        .await
        .unwrap()
        .into_inner()
        .status();
    assert_eq!(status, ServingStatus::Serving);
    let unknown = health.check(check("flint.host.v1.Nothing")).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);

    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(daemon.channel().await);
    let answers = reflection.server_reflection_info(tokio_stream::once(list)).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap().unwrap();
    let Some(server_reflection_response::MessageResponse::ListServicesResponse(services)) = answer.message_response
    else {
        panic!("{answer:?}");
    };
    let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
    for service in ["Host", "Pods", "Streams", "Images"] {
        assert!(names.contains(&format!("flint.host.v1.{service}")), "{names:?}");
    }
}
