//! What flows: output, input, terminals, exec.

use std::time::SystemTime;

use flint_api::guest::*;
use tonic::Code;

use crate::{
    calls::{container, create_and_start, delete, delete_ended, exec, exec_start, first_output, output, shell, wait},
    guest::{Client, step},
};

pub async fn holds_back_a_flood(client: &mut Client) {
    step("flood");
    let flood = shell("dd if=/dev/zero bs=64k count=80 2>/dev/null; echo end >&2");
    create_and_start(client, container("flood", flood)).await;
    let before = client.stats(StatsRequest {}).await.unwrap().into_inner().init_rss_bytes;
    let (out, err) = output(client, "flood").await;
    assert_eq!((out.len(), String::from_utf8_lossy(&err).as_ref()), (80 << 16, "end\n"));
    assert_eq!(wait(client, "flood").await.exit_code, 0);
    delete(client, "flood").await;
    step(&format!("flint-init resident: {before} bytes"));
}

pub async fn feeds_input(client: &mut Client) {
    step("input");
    let request = CreateContainerRequest {
        stdin: true,
        ..container("cat", shell("cat; echo done"))
    };
    create_and_start(client, request).await;
    let frame = |data: &str, eof| InputFrame {
        container_id: "cat".into(),
        data: data.into(),
        eof,
        resize: None,
    };
    client
        .write_input(tokio_stream::iter([frame("one ", false)]))
        .await
        .unwrap();
    client
        .write_input(tokio_stream::iter([frame("two ", true)]))
        .await
        .unwrap();
    assert_eq!(output(client, "cat").await.0, b"one two done\n");
    delete_ended(client, "cat").await;
}

pub async fn gives_a_terminal(client: &mut Client) {
    step("terminal");
    let process = Process {
        terminal: true,
        ..shell("read x; tty; stty size; echo got $x $TERM")
    };
    create_and_start(
        client,
        CreateContainerRequest {
            stdin: true,
            ..container("tty", process)
        },
    )
    .await;
    let resize = Some(TerminalSize { rows: 20, columns: 77 });
    let frame = InputFrame {
        container_id: "tty".into(),
        data: b"word\n".to_vec(),
        eof: false,
        resize,
    };
    client.write_input(tokio_stream::iter([frame])).await.unwrap();
    let out = String::from_utf8(output(client, "tty").await.0).unwrap();
    assert!(out.contains("/dev/pts/0\r\n20 77\r\ngot word xterm\r\n"), "{out:?}");
    delete_ended(client, "tty").await;
}

pub async fn execs(client: &mut Client) {
    use exec_request::Frame;
    step("exec");
    let process = Process {
        env: vec!["FROM=container".into()],
        working_dir: "/tmp".into(),
        ..shell("mkfifo fifo; echo up; cat fifo; exit 5")
    };
    create_and_start(client, container("host", process)).await;
    first_output(client, "host").await;
    let began = SystemTime::now();
    let (out, err, exit) = exec(
        client,
        vec![
            exec_start("host", shell("echo $FROM; pwd; cat; echo e >&2; exit 3")),
            Frame::Stdin(b"in\n".to_vec()),
            Frame::StdinEof(StdinEof {}),
        ],
    )
    .await;
    step(&format!("exec took {} ms", began.elapsed().unwrap().as_millis()));
    assert_eq!(
        (out.as_str(), err.as_str(), exit.exit_code),
        ("container\n/tmp\nin\n", "e\n", 3)
    );
    let nope = Process {
        args: vec!["nope".into()],
        ..Process::default()
    };
    let (_, _, exit) = exec(client, vec![exec_start("host", nope)]).await;
    assert_eq!(
        (exit.exit_code, exit.start_error.as_str()),
        (127, "exec nope: executable file not found in $PATH")
    );
    let tty = Process {
        terminal: true,
        user: Some(User {
            name: "app".into(),
            ..User::default()
        }),
        ..shell("stty size; id -u; echo $HOME")
    };
    let (out, _, _) = exec(client, vec![exec_start("host", tty)]).await;
    assert_eq!(out, "33 101\r\n1000\r\n/home/app\r\n");
    step("exec: a child that holds the pipe, a signal");
    let (out, _, exit) = exec(client, vec![exec_start("host", shell("sleep 500 & echo left"))]).await;
    assert_eq!((out.as_str(), exit.exit_code), ("left\n", 0));
    let (_, _, exit) = exec(client, vec![exec_start("host", shell("sleep 600")), Frame::Signal(9)]).await;
    assert_eq!(exit.signal, 9);
    step("exec: a client that goes away");
    // The container ends when the last writer of its FIFO does, which is the program of the client that went.
    let frames = ExecRequest {
        frame: Some(exec_start("host", shell("exec 3>/tmp/fifo; echo up; exec sleep 700"))),
    };
    let mut answers = client.exec(tokio_stream::iter([frames])).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    drop(answers);
    assert_eq!(wait(client, "host").await.exit_code, 5);
    let refused = client
        .exec(tokio_stream::iter([ExecRequest {
            frame: Some(exec_start("host", shell("true"))),
        }]))
        .await;
    assert_eq!(
        refused.unwrap().into_inner().message().await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    delete(client, "host").await;
}
